//! Work that threads do ahead of the one who needs it: results come in order, and only so many wait.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

/// Results of `work` on `jobs`, made by threads.
pub struct Ahead<T> {
    queue: Arc<Queue<T>>,
    threads: Vec<JoinHandle<()>>,
}

struct Queue<T> {
    state: Mutex<State<T>>,
    /// A result is there, or a place for one.
    changed: Condvar,
}

struct State<T> {
    /// Jobs begun, results taken.
    begun: u64,
    taken: u64,
    is_closed: bool,
    /// The number of jobs, once the last one is reached.
    end: Option<u64>,
    done: BTreeMap<u64, thread::Result<T>>,
}

impl<T> Queue<T> {
    /// No thread panics while it holds the lock: `work` is done outside.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().expect("no panic under the lock")
    }
}

impl<T: Send + 'static> Ahead<T> {
    /// Starts `n_workers` threads, which work on at most `n_waiting` jobs before the first of their results is taken.
    pub fn start<J: Send + 'static>(
        n_workers: usize,
        n_waiting: usize,
        jobs: impl Iterator<Item = J> + Send + 'static,
        work: impl Fn(J) -> T + Send + Sync + 'static,
    ) -> Self {
        let state = State { begun: 0, taken: 0, is_closed: false, end: None, done: BTreeMap::new() };
        let queue = Arc::new(Queue { state: Mutex::new(state), changed: Condvar::new() });
        let (jobs, work) = (Arc::new(Mutex::new(jobs)), Arc::new(work));
        let n_waiting = n_waiting.max(1) as u64;
        let start = |_| {
            let (queue, jobs, work) = (queue.clone(), jobs.clone(), work.clone());
            thread::spawn(move || {
                while let Some((number, job)) = next_job(&queue, &jobs, n_waiting) {
                    let done = catch_unwind(AssertUnwindSafe(|| work(job)));
                    queue.lock().done.insert(number, done);
                    queue.changed.notify_all();
                }
            })
        };
        let threads = (0..n_workers.max(1)).map(start).collect();
        Self { queue, threads }
    }
}

/// The next job and its number, once there is room for its result; None when there is none, or nobody to take it.
fn next_job<T, J>(queue: &Queue<T>, jobs: &Mutex<impl Iterator<Item = J>>, n_waiting: u64) -> Option<(u64, J)> {
    // Held from the number to the job, so that both are in order.
    let mut jobs = jobs.lock().ok()?;
    let has_no_room = |state: &mut State<T>| !state.is_closed && state.begun >= state.taken + n_waiting;
    let mut state = queue.changed.wait_while(queue.lock(), has_no_room).expect("no panic under the lock");
    if state.is_closed || state.end.is_some() {
        return None;
    }
    let number = state.begun;
    state.begun += 1;
    drop(state);
    let job = jobs.next();
    if job.is_none() {
        queue.lock().end = Some(number);
        queue.changed.notify_all();
    }
    Some((number, job?))
}

/// The results, in the order of the jobs. A panic of a worker goes on here.
impl<T> Iterator for Ahead<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        let mut state = self.queue.lock();
        let number = state.taken;
        let is_missing =
            |state: &mut State<T>| !state.done.contains_key(&number) && state.end.is_none_or(|end| number < end);
        state = self.queue.changed.wait_while(state, is_missing).expect("no panic under the lock");
        let done = state.done.remove(&number)?;
        state.taken += 1;
        drop(state);
        self.queue.changed.notify_all();
        Some(done.unwrap_or_else(|panic| resume_unwind(panic)))
    }
}

impl<T> Drop for Ahead<T> {
    fn drop(&mut self) {
        self.queue.lock().is_closed = true;
        self.queue.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A worker's panics are results; there is nothing more to learn from it.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn results_come_in_order_whatever_the_workers_do() {
        for n_workers in [1, 2, 5] {
            let work = |job: u64| {
                thread::sleep(Duration::from_micros(job * 7919 % 400));
                job * job
            };
            let results: Vec<u64> = Ahead::start(n_workers, 7, 0..100, work).collect();
            assert_eq!(results, (0..100).map(|job| job * job).collect::<Vec<u64>>());
        }
    }

    #[test]
    fn only_so_many_results_wait() {
        let n_begun = Arc::new(AtomicUsize::new(0));
        let counted = n_begun.clone();
        let mut ahead = Ahead::start(3, 5, 0.., move |job: usize| {
            counted.fetch_add(1, Ordering::SeqCst);
            job
        });
        for taken in 0..20 {
            assert_eq!(ahead.next(), Some(taken));
            thread::sleep(Duration::from_millis(2));
            assert!(n_begun.load(Ordering::SeqCst) <= taken + 1 + 5);
        }
        // Dropped while workers wait for room.
        drop(ahead);
        assert!(n_begun.load(Ordering::SeqCst) <= 25);
    }

    #[test]
    fn a_panic_of_a_worker_is_not_waited_for_in_vain() {
        let mut ahead = Ahead::start(2, 4, 0..8, |job| if job == 2 { panic!("two") } else { job });
        assert_eq!((ahead.next(), ahead.next()), (Some(0), Some(1)));
        let panic = catch_unwind(AssertUnwindSafe(|| ahead.next())).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"two"));
        assert_eq!(ahead.next(), Some(3));
    }
}

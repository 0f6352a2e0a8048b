//! The threads that share out the sections of a network, many thousand short ones a second.
//!
//! A thread that waits for the next section spins for about a millisecond before it sleeps, for to sleep and be woken at each
//! section costs more than most sections take; between looks it lets others have its CPU. The caller of a section never
//! waits for a thread that has not begun: parts are claimed, and what the others leave the caller does itself. So a
//! section costs little more than on one thread where the CPUs are busy with something else, where a barrier that all
//! threads must reach (Candle's) costs a time slice of the other program at every section.

use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::{self, Thread};

use super::memory::CANDLE_THREADS;

/// Looks for a section before a thread goes to sleep.
const LOOKS: u32 = 20_000;
/// Of so many looks one is preceded by giving the CPU to whoever else wants it.
const LOOKS_BEFORE_YIELDING: u32 = 64;
/// Low bits of [`Pool::section`] that hold the number of parts.
const PARTS_BITS: u32 = 16;

type Job = dyn Fn(usize) + Sync;

/// The threads of this process, the caller's among them; `CANDLE_NUM_THREADS` says how many, else there is one a CPU.
pub fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| {
        let asked = std::env::var(CANDLE_THREADS).ok().and_then(|text| text.parse().ok());
        let threads = asked.filter(|&n| n > 0).unwrap_or_else(candle_core::utils::get_num_threads);
        Pool::new(threads.min(1 << (PARTS_BITS - 1)))
    })
}

/// Threads that work on the parts of one section at a time.
pub struct Pool {
    shared: &'static Shared,
    workers: Vec<Thread>,
    /// Held by the caller whose section it is.
    turn: Mutex<()>,
}

struct Shared {
    /// Number of the section, which grows, and below it the number of its parts.
    section: AtomicU64,
    /// A part's last section in which it was claimed: claimed is what has the current one or, seen by a thread that was
    /// late, a later one.
    claimed: Vec<AtomicU64>,
    /// Parts of the current section that have ended.
    ended: AtomicUsize,
    /// Written by the caller before the section is published, read after a part was claimed, which is before it ended.
    job: UnsafeCell<Option<*const Job>>,
}
// SAFETY: `job` alone is no matter of atomics. It is written while no part of a section is claimed and unended, and
// publishing the section (release) comes before every claim of its parts (acquire).
unsafe impl Sync for Shared {}
// SAFETY: the pointer is followed only while the caller waits for the part's end, and what it points to is `Sync`.
unsafe impl Send for Shared {}

impl Pool {
    fn new(threads: usize) -> Self {
        // Lives as long as its threads, which never end.
        let shared: &'static Shared = Box::leak(Box::new(Shared {
            section: AtomicU64::new(0),
            claimed: (0..threads).map(|_| AtomicU64::new(0)).collect(),
            ended: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
        }));
        let worker = |number: usize| {
            let named = thread::Builder::new().name(format!("jedi-ops-{number}"));
            named.spawn(move || shared.work(number)).expect("the system gives a thread").thread().clone()
        };
        Self { shared, workers: (1..threads).map(worker).collect(), turn: Mutex::new(()) }
    }

    /// Threads that share a section, the caller's among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f` for each of the parts 0 to `parts` − 1, at most one a thread. While another section is at work, of which
    /// this may be a part, the caller does them all. When parts panic, a panic is passed on after all have ended.
    pub fn run(&self, parts: usize, f: &(dyn Fn(usize) + Sync)) {
        assert!(parts <= self.threads(), "{parts} parts for {} threads", self.threads());
        let turn = if parts > 1 { self.turn.try_lock().ok() } else { None };
        let Some(turn) = turn else {
            return (0..parts).for_each(f);
        };
        let panicked = Mutex::new(None);
        let caught = |part: usize| {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| f(part))) {
                panicked.lock().expect("no panic while held").get_or_insert(panic);
            }
        };
        self.shared.share_out(parts, &caught, &self.workers);
        drop(turn);
        if let Some(panic) = panicked.into_inner().expect("no panic while held") {
            resume_unwind(panic);
        }
    }
}

impl Shared {
    /// Returns once every part has ended. One caller at a time.
    fn share_out(&self, parts: usize, job: &(dyn Fn(usize) + Sync), workers: &[Thread]) {
        // SAFETY: only the lifetime is forgotten; the job is called for claimed parts alone, and this returns after they
        // have ended. All of the section before had ended when it returned.
        unsafe { *self.job.get() = Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Job>(job)) };
        self.ended.store(0, Ordering::Relaxed);
        let number = (self.section.load(Ordering::Relaxed) >> PARTS_BITS) + 1;
        let section = number << PARTS_BITS | parts as u64;
        self.section.store(section, Ordering::Release);
        workers[..parts - 1].iter().for_each(Thread::unpark);
        while self.work_on(section, 0) {}
        let mut looks = 0;
        while self.ended.load(Ordering::Acquire) < parts {
            pause(&mut looks);
        }
    }

    /// Does a part of the section that nobody has claimed, that of this thread's number if it can be; false if there is none.
    fn work_on(&self, section: u64, thread: usize) -> bool {
        let (number, parts) = (section >> PARTS_BITS, (section & ((1 << PARTS_BITS) - 1)) as usize);
        // The same part on the same thread from section to section: its data may still be in the core's cache.
        let order = (thread..parts).chain(0..thread.min(parts));
        let claim = |part: &usize| self.claimed[*part].fetch_max(number, Ordering::AcqRel) < number;
        let Some(part) = { order }.find(claim) else { return false };
        // SAFETY: the part is claimed and has not ended, so the caller waits and the job lives.
        let job = unsafe { &*(*self.job.get()).expect("published with the section") };
        job(part);
        self.ended.fetch_add(1, Ordering::Release);
        true
    }

    fn work(&self, thread: usize) -> ! {
        let (mut looks, mut exhausted) = (0, 0);
        loop {
            let section = self.section.load(Ordering::Acquire);
            if section != exhausted {
                while self.work_on(section, thread) {}
                (looks, exhausted) = (0, section);
            } else if looks < LOOKS {
                pause(&mut looks);
            } else {
                thread::park();
                looks = 0;
            }
        }
    }
}

/// Between two looks.
fn pause(looks: &mut u32) {
    *looks += 1;
    match *looks % LOOKS_BEFORE_YIELDING {
        0 => thread::yield_now(),
        _ => spin_loop(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_done_once_by_whichever_thread() {
        let pool = Pool::new(4);
        for section in 0..20_000 {
            let parts = 1 + section % 4;
            let done: Vec<AtomicUsize> = (0..4).map(|_| AtomicUsize::new(0)).collect();
            pool.run(parts, &|part| {
                done[part].fetch_add(1, Ordering::Relaxed);
            });
            let expected = |part| usize::from(part < parts);
            assert!(done.iter().enumerate().all(|(part, n)| n.load(Ordering::Relaxed) == expected(part)), "{done:?}");
        }
    }

    #[test]
    fn callers_at_once_and_sections_in_sections_wait_for_nobody() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        let add = |part| {
                            sum.fetch_add(part, Ordering::Relaxed);
                        };
                        pool.run(3, &|_| pool.run(2, &add));
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 3 * 2_000 * 3);
    }

    #[test]
    fn threads_that_sleep_are_woken() {
        let pool = Pool::new(2);
        for _ in 0..3 {
            thread::sleep(std::time::Duration::from_millis(30));
            // Ends only when both parts are at work at the same time.
            let begun = AtomicUsize::new(0);
            pool.run(2, &|_| {
                begun.fetch_add(1, Ordering::AcqRel);
                while begun.load(Ordering::Acquire) < 2 {
                    thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_panic_in_a_part_is_passed_on_and_leaves_the_threads_usable() {
        let pool = Pool::new(2);
        for guilty in [0, 1] {
            let ended = AtomicUsize::new(0);
            let section = || {
                pool.run(2, &|part| {
                    assert!(part != guilty, "part {guilty}");
                    ended.fetch_add(1, Ordering::Relaxed);
                })
            };
            let panic = catch_unwind(AssertUnwindSafe(section)).expect_err("the panic is passed on");
            assert_eq!(panic.downcast_ref::<String>(), Some(&format!("part {guilty}")));
            assert_eq!(ended.into_inner(), 1);
        }
    }
}

//! Work shared out among threads in fixed contiguous parts, so that one thread count always gives the same bits.
//!
//! The threads are Candle's (`CANDLE_NUM_THREADS`): between the many short sections of a network they wait by spinning for
//! about a millisecond, where a work-stealing pool would put them to sleep and pay for waking them at every section.
//! Sections must not nest.

use std::ops::Range;
use std::sync::Mutex;

use candle_core::utils::barrier_pool;

/// Number of parts: one a thread, but none smaller than `grain` items.
pub fn parts(items: usize, grain: usize) -> usize {
    (barrier_pool().n_workers() + 1).min(items / grain.max(1)).max(1)
}

/// Calls `f(part)` for each of `parts` parts, each on its own thread.
fn on_threads(parts: usize, f: impl Fn(usize) + Sync) {
    if parts == 1 {
        return f(0);
    }
    let workers = barrier_pool().n_workers();
    // The calling thread is number `workers`; it takes the first part.
    barrier_pool().execute(|thread| {
        let part = if thread == workers { 0 } else { thread + 1 };
        if part < parts {
            f(part);
        }
    });
}

/// The `part`-th of `parts` nearly equal ranges of `0..items`.
pub fn range(items: usize, parts: usize, part: usize) -> Range<usize> {
    items * part / parts..items * (part + 1) / parts
}

/// Calls `f(range, output)` for each part of `0..items` in parallel; `output` is the part of `out` that belongs to the
/// range, `width` values an item.
pub fn for_rows<T: Send>(out: &mut [T], width: usize, grain: usize, f: impl Fn(Range<usize>, &mut [T]) + Sync + Send) {
    let items = out.len() / width.max(1);
    let parts = parts(items, grain);
    if parts == 1 {
        return f(0..items, out);
    }
    let out_at = Disjoint::new(out);
    on_threads(parts, |part| {
        let range = range(items, parts, part);
        // SAFETY: the ranges do not overlap and end at `items`, so the pieces are disjoint and inside `out`.
        let piece = unsafe { std::slice::from_raw_parts_mut(out_at.at(range.start * width), range.len() * width) };
        f(range, piece);
    });
}

/// Calls `f(range)` for each part of `0..items` in parallel and returns the results in order.
pub fn map<R: Send>(items: usize, grain: usize, f: impl Fn(Range<usize>) -> R + Sync + Send) -> Vec<R> {
    let parts = parts(items, grain);
    if parts == 1 {
        return vec![f(0..items)];
    }
    let results: Vec<Mutex<Option<R>>> = (0..parts).map(|_| Mutex::new(None)).collect();
    on_threads(parts, |part| {
        let result = f(range(items, parts, part));
        *results[part].lock().expect("each part has its own place") = Some(result);
    });
    let taken = |place: Mutex<Option<R>>| place.into_inner().expect("no part panicked").expect("every part ran");
    results.into_iter().map(taken).collect()
}

/// A shared pointer into a buffer whose writers keep to disjoint elements.
pub struct Disjoint<T>(*mut T);
// SAFETY: users of `Disjoint` write disjoint elements from different threads (stated at each use).
unsafe impl<T: Send> Sync for Disjoint<T> {}
unsafe impl<T: Send> Send for Disjoint<T> {}

impl<T> Disjoint<T> {
    pub fn new(buffer: &mut [T]) -> Self {
        Self(buffer.as_mut_ptr())
    }

    /// The address of element `index`; the caller answers for bounds and disjointness.
    pub fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

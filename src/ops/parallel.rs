//! Work shared out among threads in fixed contiguous parts, so that one thread count always gives the same bits.

use std::ops::Range;

use rayon::prelude::*;

/// Number of parts: one a thread, but none smaller than `grain` items.
pub fn parts(items: usize, grain: usize) -> usize {
    rayon::current_num_threads().min(items / grain.max(1)).max(1)
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
    let mut pieces = Vec::with_capacity(parts);
    let mut rest = out;
    for part in 0..parts {
        let range = range(items, parts, part);
        let (piece, tail) = rest.split_at_mut(range.len() * width);
        pieces.push((range, piece));
        rest = tail;
    }
    pieces.into_par_iter().for_each(|(range, piece)| f(range, piece));
}

/// Calls `f(range)` for each part of `0..items` in parallel and returns the results in order.
pub fn map<R: Send>(items: usize, grain: usize, f: impl Fn(Range<usize>) -> R + Sync + Send) -> Vec<R> {
    let parts = parts(items, grain);
    if parts == 1 {
        return vec![f(0..items)];
    }
    (0..parts).into_par_iter().map(|part| f(range(items, parts, part))).collect()
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

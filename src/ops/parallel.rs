//! Work shared out among threads in fixed contiguous parts, so that one thread count always gives the same bits.
//!
//! A section inside a part of another, or beside another thread's, runs on its own thread alone.

use std::ops::Range;
use std::sync::Mutex;

use super::threads::pool;

/// Number of parts: one a thread, but none smaller than `grain` items.
pub fn parts(items: usize, grain: usize) -> usize {
    pool().threads().min(items / grain.max(1)).max(1)
}

/// The `part`-th of `parts` nearly equal ranges of `0..items`.
pub fn range(items: usize, parts: usize, part: usize) -> Range<usize> {
    items * part / parts..items * (part + 1) / parts
}

/// The pieces of a range, each `length` long but the last.
pub fn pieces(range: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(length).map(move |first| first..range.end.min(first + length))
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
    pool().run(parts, &|part| {
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
    pool().run(parts, &|part| {
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

    /// The same for what is only read.
    pub fn reading(buffer: &[T]) -> Self {
        Self(buffer.as_ptr().cast_mut())
    }

    /// The address of element `index`; the caller answers for bounds and disjointness.
    pub fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use candle_core::{DType, Device, Tensor};

    use super::*;

    /// Calls a section with as many parts as there are threads.
    fn sum_to(n: usize) -> usize {
        map(n, 1, |range| range.sum::<usize>()).into_iter().sum()
    }

    #[test]
    fn a_panic_in_a_part_is_passed_on_and_leaves_the_threads_usable() {
        let parts = parts(1000, 1);
        for guilty in [0, parts - 1] {
            let section = || map(1000, 1, |range| assert!(range.start != guilty * 1000 / parts, "part {guilty}"));
            let panic = catch_unwind(section).expect_err("the panic is passed on");
            assert_eq!(panic.downcast_ref::<String>(), Some(&format!("part {guilty}")));
            assert_eq!(sum_to(1000), 499_500);
            // Long enough for Candle to share it out itself.
            let ones = Tensor::ones(200_000, DType::F32, &Device::Cpu).unwrap();
            assert_eq!(ones.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), 200_000.0);
        }
    }

    #[test]
    fn a_section_inside_a_part_gives_what_it_gives_outside() {
        let nested: Vec<usize> = map(8, 1, |range| range.map(sum_to).collect::<Vec<_>>()).concat();
        assert_eq!(nested, (0..8).map(sum_to).collect::<Vec<_>>());
        let mut rows = vec![0; 64];
        for_rows(&mut rows, 8, 1, |range, rows| {
            let first = range.start * 8;
            for_rows(rows, 1, 1, |range, row| row.iter_mut().zip(range).for_each(|(v, i)| *v = first + i));
        });
        assert_eq!(rows, (0..64).collect::<Vec<_>>());
    }
}

//! Memory for packed factors, and f32 behind a generic float.

use std::cell::RefCell;

use candle_core::DType;

use super::Tile;
use crate::ops::ledger;
use crate::ops::real::Real;

/// 64 bytes: a row of a tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line(pub [u32; 16]);

/// Plain integers.
pub trait Whole: Copy {}
impl Whole for Line {}
impl Whole for Tile {}

/// Memory that is written before it is read.
#[allow(clippy::uninit_vec)]
pub fn unwritten_lines<T: Whole>(len: usize) -> Vec<T> {
    let mut lines = Vec::with_capacity(len);
    // SAFETY: the capacity is `len`; lines and tiles are plain integers, written before they are read.
    unsafe { lines.set_len(len) };
    lines
}

/// Tiles to work with. The count of memory that tensors take leaves them out: they are bounded where tensors grow, and what an
/// operation takes would else depend on those before it.
struct Scratch(Vec<Tile>);

impl Scratch {
    fn new(len: usize) -> Self {
        let scratch = Self(unwritten_lines(len));
        ledger::given_back(scratch.bytes());
        scratch
    }

    fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<Tile>()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // The allocator will count them as given back.
        ledger::taken(self.bytes());
    }
}

thread_local! {
    /// What this thread has worked with and keeps for the next time.
    static KEPT: RefCell<Vec<Scratch>> = const { RefCell::new(Vec::new()) };
}

/// The most that a thread keeps.
const KEPT_BYTES: usize = 32 << 20;

/// Calls `f` with `len` tiles to work with, which are written before they are read.
pub fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [Tile]) -> R) -> R {
    let fitting = KEPT.with_borrow_mut(|kept| {
        let fitting = kept.iter().enumerate().filter(|(_, scratch)| scratch.0.len() >= len);
        let smallest = fitting.min_by_key(|(_, scratch)| scratch.0.len()).map(|(i, _)| i);
        smallest.map(|i| kept.swap_remove(i))
    });
    let mut scratch = fitting.unwrap_or_else(|| Scratch::new(len));
    let result = f(&mut scratch.0[..len]);
    KEPT.with_borrow_mut(|kept| {
        kept.push(scratch);
        // The smallest go first: they are the cheapest to make again.
        kept.sort_unstable_by_key(|scratch| scratch.0.len());
        while kept.iter().map(Scratch::bytes).sum::<usize>() > KEPT_BYTES {
            kept.remove(0);
        }
    });
    result
}

/// The values of a `T` that is f32.
pub fn single<T: Real>(values: &[T]) -> &[f32] {
    assert_eq!(T::DTYPE, DType::F32);
    // SAFETY: `Real` is f32 or f64, told apart above.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
}

/// The way back.
pub fn from_single<T: Real>(values: Vec<f32>) -> Vec<T> {
    assert_eq!(T::DTYPE, DType::F32);
    let mut values = std::mem::ManuallyDrop::new(values);
    // SAFETY: `T` is f32, and nobody else owns the memory.
    unsafe { Vec::from_raw_parts(values.as_mut_ptr().cast(), values.len(), values.capacity()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_thread_keeps_to_work_with_is_bounded() {
        let kept = || KEPT.with_borrow(|kept| kept.iter().map(Scratch::bytes).sum::<usize>());
        let most = KEPT_BYTES / size_of::<Tile>();
        with_scratch(most, |_| with_scratch(most / 2, |_| with_scratch(3, |tiles| assert_eq!(tiles.len(), 3))));
        assert!(kept() <= KEPT_BYTES && kept() > 0);
        with_scratch(most + 1, |tiles| assert_eq!(tiles.len(), most + 1));
        assert!(kept() <= KEPT_BYTES);
        let start = with_scratch(10, |tiles| tiles.as_ptr());
        assert_eq!(with_scratch(5, |tiles| tiles.as_ptr()), start, "the smallest that fits is taken again");
    }
}

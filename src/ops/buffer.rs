//! Memory that a kernel writes before it reads.

use std::ops::{Deref, DerefMut};

use super::real::Real;

/// `len` values to be written before they are read. Zeroing them first would cost a pass over memory on one thread; debug
/// builds fill them with NaN instead, so that a forgotten element shows in every test.
#[allow(clippy::uninit_vec)]
pub fn unwritten<T: Real>(len: usize) -> Vec<T> {
    if cfg!(debug_assertions) {
        return vec![T::of(f64::NAN); len];
    }
    let mut values = Vec::with_capacity(len);
    // SAFETY: the capacity is `len`; floats have no invalid bit patterns and no drop, and the kernels write each element
    // before they read it.
    unsafe { values.set_len(len) };
    values
}

/// Values that begin at a cache line, so that no vector register's worth of them lies in two.
pub struct Aligned<T> {
    values: Vec<T>,
    range: std::ops::Range<usize>,
}

/// Bytes of a cache line.
const LINE: usize = 64;

impl<T: Real> Aligned<T> {
    fn over(values: Vec<T>, len: usize) -> Self {
        let start = values.as_ptr().align_offset(LINE).min(values.len() - len);
        Self { values, range: start..start + len }
    }

    /// As [`unwritten`].
    pub fn unwritten(len: usize) -> Self {
        Self::over(unwritten(len + LINE / size_of::<T>()), len)
    }

    pub fn zeros(len: usize) -> Self {
        Self::over(vec![T::ZERO; len + LINE / size_of::<T>()], len)
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.values[self.range.clone()]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[self.range.clone()]
    }
}

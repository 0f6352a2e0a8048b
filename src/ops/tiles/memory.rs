//! Memory for packed factors, and f32 behind a generic float.

use candle_core::DType;

use super::Tile;
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

//! Memory that a kernel writes before it reads.

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

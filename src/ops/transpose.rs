//! Rows to columns, in a cache.

use candle_core::DType;

use super::real::Real;

/// `to[column, row] = scale · from[row, column]`, for so many rows and columns, each with what its rows lie apart.
///
/// # Safety
/// `from` and `to` lie inside their allocations for these sizes, and no other thread touches `to`'s elements.
pub unsafe fn transpose<T: Real>(
    (rows, columns): (usize, usize),
    (from, from_stride): (*const T, usize),
    (to, to_stride): (*mut T, usize),
    scale: T,
) {
    #[cfg(target_arch = "x86_64")]
    if T::DTYPE == DType::F32 && is_x86_feature_detected!("avx512f") && from_stride < 1 << 27 {
        let (from, to) = ((from.cast(), from_stride), (to.cast(), to_stride));
        // SAFETY: the caller's contract; the machine has AVX-512.
        return unsafe { gathered((rows, columns), from, to, scale.to_f64() as f32) };
    }
    for row in 0..rows {
        for column in 0..columns {
            // SAFETY: the caller's contract.
            unsafe { *to.add(column * to_stride + row) = *from.add(row * from_stride + column) * scale };
        }
    }
}

/// Sixteen values of a column at a time.
///
/// # Safety
/// As for [`transpose`], and offsets of sixteen rows fit an i32.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn gathered(
    (rows, columns): (usize, usize),
    (from, from_stride): (*const f32, usize),
    (to, to_stride): (*mut f32, usize),
    scale: f32,
) {
    use std::arch::x86_64::*;
    let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let offsets = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(from_stride as i32));
    let scale = _mm512_set1_ps(scale);
    for first in (0..rows).step_by(16) {
        let used = if rows - first >= 16 { !0 } else { (1u16 << (rows - first)) - 1 };
        for column in 0..columns {
            // SAFETY: only the lanes of rows that are there are read and written.
            unsafe {
                let from = from.add(first * from_stride + column);
                let values = _mm512_mask_i32gather_ps::<4>(_mm512_setzero_ps(), used, offsets, from);
                let to = to.add(column * to_stride + first);
                _mm512_mask_storeu_ps(to, used, _mm512_mul_ps(values, scale));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_goes_to_its_place_and_nothing_beside() {
        for (rows, columns) in [(1, 1), (16, 40), (48, 5), (17, 33), (3, 16)] {
            let (from_stride, to_stride) = (columns + 3, rows + 2);
            let from: Vec<f32> = (0..rows * from_stride).map(|i| i as f32).collect();
            let wide: Vec<f64> = from.iter().map(|v| f64::from(*v)).collect();
            let (mut to, mut to_wide) = (vec![-1f32; columns * to_stride], vec![-1f64; columns * to_stride]);
            // SAFETY: both are as large as said.
            unsafe {
                transpose((rows, columns), (from.as_ptr(), from_stride), (to.as_mut_ptr(), to_stride), 0.5);
                transpose((rows, columns), (wide.as_ptr(), from_stride), (to_wide.as_mut_ptr(), to_stride), 0.5);
            }
            for (at, (found, wide)) in to.iter().zip(&to_wide).enumerate() {
                let (column, row) = (at / to_stride, at % to_stride);
                let expected = if row < rows { (row * from_stride + column) as f32 * 0.5 } else { -1.0 };
                assert_eq!((*found, *wide), (expected, f64::from(expected)), "{row}, {column} of {rows} by {columns}");
            }
        }
    }
}

//! Rows to columns, in a cache.

use std::ops::Range;

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
    if T::DTYPE == DType::F32 {
        let (from, to, scale) = ((from.cast(), from_stride), (to.cast(), to_stride), scale.to_f64() as f32);
        // SAFETY: the caller's contract; the machine has what each is compiled for.
        unsafe {
            if is_x86_feature_detected!("avx512f") {
                return x86::by_sixteens((rows, columns), from, to, scale);
            }
            if is_x86_feature_detected!("avx2") {
                return x86::by_eights((rows, columns), from, to, scale);
            }
        }
    }
    // SAFETY: the caller's contract.
    unsafe { one_by_one(0..rows, 0..columns, (from, from_stride), (to, to_stride), scale) }
}

/// # Safety
/// As for [`transpose`].
#[inline(always)]
unsafe fn one_by_one<T: Real>(
    rows: Range<usize>,
    columns: Range<usize>,
    (from, from_stride): (*const T, usize),
    (to, to_stride): (*mut T, usize),
    scale: T,
) {
    for row in rows {
        for column in columns.clone() {
            // SAFETY: the caller's contract.
            unsafe { *to.add(column * to_stride + row) = *from.add(row * from_stride + column) * scale };
        }
    }
}

/// Squares that fit the registers, turned by shuffles: a gather costs a load an element, and on many CPUs far more.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// # Safety
    /// As for `transpose`.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn by_sixteens(
        (rows, columns): (usize, usize),
        (from, from_stride): (*const f32, usize),
        (to, to_stride): (*mut f32, usize),
        scale: f32,
    ) {
        let scale = _mm512_set1_ps(scale);
        let mask = |count: usize| if count >= 16 { !0 } else { (1u16 << count) - 1 };
        for first in (0..rows).step_by(16) {
            let used_rows = rows - first;
            for column in (0..columns).step_by(16) {
                let used = mask(columns - column);
                let mut square = [_mm512_setzero_ps(); 16];
                for (i, row) in square.iter_mut().enumerate().take(used_rows) {
                    // SAFETY: only columns and rows that are there are read.
                    let values = unsafe { _mm512_maskz_loadu_ps(used, from.add((first + i) * from_stride + column)) };
                    *row = _mm512_mul_ps(values, scale);
                }
                for (i, column_of) in sixteen(square).into_iter().enumerate().take(columns - column) {
                    // SAFETY: only rows and columns that are there are written.
                    unsafe {
                        _mm512_mask_storeu_ps(to.add((column + i) * to_stride + first), mask(used_rows), column_of)
                    };
                }
            }
        }
    }

    /// Rows to columns: within pairs of rows, within fours, then whole fours of values.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn sixteen(r: [__m512; 16]) -> [__m512; 16] {
        let mut out = r;
        let mut fours = r;
        for i in (0..16).step_by(4) {
            let (low, high) = (_mm512_unpacklo_ps(r[i], r[i + 1]), _mm512_unpackhi_ps(r[i], r[i + 1]));
            let (low_below, high_below) =
                (_mm512_unpacklo_ps(r[i + 2], r[i + 3]), _mm512_unpackhi_ps(r[i + 2], r[i + 3]));
            let double = [low, high, low_below, high_below].map(|v| _mm512_castps_pd(v));
            let quarters = [
                _mm512_unpacklo_pd(double[0], double[2]),
                _mm512_unpackhi_pd(double[0], double[2]),
                _mm512_unpacklo_pd(double[1], double[3]),
                _mm512_unpackhi_pd(double[1], double[3]),
            ];
            for j in 0..4 {
                fours[i + j] = _mm512_castpd_ps(quarters[j]);
            }
        }
        const EVEN: i32 = 0x88;
        const ODD: i32 = 0xdd;
        for j in 0..4 {
            let (a, b, c, d) = (fours[j], fours[4 + j], fours[8 + j], fours[12 + j]);
            let (even, odd) = (_mm512_shuffle_f32x4::<EVEN>(a, b), _mm512_shuffle_f32x4::<ODD>(a, b));
            let (even_below, odd_below) = (_mm512_shuffle_f32x4::<EVEN>(c, d), _mm512_shuffle_f32x4::<ODD>(c, d));
            out[j] = _mm512_shuffle_f32x4::<EVEN>(even, even_below);
            out[4 + j] = _mm512_shuffle_f32x4::<EVEN>(odd, odd_below);
            out[8 + j] = _mm512_shuffle_f32x4::<ODD>(even, even_below);
            out[12 + j] = _mm512_shuffle_f32x4::<ODD>(odd, odd_below);
        }
        out
    }

    /// # Safety
    /// As for `transpose`.
    #[target_feature(enable = "avx2")]
    pub unsafe fn by_eights(
        (rows, columns): (usize, usize),
        from: (*const f32, usize),
        to: (*mut f32, usize),
        scale: f32,
    ) {
        let (whole_rows, whole_columns) = (rows & !7, columns & !7);
        let by = _mm256_set1_ps(scale);
        for first in (0..whole_rows).step_by(8) {
            for column in (0..whole_columns).step_by(8) {
                let mut square = [_mm256_setzero_ps(); 8];
                for (i, row) in square.iter_mut().enumerate() {
                    // SAFETY: the caller's contract: a whole square is there.
                    *row = _mm256_mul_ps(unsafe { _mm256_loadu_ps(from.0.add((first + i) * from.1 + column)) }, by);
                }
                for (i, column_of) in eight(square).into_iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { _mm256_storeu_ps(to.0.add((column + i) * to.1 + first), column_of) };
                }
            }
        }
        // SAFETY: the caller's contract.
        unsafe {
            super::one_by_one(whole_rows..rows, 0..columns, from, to, scale);
            super::one_by_one(0..whole_rows, whole_columns..columns, from, to, scale);
        }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn eight(r: [__m256; 8]) -> [__m256; 8] {
        let (mut out, mut fours) = (r, r);
        for i in [0, 4] {
            let (low, high) = (_mm256_unpacklo_ps(r[i], r[i + 1]), _mm256_unpackhi_ps(r[i], r[i + 1]));
            let (low_below, high_below) =
                (_mm256_unpacklo_ps(r[i + 2], r[i + 3]), _mm256_unpackhi_ps(r[i + 2], r[i + 3]));
            fours[i] = _mm256_shuffle_ps::<0x44>(low, low_below);
            fours[i + 1] = _mm256_shuffle_ps::<0xee>(low, low_below);
            fours[i + 2] = _mm256_shuffle_ps::<0x44>(high, high_below);
            fours[i + 3] = _mm256_shuffle_ps::<0xee>(high, high_below);
        }
        for j in 0..4 {
            out[j] = _mm256_permute2f128_ps::<0x20>(fours[j], fours[4 + j]);
            out[4 + j] = _mm256_permute2f128_ps::<0x31>(fours[j], fours[4 + j]);
        }
        out
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

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn eights_are_turned_as_sixteens_are() {
        if !is_x86_feature_detected!("avx512f") {
            return; // The other test runs the eights there.
        }
        let (rows, columns) = (21, 43);
        let from: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
        let (mut sixteens, mut eights) = (vec![0f32; rows * columns], vec![0f32; rows * columns]);
        // SAFETY: all are as large as said; AVX-512 machines have AVX2.
        unsafe {
            transpose((rows, columns), (from.as_ptr(), columns), (sixteens.as_mut_ptr(), rows), 3.0);
            x86::by_eights((rows, columns), (from.as_ptr(), columns), (eights.as_mut_ptr(), rows), 3.0);
        }
        assert_eq!(sixteens, eights);
    }
}

//! Products of matrices that lie in a cache, as they lie there: nothing is packed. The result has sixteen columns to a
//! register (of AVX-512; other machines take several), and elements of the left factor are spread over all lanes as they are
//! read, whatever its strides. Each element of the result is one sum, a term after the other, whatever is beside it.

use candle_core::DType;

use super::matrix::{Matrix, Start, Target};
use crate::ops::lanes::{LANES, Lanes};
use crate::ops::parallel;
use crate::ops::real::Real;

/// Registers of sixteen along a row at most: with them and a row's value, eight rows' sums fill the 32 registers of AVX-512.
/// Where sixteen values take several registers, one of these and six rows do.
pub const WIDEST: usize = 3;

/// `out [m, n] = start + a [m, k] · b [k, n]`; n is a multiple of [`LANES`], and rows of b and out lie in one piece.
///
/// # Safety
/// As for [`super::matmul`].
pub unsafe fn lane_product<T: Real>(
    sizes: (usize, usize, usize),
    a: Matrix<*const T>,
    b: Matrix<*const T>,
    (out, start): Target<T>,
) {
    debug_assert!(sizes.1.is_multiple_of(LANES) && (b.column_stride, out.column_stride) == (1, 1));
    #[cfg(target_arch = "x86_64")]
    if T::DTYPE == DType::F32 {
        // SAFETY: the caller's contract, T is f32, and the machine has what each is compiled for.
        unsafe {
            let start = start.cast();
            if is_x86_feature_detected!("avx512f") {
                return x86::avx512(sizes, a.cast(), b.cast(), (out.cast_mut(), start));
            }
            if fuses() {
                return x86::avx2(sizes, a.cast(), b.cast(), (out.cast_mut(), start));
            }
        }
    }
    // SAFETY: the caller's contract.
    unsafe { product::<T, Lanes<T>, 6, 1>(sizes, a, b, (out, start)) }
}

/// Whether the machine has one of the instruction sets that this is written for.
pub fn fuses() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Sixteen values.
trait Vector<T>: Copy {
    fn all(value: T) -> Self;
    unsafe fn load(from: *const T) -> Self;
    unsafe fn store(self, to: *mut T);
    /// self + a·b
    fn plus(self, a: Self, b: Self) -> Self;
    /// self + other
    fn and(self, other: Self) -> Self;
}

impl<T: Real> Vector<T> for Lanes<T> {
    #[inline(always)]
    fn all(value: T) -> Self {
        Lanes::all(value)
    }
    #[inline(always)]
    unsafe fn load(from: *const T) -> Self {
        // SAFETY: the caller's contract: sixteen values lie there.
        Self(unsafe { from.cast::<[T; LANES]>().read() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut T) {
        // SAFETY: as above.
        unsafe { to.cast::<[T; LANES]>().write(self.0) }
    }
    #[inline(always)]
    fn plus(self, a: Self, b: Self) -> Self {
        self + a * b
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        self + other
    }
}

/// `R` rows and up to `WIDE` registers of sixteen columns at a time.
///
/// # Safety
/// As for [`lane_product`].
#[inline(always)]
unsafe fn product<T: Real, V: Vector<T>, const R: usize, const WIDE: usize>(
    sizes: (usize, usize, usize),
    a: Matrix<*const T>,
    b: Matrix<*const T>,
    (out, start): Target<T>,
) {
    let vectors = sizes.1 / LANES;
    let chunks = vectors.div_ceil(WIDE);
    for chunk in (0..chunks).map(|chunk| parallel::range(vectors, chunks, chunk)) {
        let first = chunk.start * LANES;
        // SAFETY: the caller's contract: these columns are inside b and out.
        unsafe {
            let (b, out) = (b.at(0, first), (out.at_mut(0, first), start.columns(first..chunk.end * LANES)));
            match chunk.len() {
                3 => columns::<T, V, R, 3>(sizes, a, b, out),
                2 => columns::<T, V, R, 2>(sizes, a, b, out),
                _ => columns::<T, V, R, 1>(sizes, a, b, out),
            }
        }
    }
}

/// `W` registers' columns of all rows.
#[inline(always)]
unsafe fn columns<T: Real, V: Vector<T>, const R: usize, const W: usize>(
    (m, _, k): (usize, usize, usize),
    a: Matrix<*const T>,
    b: Matrix<*const T>,
    out: Target<T>,
) {
    let mut row = 0;
    // SAFETY: the caller's contract; rows end at m.
    unsafe {
        while row + R <= m {
            rows::<T, V, R, W>(row, k, a, b, out);
            row += R;
        }
        if R > 4 && row + 4 <= m {
            rows::<T, V, 4, W>(row, k, a, b, out);
            row += 4;
        }
        while row < m {
            rows::<T, V, 1, W>(row, k, a, b, out);
            row += 1;
        }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // Loops over constants, which the compiler unrolls into registers.
unsafe fn rows<T: Real, V: Vector<T>, const R: usize, const W: usize>(
    first: usize,
    k: usize,
    a: Matrix<*const T>,
    b: Matrix<*const T>,
    (target, start): Target<T>,
) {
    // SAFETY: the caller's contract: R rows from `first` on are inside a and out, W·16 columns inside b and out.
    unsafe {
        let mut sums = [[V::all(T::ZERO); W]; R];
        let out = target.start.add(first * target.row_stride);
        let row_apart = target.row_stride;
        // Hidden from the compiler, which would step from each row's address to the next row's: as many additions in a chain
        // as there are rows, in every turn of the loop.
        let mut left = [a.start; R];
        for r in 0..R {
            left[r] = std::hint::black_box(a.at(first + r, 0).start);
        }
        let (mut place, mut right) = (0, b.start);
        for _ in 0..k {
            let mut row = [V::all(T::ZERO); W];
            for w in 0..W {
                row[w] = V::load(right.add(w * LANES));
            }
            for r in 0..R {
                let value = V::all(*left[r].add(place));
                for w in 0..W {
                    sums[r][w] = sums[r][w].plus(value, row[w]);
                }
            }
            place += a.column_stride;
            right = right.wrapping_add(b.row_stride);
        }
        for r in 0..R {
            for w in 0..W {
                let to = out.add(r * row_apart + w * LANES);
                // What is added comes last: the terms lose less beside each other than beside a larger sum.
                let sum = match start {
                    Start::Zero => sums[r][w],
                    Start::Held => sums[r][w].and(V::load(to)),
                    Start::Row(row) => sums[r][w].and(V::load(row.as_ptr().add(w * LANES))),
                };
                sum.store(to);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Matrix, Target, Vector, WIDEST, product};

    impl Vector<f32> for __m512 {
        #[inline(always)]
        fn all(value: f32) -> Self {
            // SAFETY (of all of these): only `avx512` uses them.
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self) }
        }
        #[inline(always)]
        fn plus(self, a: Self, b: Self) -> Self {
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
        #[inline(always)]
        fn and(self, other: Self) -> Self {
            unsafe { _mm512_add_ps(self, other) }
        }
    }

    #[derive(Clone, Copy)]
    struct Pair(__m256, __m256);

    impl Vector<f32> for Pair {
        #[inline(always)]
        fn all(value: f32) -> Self {
            // SAFETY (of all of these): only `avx2` uses them.
            let half = unsafe { _mm256_set1_ps(value) };
            Self(half, half)
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }
        #[inline(always)]
        fn plus(self, a: Self, b: Self) -> Self {
            unsafe { Self(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
        }
        #[inline(always)]
        fn and(self, other: Self) -> Self {
            unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }
    }

    /// # Safety
    /// As for `lane_product`.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512(sizes: (usize, usize, usize), a: Matrix<*const f32>, b: Matrix<*const f32>, out: Target<f32>) {
        // SAFETY: the caller's contract.
        unsafe { product::<f32, __m512, 8, WIDEST>(sizes, a, b, out) }
    }

    /// # Safety
    /// As for `lane_product`.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(sizes: (usize, usize, usize), a: Matrix<*const f32>, b: Matrix<*const f32>, out: Target<f32>) {
        // SAFETY: the caller's contract. Twelve sums of the sixteen registers.
        unsafe { product::<f32, Pair, 6, 1>(sizes, a, b, out) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// One element after the other.
    fn expected((m, n, k): (usize, usize, usize), a: &[f64], b: &[f64], is_turned: bool) -> Vec<f64> {
        let of_a = |row: usize, i: usize| if is_turned { a[i * m + row] } else { a[row * k + i] };
        let element = |at: usize| (0..k).map(|i| of_a(at / n, i) * b[i * n + at % n]).sum();
        (0..m * n).map(element).collect()
    }

    #[test]
    fn products_of_all_shapes_are_those_element_by_element() {
        for (m, n, k) in [(1, 16, 1), (8, 48, 40), (13, 32, 7), (77, 48, 40), (40, 48, 77), (5, 80, 33), (9, 160, 12)] {
            let mut rng = Rng::new(6, "lane product test", (m * n * k) as u64);
            let mut draw = |count: usize| -> Vec<f64> { (0..count).map(|_| rng.normal() as f32 as f64).collect() };
            let (a, b) = (draw(m * k), draw(k * n));
            let [a32, b32] = [&a, &b].map(|values| values.iter().map(|v| *v as f32).collect::<Vec<_>>());
            for is_turned in [false, true] {
                let expected = expected((m, n, k), &a, &b, is_turned);
                fn factor<T>(values: &[T], (m, k): (usize, usize), is_turned: bool) -> Matrix<*const T> {
                    if is_turned { Matrix::rows(values, m).transposed() } else { Matrix::rows(values, k) }
                }
                let (row, row32) = (vec![0.5; n], vec![0.5; n]);
                for (start, start32, begin) in [
                    (Start::Zero, Start::Zero, 0.0),
                    (Start::Held, Start::Held, 0.5),
                    (Start::Row(&row), Start::Row(&row32), 0.5),
                ] {
                    let (mut wide, mut out, mut portable) = (vec![0.5; m * n], vec![0.5; m * n], vec![0.5; m * n]);
                    let (left, left32) = (factor(&a, (m, k), is_turned), factor(&a32, (m, k), is_turned));
                    // SAFETY: all are as large as said.
                    unsafe {
                        lane_product((m, n, k), left, Matrix::rows(&b, n), (Matrix::rows_mut(&mut wide, n), start));
                        let right32 = Matrix::rows(&b32, n);
                        lane_product((m, n, k), left32, right32, (Matrix::rows_mut(&mut out, n), start32));
                        let to = (Matrix::rows_mut(&mut portable, n), start32);
                        product::<f32, Lanes<f32>, 6, 1>((m, n, k), left32, right32, to);
                    }
                    for (i, exact) in expected.iter().enumerate() {
                        let exact = exact + begin;
                        assert!((wide[i] - exact).abs() < 1e-12, "{m} {n} {k}");
                        for found in [out[i], portable[i]] {
                            assert!((f64::from(found) - exact).abs() < 1e-6 * (k as f64 + 9.0), "{m} {n} {k}");
                        }
                    }
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn avx2_gives_what_avx512_gives() {
        if !is_x86_feature_detected!("avx512f") {
            return; // Every other test runs AVX2 there.
        }
        let mut rng = Rng::new(8, "lane product test", 0);
        let (m, n, k) = (21, 80, 50);
        let mut draw = |count: usize| -> Vec<f32> { (0..count).map(|_| rng.normal() as f32).collect() };
        let (a, b) = (draw(m * k), draw(k * n));
        let (mut wide, mut narrow) = (vec![0f32; m * n], vec![0f32; m * n]);
        // SAFETY: all are as large as said; AVX-512 machines have AVX2.
        unsafe {
            let (a, b) = (Matrix::rows(&a, k), Matrix::rows(&b, n));
            x86::avx512((m, n, k), a, b, (Matrix::rows_mut(&mut wide, n), Start::Zero));
            x86::avx2((m, n, k), a, b, (Matrix::rows_mut(&mut narrow, n), Start::Zero));
        }
        assert_eq!(wide, narrow, "the same multiplications in the same order");
    }
}

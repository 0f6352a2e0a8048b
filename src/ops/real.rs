//! The two float types of the CPU kernels, their vectorisable elementary functions, and matrix products.

use candle_core::{DType, WithDType};
use gemm::Parallelism;

use super::tiles;

/// f32 in use, f64 in the gradient checks.
pub trait Real:
    WithDType
    + std::ops::Neg<Output = Self>
    + std::iter::Sum
    + std::ops::MulAssign
    + std::ops::SubAssign
    + PartialOrd
    + 'static
{
    const ZERO: Self;
    const ONE: Self;
    /// Full precision for f64; for f32 a branch-free polynomial that vectorises, within 2 units in the last place.
    #[inline(always)]
    fn exp(self) -> Self {
        self.exp_by::<false>()
    }
    /// The same where `FUSED` says that multiplying and adding is one instruction, as inside [`vectorised!`] functions.
    fn exp_by<const FUSED: bool>(self) -> Self;
    fn erf(self) -> Self;
    fn sqrt(self) -> Self;
    fn ln(self) -> Self;
    fn of(value: f64) -> Self;
    fn greater(self, other: Self) -> Self;
}

/// ln 2 in two pieces, the first with few bits, so that n·ln 2 is exact enough.
pub const LN_2_PIECES: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// Coefficients 1/k! of exp's Taylor polynomial of degree 7, the highest first.
pub const EXP_TAYLOR: [f32; 8] =
    [1.984_127e-4, 1.388_889e-3, 8.333_334e-3, 4.166_666_7e-2, 1.666_666_7e-1, 0.5, 1.0, 1.0];

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    fn exp_by<const FUSED: bool>(self) -> f64 {
        f64::exp(self)
    }
    fn erf(self) -> f64 {
        candle_core::cpu::erf::erf_f64(self)
    }
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
    fn ln(self) -> f64 {
        f64::ln(self)
    }
    fn of(value: f64) -> f64 {
        value
    }
    fn greater(self, other: f64) -> f64 {
        if self > other { self } else { other }
    }
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;

    /// exp(x) = 2ⁿ·exp(r), n = round(x/ln 2), |r| ≤ ln2/2, exp(r) by its Taylor polynomial of degree 7.
    #[inline(always)]
    fn exp_by<const FUSED: bool>(self) -> f32 {
        // Adding 1.5·2²³ rounds to the nearest integer, which then stands in the low bits; a cast would be a call a lane.
        const ROUND: f32 = 12_582_912.0;
        // Without the instruction mul_add is a call.
        let times_plus = |a: f32, b: f32, c: f32| if FUSED { a.mul_add(b, c) } else { a * b + c };
        let x = self.clamp(-87.0, 88.0);
        let rounded = times_plus(x, std::f32::consts::LOG2_E, ROUND);
        let n = rounded - ROUND;
        let r = times_plus(n, -LN_2_PIECES[1], times_plus(n, -LN_2_PIECES[0], x));
        let mut p = EXP_TAYLOR[0];
        for c in &EXP_TAYLOR[1..] {
            p = times_plus(p, r, *c);
        }
        let power = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23; // of two, 2ⁿ
        p * f32::from_bits(power)
    }

    /// Rational minimax approximation x·P(x²)/Q(x²) on [−4, 4] (the one of Eigen and XLA), beyond which erf is ±1 in f32.
    #[inline(always)]
    fn erf(self) -> f32 {
        let x = self.clamp(-4.0, 4.0);
        let x2 = x * x;
        let mut p = -2.726_142_4e-10_f32;
        for c in [2.770_681_4e-8, -2.101_024e-6, -5.692_506_4e-5, -7.349_906e-4, -2.954_6e-3, -1.609_603_3e-2] {
            p = p * x2 + c;
        }
        let mut q = -1.456_606_5e-5_f32;
        for c in [-2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2] {
            q = q * x2 + c;
        }
        x * p / q
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    fn ln(self) -> f32 {
        f32::ln(self)
    }
    #[inline(always)]
    fn of(value: f64) -> f32 {
        value as f32
    }
    #[inline(always)]
    fn greater(self, other: f32) -> f32 {
        if self > other { self } else { other }
    }
}

/// Defines a function that is compiled for AVX-512, for AVX2 and for the target's baseline, and runs the widest that this
/// machine has. The loops inside are left to the compiler's vectoriser, so what they call must be `#[inline(always)]`, and
/// every slice that they index cut to the length that they run to: checked indices are not vectorised. `FUSED` says inside
/// whether multiplying and adding is one instruction.
/// Generics stand in square brackets: `vectorised! { fn f[T: Real](x: &[T]) { … } }`.
macro_rules! vectorised {
    (
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident[$($generics:tt)*]($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block
    ) => {
        $(#[$attribute])*
        $visibility fn $name<$($generics)*>($($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
                fn avx512<$($generics)*>($($argument: $type),*) $(-> $result)? {
                    #[allow(dead_code)]
                    const FUSED: bool = true;
                    #[inline(always)]
                    fn body<$($generics)*>($($argument: $type),*) $(-> $result)? $body
                    body($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2<$($generics)*>($($argument: $type),*) $(-> $result)? {
                    #[allow(dead_code)]
                    const FUSED: bool = true;
                    #[inline(always)]
                    fn body<$($generics)*>($($argument: $type),*) $(-> $result)? $body
                    body($($argument),*)
                }
                let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
                let has_avx512 = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw");
                // SAFETY: each is called only where the machine has the features that it is compiled for.
                if has_avx512 && has_avx2 {
                    return unsafe { avx512($($argument),*) };
                }
                if has_avx2 {
                    return unsafe { avx2($($argument),*) };
                }
            }
            #[allow(dead_code)]
            const FUSED: bool = cfg!(target_arch = "aarch64");
            #[inline(always)]
            fn body<$($generics)*>($($argument: $type),*) $(-> $result)? $body
            body($($argument),*)
        }
    };
}
pub(super) use vectorised;

/// A matrix in memory: element (row, column) is at `start + row·row_stride + column·column_stride`.
#[derive(Clone, Copy)]
pub struct Matrix<P> {
    pub start: P,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<T> Matrix<*const T> {
    /// Row-major with `columns` columns.
    pub fn rows(values: &[T], columns: usize) -> Self {
        Self { start: values.as_ptr(), row_stride: columns, column_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        Self { start: self.start, row_stride: self.column_stride, column_stride: self.row_stride }
    }
}

impl<T> Matrix<*mut T> {
    pub fn rows_mut(values: &mut [T], columns: usize) -> Self {
        Self { start: values.as_mut_ptr(), row_stride: columns, column_stride: 1 }
    }
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub enum Start<'a, T> {
    Zero,
    /// What its output holds.
    Held,
    /// One row for all of the output's.
    Row(&'a [T]),
}

impl<'a, T> Start<'a, T> {
    /// A bias, where there is one.
    pub fn row(bias: Option<&'a [T]>) -> Self {
        bias.map_or(Self::Zero, Self::Row)
    }
}

/// `out [m, n] = start + scale · a [m, k] · b [k, n]`, on the calling thread: the sections of `parallel` share out the work. On
/// the tile unit where that pays, else by the `gemm` crate.
///
/// # Safety
/// The three matrices must lie inside their allocations for these sizes, no other thread may touch `out`'s elements, and a row
/// to start from has n values.
pub unsafe fn matmul<T: Real>(
    (m, n, k): (usize, usize, usize),
    scale: T,
    a: Matrix<*const T>,
    b: Matrix<*const T>,
    (out, start): (Matrix<*mut T>, Start<T>),
) {
    debug_assert!(matches!(T::DTYPE, DType::F32 | DType::F64));
    // SAFETY: the caller's contract.
    if unsafe { tiles::matmul((m, n, k), scale, a, b, (out, start)) } {
        return;
    }
    if let Start::Row(values) = start {
        for row in 0..m {
            for (i, value) in values[..n].iter().enumerate() {
                // SAFETY: inside out, by the caller's contract.
                unsafe { *out.start.add(row * out.row_stride + i * out.column_stride) = *value };
            }
        }
    }
    let add = !matches!(start, Start::Zero);
    let rows = rows_for_equal_bits(n, k);
    // SAFETY: the caller's contract; `with_more_rows` hands over matrices of its own that are as large as it says.
    unsafe {
        if m < rows {
            with_more_rows((m, n, k), rows, scale, (a, b), (out, add));
        } else {
            by_gemm((m, n, k), scale, (a, b), (out, add));
        }
    }
}

/// Rows from which the `gemm` crate (0.19, `gemm_basic_generic`) sums the products of each in one way, whatever their
/// number: with fewer it takes dot products (m·n up to 256, or a single row) or shorter portions of k (both sides up to 64).
fn rows_for_equal_bits(n: usize, k: usize) -> usize {
    let dot_products = 256 / n.max(1) + 1;
    let portions = if n <= 64 && k > 512 { 65 } else { 0 };
    dot_products.max(portions).max(2)
}

/// A product of few rows, with zeros below them: a picture must get the same bits alone and in a batch.
///
/// # Safety
/// As for [`matmul`].
unsafe fn with_more_rows<T: Real>(
    (m, n, k): (usize, usize, usize),
    rows: usize,
    scale: T,
    (a, b): (Matrix<*const T>, Matrix<*const T>),
    (out, add): (Matrix<*mut T>, bool),
) {
    let (mut more, mut sums) = (vec![T::ZERO; rows * k], vec![T::ZERO; rows * n]);
    // SAFETY: a is m·k and out m·n by the caller's contract, `more` is rows·k and `sums` rows·n with rows above m.
    unsafe {
        for row in 0..m {
            for i in 0..k {
                more[row * k + i] = *a.start.add(row * a.row_stride + i * a.column_stride);
            }
            for i in 0..if add { n } else { 0 } {
                sums[row * n + i] = *out.start.add(row * out.row_stride + i * out.column_stride);
            }
        }
        by_gemm((rows, n, k), scale, (Matrix::rows(&more, k), b), (Matrix::rows_mut(&mut sums, n), add));
        for row in 0..m {
            for i in 0..n {
                *out.start.add(row * out.row_stride + i * out.column_stride) = sums[row * n + i];
            }
        }
    }
}

/// # Safety
/// As for [`matmul`].
unsafe fn by_gemm<T: Real>(
    (m, n, k): (usize, usize, usize),
    scale: T,
    (a, b): (Matrix<*const T>, Matrix<*const T>),
    (out, add): (Matrix<*mut T>, bool),
) {
    // SAFETY: the caller's contract.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.start,
            out.column_stride as isize,
            out.row_stride as isize,
            add,
            a.start,
            a.column_stride as isize,
            a.row_stride as isize,
            b.start,
            b.column_stride as isize,
            b.row_stride as isize,
            T::ONE,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f32_exp_and_erf_agree_with_f64_to_the_last_places() {
        for step in -40_000..=40_000 {
            let x = step as f32 / 500.0;
            let exact = (x as f64).exp();
            for found in [Real::exp(x), x.exp_by::<true>()] {
                assert!((f64::from(found) - exact).abs() <= 3e-7 * exact, "exp({x})");
            }
            let exact = Real::erf(x as f64);
            assert!((Real::erf(x) as f64 - exact).abs() <= 6e-7, "erf({x})");
        }
    }

    /// As pictures of a batch are rows of a product. Sizes of last convolutions, of time embeddings, of attention to a
    /// prompt's few tokens, and long sums.
    #[test]
    fn a_row_has_the_same_bits_whatever_the_number_of_rows() {
        let mut rng = crate::rng::Rng::new(5, "rows test", 0);
        for (n, k) in [(16, 128), (8, 128), (3, 144), (128, 16), (20, 32), (32, 20), (128, 512), (64, 576), (1, 40)] {
            let mut draw = |count: usize| -> Vec<f32> { (0..count).map(|_| rng.normal() as f32).collect() };
            let (a, b) = (draw(300 * k), draw(n * k));
            for is_transposed in [false, true] {
                let product = |m: usize| {
                    let b = if is_transposed { Matrix::rows(&b, k).transposed() } else { Matrix::rows(&b, n) };
                    let mut out = vec![0.5; m * n];
                    let target = (Matrix::rows_mut(&mut out, n), Start::Held);
                    // SAFETY: a has at least m·k values, b n·k, out m·n.
                    unsafe { matmul((m, n, k), 0.3, Matrix::rows(&a, k), b, target) };
                    out
                };
                let all = product(300);
                for m in [1, 2, 3, 8, 15, 16, 17, 31, 33, 64, 65, 128, 200] {
                    assert_eq!(product(m), all[..m * n], "{m} rows of {k} by {n}, {is_transposed}");
                }
            }
        }
    }
}

//! Products by the `gemm` crate: large ones, those in f64, and all on CPUs that `blocks` is not written for.

use gemm::Parallelism;

use super::matrix::{Matrix, Start, Target};
use crate::ops::real::Real;

/// As [`super::matmul`].
///
/// # Safety
/// As there.
pub unsafe fn product<T: Real>(
    (m, n, k): (usize, usize, usize),
    a: Matrix<*const T>,
    b: Matrix<*const T>,
    (out, start): Target<T>,
) {
    if let Start::Row(values) = start {
        for row in 0..m {
            for (i, value) in values[..n].iter().enumerate() {
                // SAFETY: inside out, by the caller's contract.
                unsafe { *out.at_mut(row, i).start = *value };
            }
        }
    }
    let add = !matches!(start, Start::Zero);
    let rows = rows_for_equal_bits(n, k);
    // SAFETY: the caller's contract; `with_more_rows` hands over matrices of its own that are as large as it says.
    unsafe {
        if m < rows {
            with_more_rows((m, n, k), rows, (a, b), (out, add));
        } else {
            by_gemm((m, n, k), (a, b), (out, add));
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
/// As for [`product`].
unsafe fn with_more_rows<T: Real>(
    (m, n, k): (usize, usize, usize),
    rows: usize,
    (a, b): (Matrix<*const T>, Matrix<*const T>),
    (out, add): (Matrix<*mut T>, bool),
) {
    let (mut more, mut sums) = (vec![T::ZERO; rows * k], vec![T::ZERO; rows * n]);
    // SAFETY: a is m·k and out m·n by the caller's contract, `more` is rows·k and `sums` rows·n with rows above m.
    unsafe {
        for row in 0..m {
            for i in 0..k {
                more[row * k + i] = *a.at(row, i).start;
            }
            for i in 0..if add { n } else { 0 } {
                sums[row * n + i] = *out.at_mut(row, i).start;
            }
        }
        by_gemm((rows, n, k), (Matrix::rows(&more, k), b), (Matrix::rows_mut(&mut sums, n), add));
        for row in 0..m {
            for i in 0..n {
                *out.at_mut(row, i).start = sums[row * n + i];
            }
        }
    }
}

/// # Safety
/// As for [`product`].
unsafe fn by_gemm<T: Real>(
    (m, n, k): (usize, usize, usize),
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
            T::ONE,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

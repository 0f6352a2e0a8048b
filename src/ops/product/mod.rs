//! Matrix products.

mod blocks;
mod by_gemm;
mod lane_product;
mod matrix;

use candle_core::DType;

pub use self::blocks::{Panels, SMALL};
pub use self::lane_product::{WIDEST, lane_product};
pub use self::matrix::{Matrix, Start, Target};
use super::real::Real;
use super::tiles;

/// `out [m, n] = start + a [m, k] · b [k, n]`, on the calling thread: the sections of `parallel` share out the work.
///
/// # Safety
/// The three matrices must lie inside their allocations for these sizes, no other thread may touch `out`'s elements, and a row
/// to start from has n values.
pub unsafe fn matmul<T: Real>(sizes: Sizes, a: Matrix<*const T>, b: Matrix<*const T>, target: Target<T>) {
    // SAFETY: the caller's contract.
    unsafe { by_the_best(blocks::suits::<T>(sizes, a, b), sizes, a, b, target) }
}

/// [`matmul`] in which a row has the same bits whatever the number of rows, for pictures alone and in a batch. A layer's
/// [`SMALL`] weight has the same bits in both.
///
/// # Safety
/// As there.
pub unsafe fn matmul_alike<T: Real>(sizes: Sizes, a: Matrix<*const T>, b: Matrix<*const T>, target: Target<T>) {
    let is_for_blocks = blocks::available::<T>() && blocks::lie_as_in_a_layer(a, b);
    // SAFETY: the caller's contract.
    unsafe { by_the_best(is_for_blocks, sizes, a, b, target) }
}

/// Rows, columns, terms of a sum.
type Sizes = (usize, usize, usize);

unsafe fn by_the_best<T: Real>(
    is_for_blocks: bool,
    sizes: Sizes,
    a: Matrix<*const T>,
    b: Matrix<*const T>,
    (out, start): Target<T>,
) {
    debug_assert!(matches!(T::DTYPE, DType::F32 | DType::F64));
    // SAFETY: the caller's contract.
    unsafe {
        if tiles::matmul(sizes, T::ONE, a, b, (out, start)) {
            return;
        }
        if is_for_blocks && out.column_stride == 1 {
            blocks::product(sizes, a, b, (out, start));
        } else {
            by_gemm::product(sizes, a, b, (out, start));
        }
    }
}

/// Whether [`Panels`] are what products are made of here, with the bits of [`matmul_alike`].
pub fn takes_panels<T: Real>() -> bool {
    blocks::available::<T>() && !tiles::available()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// As pictures of a batch are rows of a product. Sizes of last convolutions, of time embeddings, of attention to a
    /// prompt's few tokens, and long sums.
    #[test]
    fn a_row_has_the_same_bits_whatever_the_number_of_rows() {
        type Product = unsafe fn(Sizes, Matrix<*const f32>, Matrix<*const f32>, Target<f32>);
        let ways: [(&str, Product); 3] =
            [("matmul", matmul), ("matmul_alike", matmul_alike), ("by gemm", by_gemm::product)];
        let mut rng = Rng::new(5, "rows test", 0);
        for (n, k) in [(16, 128), (8, 128), (3, 144), (128, 16), (20, 32), (32, 20), (128, 512), (64, 576), (1, 40)] {
            let mut draw = |count: usize| -> Vec<f32> { (0..count).map(|_| rng.normal() as f32).collect() };
            let (a, b) = (draw(300 * k), draw(n * k));
            for (is_transposed, (name, way)) in [false, true].into_iter().flat_map(|t| ways.map(|way| (t, way))) {
                let product = |m: usize| {
                    let b = if is_transposed { Matrix::rows(&b, k).transposed() } else { Matrix::rows(&b, n) };
                    let mut out = vec![0.5; m * n];
                    let target = (Matrix::rows_mut(&mut out, n), Start::Held);
                    // SAFETY: a has at least m·k values, b n·k, out m·n.
                    unsafe { way((m, n, k), Matrix::rows(&a, k), b, target) };
                    out
                };
                let all = product(300);
                for m in [1, 2, 3, 8, 15, 16, 17, 31, 33, 64, 65, 128, 200] {
                    assert_eq!(product(m), all[..m * n], "{name}: {m} rows of {k} by {n}, {is_transposed}");
                }
            }
        }
    }
}

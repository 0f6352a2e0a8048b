//! Convolutions with few positions and many weights (the lowest levels of a U-Net at small batches), where moving the
//! weight is what costs: every product reads it once, where it lies, and threads share out its channels.
//!
//! The positions are unfolded into `[positions, c·k·k]`, the order of the weight `[out, c·k·k]` itself, so that nothing is
//! repacked: y = X·Wᵀ, dW = dyᵀ·X, and dX = dy·W folded back into dx.

use super::any_batch::is_alike;
use super::buffer::unwritten;
use super::conv::Geometry;
use super::parallel::{self, Disjoint};
use super::product::{Matrix, Start, matmul, matmul_alike};
use super::real::Real;

/// Columns of a product that a thread takes at least.
const GRAIN: usize = 32;

/// Whether the weight outweighs the positions.
pub fn suits(geometry: Geometry) -> bool {
    geometry.to_choose_by().positions() <= 512 && geometry.is_wide()
}

/// # Shapes
/// - x `[images, h, w, c]`, weight `[out, c, k, k]` → `[images, h', w', out]`
pub fn forward<T: Real>(x: &[T], weight: &[T], bias: Option<&[T]>, geometry: Geometry) -> Vec<T> {
    let (patch, out, rows) = (geometry.patch(), geometry.channels.1, geometry.positions());
    let unfolded = unfold(x, geometry);
    let matmul = if is_alike() { matmul_alike } else { matmul };
    let mut y = unwritten(rows * out);
    let y_at = Disjoint::new(&mut y);
    parallel::map(out, GRAIN, |columns| {
        let a = Matrix::rows(&unfolded, patch);
        let b = Matrix::rows(&weight[columns.start * patch..], patch).transposed();
        let target = Matrix { start: y_at.at(columns.start), row_stride: out, column_stride: 1 };
        let start = Start::row(bias.map(|bias| &bias[columns.clone()]));
        // SAFETY: unfolded is rows·patch, these rows of the weight have `patch` values; y's columns are this thread's.
        unsafe { matmul((rows, columns.len(), patch), a, b, (target, start)) }
    });
    y
}

/// The gradient of the weight, `[out, c, k, k]`.
pub fn weight_gradient<T: Real>(dy: &[T], x: &[T], geometry: Geometry) -> Vec<T> {
    let (patch, out, rows) = (geometry.patch(), geometry.channels.1, geometry.positions());
    let unfolded = unfold(x, geometry);
    let mut dw = unwritten(out * patch);
    parallel::for_rows(&mut dw, patch, GRAIN, |outputs, dw| {
        let columns = Matrix { start: &raw const dy[outputs.start], row_stride: out, column_stride: 1 };
        let (a, b) = (columns.transposed(), Matrix::rows(&unfolded, patch));
        let target = (Matrix::rows_mut(dw, patch), Start::Zero);
        // SAFETY: the columns lie inside dy's rows of `out` values, unfolded is rows·patch; dw is this part's own rows.
        unsafe { matmul((outputs.len(), patch, rows), a, b, target) }
    });
    dw
}

/// The gradient of the input, `[images, h, w, c]`.
pub fn input_gradient<T: Real>(dy: &[T], weight: &[T], geometry: Geometry) -> Vec<T> {
    let ((c, out), taps, rows) = (geometry.channels, geometry.kernel * geometry.kernel, geometry.positions());
    let mut dx = vec![T::ZERO; geometry.images * geometry.input.0 * geometry.input.1 * c];
    let dx_at = Disjoint::new(&mut dx);
    parallel::map(c, GRAIN, |channels| {
        let width = channels.len() * taps;
        let mut unfolded = unwritten(rows * width);
        let a = Matrix::rows(dy, out);
        let b = Matrix { start: &raw const weight[channels.start * taps], row_stride: c * taps, column_stride: 1 };
        let target = (Matrix::rows_mut(&mut unfolded, width), Start::Zero);
        // SAFETY: dy is rows·out, these columns of the weight lie inside its rows; unfolded is rows·width.
        unsafe { matmul((rows, width, out), a, b, target) }
        for (position, patch) in unfolded.chunks_exact(width).enumerate() {
            geometry.for_taps(position, |tap, pixel| {
                let Some(pixel) = pixel else { return };
                for (i, channel) in channels.clone().enumerate() {
                    // SAFETY: these channels of dx are this thread's.
                    unsafe { *dx_at.at(pixel * c + channel) += patch[i * taps + tap] }
                }
            });
        }
    });
    dx
}

/// Every position's patch, `[positions, c·k·k]`.
fn unfold<T: Real>(x: &[T], geometry: Geometry) -> Vec<T> {
    let (c, taps) = (geometry.channels.0, geometry.kernel * geometry.kernel);
    let mut unfolded = unwritten(geometry.positions() * c * taps);
    parallel::for_rows(&mut unfolded, c * taps, 1, |positions, rows| {
        for (position, patch) in positions.zip(rows.chunks_exact_mut(c * taps)) {
            geometry.for_taps(position, |tap, pixel| {
                for channel in 0..c {
                    patch[channel * taps + tap] = pixel.map_or(T::ZERO, |pixel| x[pixel * c + channel]);
                }
            });
        }
    });
    unfolded
}

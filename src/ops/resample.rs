//! Nearest-neighbour upsampling.

use candle_core::{Result, Tensor};

use super::buffer::unwritten;
use super::graft::{for_float, graft, on_cpu, tensor, with_values};
use super::parallel;
use super::real::{Real, vectorised};

/// Doubles height and width, each pixel becoming a 2×2 block.
///
/// # Shapes
/// - x `[b, h, w, c]` → `[b, 2h, 2w, c]`
pub fn upsample2x(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let shape = (b, 2 * h, 2 * w, c);
    if !on_cpu(x) {
        let x = x.reshape((b, h, 1, w, 1, c))?;
        return x.broadcast_as((b, h, 2, w, 2, c))?.contiguous()?.reshape(shape);
    }
    let x = x.contiguous()?;
    for_float!(x, T => {
        let values = with_values::<T, _>(&x, |x| {
            let mut y = unwritten(x.len() * 4);
            parallel::for_rows(&mut y, 4 * w * c, 8, |rows, y| {
                for (row, y) in rows.zip(y.chunks_exact_mut(4 * w * c)) {
                    let (upper, lower) = y.split_at_mut(2 * w * c);
                    for (pixel, pair) in x[row * w * c..].chunks_exact(c).zip(upper.chunks_exact_mut(2 * c)) {
                        pair[..c].copy_from_slice(pixel);
                        pair[c..].copy_from_slice(pixel);
                    }
                    lower.copy_from_slice(upper);
                }
            });
            y
        })?;
        graft("upsample2x", &[&x], (values, shape), move |inputs, _, gradient| {
            let dx = with_values::<T, _>(gradient, |dy| sums_of_blocks(dy, w, c))?;
            Ok(vec![Some(tensor(dx, inputs[0].shape()))])
        })
    })
}

/// Sums of the 2×2 blocks of `[rows·2, 2w, c]`.
fn sums_of_blocks<T: Real>(dy: &[T], w: usize, c: usize) -> Vec<T> {
    let mut dx = unwritten(dy.len() / 4);
    parallel::for_rows(&mut dx, w * c, 8, |rows, dx| {
        sum_blocks(dx, &dy[rows.start * 4 * w * c..rows.end * 4 * w * c], w, c)
    });
    dx
}

vectorised! {
    fn sum_blocks[T: Real](dx: &mut [T], dy: &[T], w: usize, c: usize) {
        for (dx, dy) in dx.chunks_exact_mut(w * c).zip(dy.chunks_exact(4 * w * c)) {
            let (upper, lower) = dy.split_at(2 * w * c);
            let blocks = upper.chunks_exact(2 * c).zip(lower.chunks_exact(2 * c));
            for (sum, (upper, lower)) in dx.chunks_exact_mut(c).zip(blocks) {
                for i in 0..c {
                    sum[i] = (upper[i] + upper[c + i]) + (lower[i] + lower[c + i]);
                }
            }
        }
    }
}

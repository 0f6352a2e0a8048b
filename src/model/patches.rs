//! Pictures cut into square patches, a token each: the start of CLIP's, DINO's and SAM's picture encoders.

use candle_core::{Device, Result, Tensor};

use crate::ops::{self, Conv2d};

/// Rows and columns of whole patches of `size` pixels a side in pictures `[b, 3, h, w]`.
pub fn grid_of(pixels: &Tensor, size: usize) -> Result<(usize, usize)> {
    let (_, _, h, w) = pixels.dims4()?;
    Ok((h / size, w / size))
}

/// # Shapes
/// - pixels `[b, 3, h, w]`, weight `[d, 3, size, size]`, bias `[d]` → `[b, rows, columns, d]`; what is no whole patch at the
///   right and below is left out
pub fn patches_from_pixels(pixels: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let geometry = Conv2d { stride: weight.dim(3)?, pad: [0; 4] };
    ops::conv2d(&ops::to_channels_last(pixels)?, weight, bias, geometry)
}

/// A token for the whole picture, then the patches row by row.
///
/// # Shapes
/// - patches `[b, rows, columns, d]`, class d values → `[b, 1 + rows·columns, d]`
pub fn tokens_with_class(patches: &Tensor, class: &Tensor) -> Result<Tensor> {
    let (b, rows, columns, d) = patches.dims4()?;
    let class = class.reshape((1, 1, d))?.broadcast_as((b, 1, d))?.contiguous()?;
    Tensor::cat(&[class, patches.reshape((b, rows * columns, d))?], 1)
}

/// Vectors of a square of positions for another grid, by the bicubic filter that DINO was published with (Keys' with
/// a = −¾, no wider when the grid shrinks, edges repeated: PyTorch's `interpolate`).
///
/// # Shapes
/// - positions `[side², d]` → `[rows·columns, d]`
pub fn positions_for((rows, columns): (usize, usize), positions: &Tensor) -> Result<Tensor> {
    let (count, d) = positions.dims2()?;
    let side = count.isqrt();
    if (side, side) == (rows, columns) {
        return Ok(positions.clone());
    }
    let values: Vec<Vec<f32>> = positions.to_dtype(candle_core::DType::F32)?.to_device(&Device::Cpu)?.to_vec2()?;
    let (by_row, by_column) = (neighbours(side, rows), neighbours(side, columns));
    let mut out = Vec::with_capacity(rows * columns * d);
    for row in &by_row {
        for column in &by_column {
            let mut sum = vec![0f64; d];
            for (y, share_y) in row {
                for (x, share_x) in column {
                    let share = share_x * share_y;
                    sum.iter_mut().zip(&values[y * side + x]).for_each(|(sum, v)| *sum += share * f64::from(*v));
                }
            }
            out.extend(sum.into_iter().map(|sum| sum as f32));
        }
    }
    Tensor::from_vec(out, (rows * columns, d), positions.device())?.to_dtype(positions.dtype())
}

/// The four places that each of `to` places reads among `from`, with their shares.
fn neighbours(from: usize, to: usize) -> Vec<[(usize, f64); 4]> {
    const A: f64 = -0.75;
    let filter = |x: f64| match x.abs() {
        x if x <= 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        x => ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A,
    };
    (0..to)
        .map(|at| {
            let exact = (at as f64 + 0.5) * from as f64 / to as f64 - 0.5;
            let first = exact.floor() - 1.0;
            [0.0, 1.0, 2.0, 3.0].map(|step| {
                let place = first + step;
                (place.clamp(0.0, from as f64 - 1.0) as usize, filter(exact - place))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_of_another_grid_are_those_of_pytorch() {
        // Column + 10·row, by torch.nn.functional.interpolate(mode="bicubic").
        let values: Vec<f32> = (0..64).map(|at| (at % 8 + 10 * (at / 8)) as f32).collect();
        let positions = Tensor::from_vec(values, (64, 1), &Device::Cpu).unwrap();
        let found: Vec<f32> = positions_for((4, 16), &positions).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        // Row 1 of 4 stands at 2.5 of 8, column 8 of 16 at 3.75, which a cubic with a = −0.75 does not quite keep.
        assert!((found[16 + 8] - 28.703_125).abs() < 1e-5, "{}", found[16 + 8]);
        assert_eq!(found.len(), 64);
    }
}

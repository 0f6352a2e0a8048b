//! Attention with a bias of its own for each head (relative positions), and maps cut into square windows that attend
//! each within itself: what Swin and SAM's image encoder share. Forward only.

use std::ops::Range;

use candle_core::{Result, Tensor};

use crate::ops::{self, Mask};

/// Scores that are held at a time: 64 MB of biases in f32.
const SCORES: usize = 16 << 20;

/// Self-attention whose scores get `bias(items, heads)` added: `[items·heads, l, l]` for a part of the n items and of the
/// heads, item by item.
///
/// # Shapes
/// - q, k, v `[n, l, heads·d]` → the same
pub fn attention_with_bias(
    qkv: [&Tensor; 3],
    heads: usize,
    bias: impl Fn(Range<usize>, Range<usize>) -> Result<Tensor>,
) -> Result<Tensor> {
    let (n, l, width) = qkv[0].dims3()?;
    let d = width / heads;
    let n_heads = (SCORES / (l * l)).clamp(1, heads);
    let n_items = (SCORES / (n_heads * l * l)).clamp(1, n);
    let mut parts = Vec::new();
    for items in ranges(n, n_items) {
        let mut own = Vec::new();
        for heads in ranges(heads, n_heads) {
            let (b, h) = (items.len(), heads.len());
            // The heads become items, for the operation knows biases by item only.
            let by_head = |x: &Tensor| -> Result<Tensor> {
                let x = x.narrow(0, items.start, b)?.narrow(2, heads.start * d, h * d)?;
                x.contiguous()?.reshape((b, l, h, d))?.transpose(1, 2)?.contiguous()?.reshape((b * h, l, d))
            };
            let [q, k, v] = [by_head(qkv[0])?, by_head(qkv[1])?, by_head(qkv[2])?];
            let attended = ops::attention(&q, &k, &v, 1, Mask::Biased(&bias(items.clone(), heads)?))?;
            let attended = attended.reshape((b, h, l, d))?.transpose(1, 2)?;
            own.push(attended.contiguous()?.reshape((b, l, h * d))?); // [b, l, h·d]
        }
        parts.push(Tensor::cat(&own, 2)?);
    }
    Tensor::cat(&parts, 0)
}

fn ranges(total: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..total).step_by(step).map(move |first| first..total.min(first + step))
}

/// Cuts maps into windows, row by row; maps that do not divide get zeros at the right and below.
///
/// # Shapes
/// - x `[b, h, w, c]` → `[b·windows, side², c]`
pub fn windows_from_map(x: &Tensor, side: usize) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let (rows, columns) = (h.div_ceil(side), w.div_ceil(side));
    let x = x.pad_with_zeros(1, 0, rows * side - h)?.pad_with_zeros(2, 0, columns * side - w)?;
    let x = x.contiguous()?.reshape((b * rows, side, columns, side * c))?;
    x.transpose(1, 2)?.contiguous()?.reshape((b * rows * columns, side * side, c))
}

/// Puts windows together again and drops what was added.
///
/// # Shapes
/// - x `[b·windows, side², c]` → `[b, h, w, c]`
pub fn map_from_windows(x: &Tensor, side: usize, (h, w): (usize, usize)) -> Result<Tensor> {
    let (windows, _, c) = x.dims3()?;
    let (rows, columns) = (h.div_ceil(side), w.div_ceil(side));
    let b = windows / (rows * columns);
    let x = x.reshape((b * rows, columns, side, side * c))?.transpose(1, 2)?.contiguous()?;
    x.reshape((b, rows * side, columns * side, c))?.narrow(1, 0, h)?.narrow(2, 0, w)?.contiguous()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::rng::Rng;

    #[test]
    fn maps_come_back_from_windows() {
        let x = Rng::new(1, "windows", 0).normal_tensor(&[2, 5, 7, 3]).unwrap();
        let windows = windows_from_map(&x, 4).unwrap();
        assert_eq!(windows.dims(), [2 * 2 * 2, 16, 3]);
        // The second window of the first picture begins at row 0, column 4; its last column is padding.
        let row: Vec<Vec<f32>> = windows.get(1).unwrap().narrow(0, 0, 4).unwrap().to_vec2().unwrap();
        let own: Vec<Vec<f32>> = x.get(0).unwrap().get(0).unwrap().narrow(0, 4, 3).unwrap().to_vec2().unwrap();
        assert_eq!((&row[..3], &row[3]), (&own[..], &vec![0.0; 3]));
        let back = map_from_windows(&windows, 4, (5, 7)).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&back), values(&x));
    }

    /// One head and one bias for all is the operation itself; and a part of the items gets its own biases.
    #[test]
    fn each_item_and_head_gets_its_own_bias() {
        let mut rng = Rng::new(1, "biased", 0);
        let x = rng.normal_tensor(&[3, 4, 6]).unwrap();
        let biases = rng.normal_tensor(&[3 * 2, 4, 4]).unwrap();
        let bias = |items: Range<usize>, heads: Range<usize>| {
            let own = biases.narrow(0, items.start * 2, items.len() * 2)?.reshape((items.len(), 2, 4, 4))?;
            own.narrow(1, heads.start, heads.len())?.contiguous()?.reshape((items.len() * heads.len(), 4, 4))
        };
        let found = attention_with_bias([&x, &x, &x], 2, bias).unwrap();
        for item in 0..3 {
            for head in 0..2 {
                let own = x.narrow(0, item, 1).unwrap().narrow(2, head * 3, 3).unwrap().contiguous().unwrap();
                let bias = biases.narrow(0, item * 2 + head, 1).unwrap().contiguous().unwrap();
                let alone = ops::attention(&own, &own, &own, 1, Mask::Biased(&bias)).unwrap();
                let of_all = found.narrow(0, item, 1).unwrap().narrow(2, head * 3, 3).unwrap();
                let gap = (alone - of_all).unwrap().abs().unwrap().max_all().unwrap();
                assert!(gap.to_device(&Device::Cpu).unwrap().to_scalar::<f32>().unwrap() < 1e-6);
            }
        }
    }
}

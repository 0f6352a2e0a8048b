//! Which pixels a thing in a box covers, by SAM: the mask that it thinks best of those that the box may mean.

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, IndexOp as _, Tensor};
use image::{GrayImage, Luma, RgbImage};

use super::prepare::{Family, Preparation};
use crate::device::Runtime;
use crate::model::Files;
use crate::model::sam::Sam;

/// Boxes that go through the network together.
const BATCH: usize = 8;

/// One thing's pixels.
#[derive(Clone, Debug, PartialEq)]
pub struct Mask {
    /// Of the picture's size, 255 where the thing is.
    pub mask: GrayImage,
    /// How good the network thinks the mask is: the IoU that it expects, 0 to 1.
    pub score: f32,
}

/// The network with all that pictures and boxes need around it.
pub struct ObjectSegmenter {
    network: Sam,
    preparation: Preparation,
    device: Device,
}

impl ObjectSegmenter {
    /// Reads a folder of transformers' `SamModel`.
    pub fn load(files: &Files, runtime: &Runtime) -> Result<Self> {
        let network = Sam::load(files, runtime)?;
        let preparation = Preparation::read(files, Family::Sam)?;
        Ok(Self { network, preparation, device: runtime.device.clone() })
    }

    /// What is in each box: left, upper, right and lower edge in pixels of the picture.
    pub fn masks(&self, picture: &RgbImage, boxes: &[[f32; 4]]) -> Result<Vec<Mask>> {
        let (width, height) = picture.dimensions();
        let inner = self.preparation.resized((width, height));
        let pixels = self.preparation.tensor(picture, &self.device)?;
        let encoded = self.network.encode(&pixels).context("SAM")?;
        let scale = [inner.0 as f32 / width as f32, inner.1 as f32 / height as f32];
        let boxes: Vec<[f32; 4]> =
            boxes.iter().map(|edges| [0, 1, 2, 3].map(|edge| edges[edge] * scale[edge % 2])).collect();
        let mut found = Vec::new();
        for boxes in boxes.chunks(BATCH) {
            let (masks, quality) = self.network.masks(&encoded, boxes).context("SAM")?;
            let quality: Vec<Vec<f32>> = quality.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec2()?;
            for (n, scores) in quality.iter().enumerate() {
                let best = best_of(scores);
                let mask = Logits::new(&masks.i((n, best))?)?;
                let mask = enlarged(&mask, self.network.side(), inner, (width, height));
                found.push(Mask { mask, score: scores[best].clamp(0.0, 1.0) });
            }
        }
        Ok(found)
    }
}

/// The place of the highest score, of equals the first.
fn best_of(scores: &[f32]) -> usize {
    let better = |best: usize, i: usize| if scores[i] > scores[best] { i } else { best };
    (0..scores.len()).fold(0, better)
}

/// A map of numbers on the host.
pub struct Logits {
    values: Vec<f32>,
    width: usize,
    height: usize,
}

impl Logits {
    /// # Shapes
    /// - `[h, w]`
    pub fn new(tensor: &Tensor) -> Result<Self> {
        let (height, width) = tensor.dims2()?;
        let values = tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
        Ok(Self { values, width, height })
    }

    /// The upper left part.
    fn part(&self, width: usize, height: usize) -> Self {
        let row = |y: usize| &self.values[y * self.width..][..width];
        Self { values: (0..height).flat_map(row).copied().collect(), width, height }
    }

    /// Bilinear, edges repeated (PyTorch's `interpolate` with `align_corners=False`).
    fn resized(&self, width: usize, height: usize) -> Self {
        let (columns, rows) = (pairs(self.width, width), pairs(self.height, height));
        let mut values = Vec::with_capacity(width * height);
        for (upper, lower, share_y) in rows {
            let row = |y: usize| &self.values[y * self.width..][..self.width];
            let (upper, lower) = (row(upper), row(lower));
            values.extend(columns.iter().map(|&(left, right, share_x)| {
                let mixed = |row: &[f32]| row[left] * (1.0 - share_x) + row[right] * share_x;
                mixed(upper) * (1.0 - share_y) + mixed(lower) * share_y
            }));
        }
        Self { values, width, height }
    }
}

/// For each of `to` places the two of `from` around it, and the share of the second.
fn pairs(from: usize, to: usize) -> Vec<(usize, usize, f32)> {
    let scale = from as f32 / to as f32;
    (0..to)
        .map(|at| {
            let exact = ((at as f32 + 0.5) * scale - 0.5).max(0.0);
            let first = (exact as usize).min(from - 1);
            (first, (first + 1).min(from - 1), exact - first as f32)
        })
        .collect()
}

/// A mask in the picture's size: enlarged to the network's square of `side` pixels, its padding cut off down to `inner`, then
/// resized to the picture; what is above 0 is in (`post_process_masks`).
pub fn enlarged(mask: &Logits, side: usize, inner: (u32, u32), (width, height): (u32, u32)) -> GrayImage {
    let square = mask.resized(side, side).part(inner.0 as usize, inner.1 as usize);
    let full = square.resized(width as usize, height as usize);
    GrayImage::from_fn(width, height, |x, y| Luma([if full.values[(y * width + x) as usize] > 0.0 { 255 } else { 0 }]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_mask_is_the_first_of_the_highest() {
        assert_eq!([best_of(&[0.2, 0.9, 0.9]), best_of(&[0.5]), best_of(&[0.7, 0.1])], [1, 0, 0]);
    }
}

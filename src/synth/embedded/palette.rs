//! An embedding of how much of which colour a thing has: the same toy is alike in every pose, two toys are not. It takes the
//! place of CLIP where there are no downloads; of things whose colours change with the light it knows nothing.

use rayon::prelude::*;

use super::layout::unit;
use crate::synth::stage::{Answers, Cutout, Embedder};

/// Goes up when the vectors change.
pub const VERSION: u32 = 1;

/// Steps of a channel.
const STEPS: usize = 6;

/// A soft histogram of colours; the root of every share, so that the cosine is the Bhattacharyya coefficient.
pub struct Palette;

impl Embedder for Palette {
    fn embeddings(&mut self, asks: &[Cutout]) -> Answers<Vec<f32>> {
        asks.par_iter().map(|cutout| Ok(embedding(cutout))).collect()
    }
}

fn embedding(cutout: &Cutout) -> Vec<f32> {
    let mut bins = vec![0f64; STEPS * STEPS * STEPS];
    for (pixel, mask) in cutout.image.pixels().zip(cutout.mask.pixels()) {
        if mask.0[0] <= 127 {
            continue;
        }
        // Each pixel is shared out among the eight bins around it, so that nothing hangs on a border between two.
        let place = pixel.0.map(|value| f64::from(value) / 255.0 * (STEPS - 1) as f64);
        for corner in 0..8 {
            let (mut at, mut share) = (0, 1.0);
            for (axis, place) in place.iter().enumerate() {
                let low = (place.floor() as usize).min(STEPS - 2);
                let above = place - low as f64;
                let is_high = corner >> axis & 1 == 1;
                at = at * STEPS + low + usize::from(is_high);
                share *= if is_high { above } else { 1.0 - above };
            }
            bins[at] += share;
        }
    }
    unit(bins.into_iter().map(|bin| bin.sqrt() as f32).collect())
}

#[cfg(test)]
mod tests {
    use image::{GrayImage, Luma, Rgb, RgbImage, imageops};

    use super::*;

    fn thing(first: [u8; 3], second: [u8; 3]) -> Cutout {
        Cutout {
            image: RgbImage::from_fn(40, 30, |x, _| Rgb(if x < 30 { first } else { second })),
            mask: GrayImage::from_fn(40, 30, |_, y| Luma([if y < 25 { 255 } else { 0 }])),
        }
    }

    #[test]
    fn pose_does_not_matter_and_colours_and_their_shares_do() {
        let (red, blue) = ([210, 40, 30], [40, 60, 200]);
        let first = thing(red, blue);
        let turned = Cutout { image: imageops::rotate180(&first.image), mask: imageops::rotate180(&first.mask) };
        let others = [turned, thing(blue, red), thing(red, [240, 220, 60]), thing([206, 44, 33], [44, 56, 197])];
        let all: Vec<Cutout> = std::iter::once(first).chain(others).collect();
        let vectors: Vec<Vec<f32>> = Palette.embeddings(&all).into_iter().map(Result::unwrap).collect();
        let dots: Vec<f32> =
            vectors.iter().map(|other| vectors[0].iter().zip(other).map(|(a, b)| a * b).sum()).collect();
        assert!(dots[0] > 0.9999 && dots[1] > 0.9999, "{dots:?}");
        assert!(dots[2] < 0.92 && dots[3] < 0.92, "{dots:?}");
        assert!(dots[4] > 0.95, "a little other light: {dots:?}");
    }
}

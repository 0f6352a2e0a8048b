//! An embedding of where which colours are: two pictures of a thing in one pose are alike, in two poses they are not. It tells
//! copies from views.

use image::{RgbImage, imageops};
use rayon::prelude::*;

use crate::synth::stage::{Answers, Cutout, Embedder};

/// Goes up when the vectors change.
pub const VERSION: u32 = 1;

/// Cells along a side.
const CELLS: u32 = 24;
/// Stands where nothing is.
const NOTHING: u8 = 127;

/// A coarse picture of the thing, its longer side filling the square.
pub struct Layout;

impl Embedder for Layout {
    fn embeddings(&mut self, asks: &[Cutout]) -> Answers<Vec<f32>> {
        asks.par_iter().map(|cutout| Ok(embedding(cutout))).collect()
    }
}

fn embedding(cutout: &Cutout) -> Vec<f32> {
    let (width, height) = cutout.image.dimensions();
    let side = width.max(height);
    let (left, top) = ((side - width) / 2, (side - height) / 2);
    let mut square = RgbImage::from_pixel(side, side, image::Rgb([NOTHING; 3]));
    for (x, y, pixel) in cutout.image.enumerate_pixels() {
        if cutout.mask.get_pixel(x, y).0[0] > 127 {
            square.put_pixel(left + x, top + y, *pixel);
        }
    }
    let small = imageops::resize(&square, CELLS, CELLS, imageops::FilterType::Triangle);
    let values: Vec<f32> = small.into_raw().into_iter().map(|value| f32::from(value) - f32::from(NOTHING)).collect();
    unit(values)
}

/// The vector at length 1; of the zero vector the first axis, so that it has an angle.
pub fn unit(mut vector: Vec<f32>) -> Vec<f32> {
    let length = vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    if length == 0.0 {
        vector.iter_mut().take(1).for_each(|value| *value = 1.0);
        return vector;
    }
    vector.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    vector
}

#[cfg(test)]
mod tests {
    use image::GrayImage;

    use super::*;

    /// Left half red, right half blue, in an ellipse.
    fn thing(width: u32, height: u32) -> Cutout {
        let inside = |x: u32, y: u32| {
            let (x, y) = ((x as f32 + 0.5) / width as f32 - 0.5, (y as f32 + 0.5) / height as f32 - 0.5);
            x * x + y * y < 0.25
        };
        Cutout {
            image: RgbImage::from_fn(width, height, |x, _| {
                image::Rgb(if x * 2 < width { [220, 20, 20] } else { [20, 20, 220] })
            }),
            mask: GrayImage::from_fn(width, height, |x, y| image::Luma([if inside(x, y) { 255 } else { 0 }])),
        }
    }

    #[test]
    fn copies_of_another_size_are_alike_and_a_mirrored_one_is_not() {
        let mirrored = Cutout { image: imageops::flip_horizontal(&thing(60, 80).image), ..thing(60, 80) };
        let vectors: Vec<Vec<f32>> =
            Layout.embeddings(&[thing(60, 80), thing(45, 60), mirrored]).into_iter().map(Result::unwrap).collect();
        let dot = |a: usize, b: usize| -> f32 { vectors[a].iter().zip(&vectors[b]).map(|(x, y)| x * y).sum() };
        assert!((dot(0, 0) - 1.0).abs() < 1e-5 && dot(0, 1) > 0.99 && dot(0, 2) < 0.8, "{} {}", dot(0, 1), dot(0, 2));
    }

    #[test]
    fn nothing_has_a_direction_too() {
        assert_eq!(unit(vec![0.0, 0.0]), [1.0, 0.0]);
        assert_eq!(unit(vec![3.0, 4.0]), [0.6, 0.8]);
    }
}

//! Resizing as Pillow does it with 8-bit pictures, to the bit: networks from Python were trained on such pictures, and other
//! resamplers give them slightly other ones.
//!
//! Mirrors `src/libImaging/Resample.c` (Pillow 11): first rows, then columns, each pass rounded to 8 bits, weights in 22-bit
//! fixed point, and a filter that widens with the reduction.

use image::RgbImage;

/// Bits behind the point of a weight: 32 less the value's 8 and 2 for what overshoots.
const PRECISION: u32 = 32 - 8 - 2;

/// A filter of Pillow's `resample`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Straight between two pixels (2).
    Bilinear,
    /// Keys' cubic with a = −0.5 (3).
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let x = x.abs();
        match self {
            Self::Bilinear => (1.0 - x).max(0.0),
            Self::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            Self::Bicubic => 0.0,
        }
    }
}

/// A picture of another width and height.
pub fn resized(image: &RgbImage, (width, height): (u32, u32), filter: Filter) -> RgbImage {
    let across = if image.width() == width { image.clone() } else { rows_resized(image, width, filter) };
    if image.height() == height { across } else { columns_resized(&across, height, filter) }
}

/// The pixels that make a new one: the first of them, and their weights.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

fn windows(from: u32, to: u32, filter: Filter) -> Vec<Window> {
    let scale = f64::from(from) / f64::from(to);
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    // Multiplied by, as there: the last bit of a weight can decide a colour.
    let squeeze = 1.0 / stretch;
    let window = |index: u32| {
        let centre = (f64::from(index) + 0.5) * scale;
        // Casts towards zero, as in C.
        let first = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(from as usize);
        let weights: Vec<f64> =
            (first..end).map(|pixel| filter.weight((pixel as f64 - centre + 0.5) * squeeze)).collect();
        let sum: f64 = weights.iter().sum();
        let one = f64::from(1u32 << PRECISION);
        let weights = weights.iter().map(|weight| (weight / sum * one).round() as i32).collect();
        Window { first, weights }
    };
    (0..to).map(window).collect()
}

fn mixed(pixels: impl Iterator<Item = [u8; 3]>, weights: &[i32]) -> image::Rgb<u8> {
    let mut sums = [1i32 << (PRECISION - 1); 3];
    for (pixel, weight) in pixels.zip(weights) {
        sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += i32::from(value) * weight);
    }
    image::Rgb(sums.map(|sum| (sum >> PRECISION).clamp(0, 255) as u8))
}

fn rows_resized(image: &RgbImage, width: u32, filter: Filter) -> RgbImage {
    let windows = windows(image.width(), width, filter);
    RgbImage::from_fn(width, image.height(), |x, y| {
        let Window { first, weights } = &windows[x as usize];
        mixed((0..weights.len()).map(|i| image.get_pixel((first + i) as u32, y).0), weights)
    })
}

fn columns_resized(image: &RgbImage, height: u32, filter: Filter) -> RgbImage {
    let windows = windows(image.height(), height, filter);
    RgbImage::from_fn(image.width(), height, |x, y| {
        let Window { first, weights } = &windows[y as usize];
        mixed((0..weights.len()).map(|i| image.get_pixel(x, (first + i) as u32).0), weights)
    })
}

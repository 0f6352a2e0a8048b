//! Resizing as Pillow does it, to the bit: what the networks were trained on. A pixel is a sum over all pixels that its
//! filter reaches when the picture shrinks, rows before columns, each pass rounded to 8 bits (`Resample.c` up to Pillow 12;
//! Pillow 13 starts with the columns where that is less work, and a tenth of the colours or so then differ by one level).

use image::RgbImage;
use serde::Deserialize;

/// Pillow's filters, by the numbers that config files call them.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "u8")]
pub enum Filter {
    /// 2: a triangle.
    Bilinear,
    /// 3: Keys' cubic with a = −½.
    Bicubic,
}

impl TryFrom<u8> for Filter {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        match number {
            2 => Ok(Self::Bilinear),
            3 => Ok(Self::Bicubic),
            other => Err(format!("resample {other}: only 2 (bilinear) and 3 (bicubic) are supported")),
        }
    }
}

impl Filter {
    fn reach(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Self::Bilinear => (1.0 - x).max(0.0),
            Self::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            Self::Bicubic => 0.0,
        }
    }
}

/// Bits behind the point of a share: what an i32 leaves beside 8 bits of colour and 2 of overshoot.
const BITS: u32 = 22;

/// The picture in another width and height.
pub fn resized(image: &RgbImage, (width, height): (u32, u32), filter: Filter) -> RgbImage {
    let mut image = image.clone();
    if width != image.width() {
        let shares = shares(image.width(), width, filter);
        image = RgbImage::from_fn(width, image.height(), |x, y| {
            let (first, shares) = &shares[x as usize];
            summed(shares, |i| image.get_pixel(first + i, y).0)
        });
    }
    if height != image.height() {
        let shares = shares(image.height(), height, filter);
        image = RgbImage::from_fn(width, height, |x, y| {
            let (first, shares) = &shares[y as usize];
            summed(shares, |i| image.get_pixel(x, first + i).0)
        });
    }
    image
}

/// For each pixel of the result the first pixel that it sums, and the shares of that and the next ones.
fn shares(from: u32, to: u32, filter: Filter) -> Vec<(u32, Vec<i32>)> {
    let scale = f64::from(from) / f64::from(to);
    let stretch = scale.max(1.0);
    let reach = filter.reach() * stretch;
    // Multiplied by, as there: the last bit of a share can decide a colour.
    let squeeze = 1.0 / stretch;
    (0..to)
        .map(|at| {
            let middle = (f64::from(at) + 0.5) * scale;
            // Casts cut off, and below zero they give zero.
            let first = (middle - reach + 0.5) as u32;
            let end = ((middle + reach + 0.5) as u32).min(from);
            let values: Vec<f64> = (first..end).map(|x| filter.at((f64::from(x) - middle + 0.5) * squeeze)).collect();
            let sum: f64 = values.iter().sum();
            let fixed = |value: &f64| (value / sum * f64::from(1 << BITS)).round() as i32;
            (first, values.iter().map(fixed).collect())
        })
        .collect()
}

fn summed(shares: &[i32], pixel: impl Fn(u32) -> [u8; 3]) -> image::Rgb<u8> {
    let mut sums = [1i32 << (BITS - 1); 3];
    for (i, share) in shares.iter().enumerate() {
        let pixel = pixel(i as u32);
        sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += i32::from(value) * share);
    }
    image::Rgb(sums.map(|sum| (sum >> BITS).clamp(0, 255) as u8))
}

//! Resizing for training, several times as fast as `image::resized`; equal to it but for rounding, and at hard edges.

use std::cell::RefCell;

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;

use super::cut::{Region, part};
use super::resized;

thread_local! {
    /// Keeps its buffers from picture to picture.
    static RESIZER: RefCell<Resizer> = RefCell::new(Resizer::new());
}

/// A square region of a picture with `side` pixels a side, by the filters of [`resized`]. The region is copied first: a filter
/// must not see the next picture of a strip.
pub fn resized_region(image: &RgbImage, region: Region, side: u32) -> RgbImage {
    let square = part(image, region);
    if region.width == side {
        return square;
    }
    resized_fast(&square, side).unwrap_or_else(|| resized(&square, side))
}

/// None where the crate refuses: never for a whole picture, as far as its documentation tells.
fn resized_fast(square: &RgbImage, side: u32) -> Option<RgbImage> {
    let source = ImageRef::new(square.width(), square.height(), square.as_raw(), PixelType::U8x3).ok()?;
    let filter = if square.width() > side { FilterType::Lanczos3 } else { FilterType::CatmullRom };
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
    let mut resized = Image::new(side, side, PixelType::U8x3);
    RESIZER.with_borrow_mut(|resizer| resizer.resize(&source, &mut resized, &options)).ok()?;
    RgbImage::from_raw(side, side, resized.into_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// Edges with steps of twice the contrast, gradients and noise.
    fn picture(contrast: u8) -> RgbImage {
        let mut rng = Rng::new(1, "shrink test", 0);
        RgbImage::from_fn(90, 130, |x, y| {
            let noise = rng.below(30) as u8;
            let edge = if (x / 7 + y / 9) % 2 == 0 { 110 + contrast } else { 110 - contrast };
            image::Rgb([edge + noise, 40 + x as u8 + noise, 40 + y as u8 + noise])
        })
    }

    /// The fast one rounds between rows and columns: 1 or 2 of 255. It also cuts off there what overshoots at edges from black to
    /// white: a model of both in NumPy on this picture shows up to 24, and 1.1 in the mean.
    #[test]
    fn regions_are_resized_as_the_slow_twin_does_but_for_rounding() {
        for (contrast, most, most_in_mean) in [(50, 2, 0.3), (110, 30, 1.3)] {
            let image = picture(contrast);
            for (x, y, width) in [(0, 0, 90), (0, 40, 90), (13, 21, 61)] {
                let region = Region { x, y, width, height: width };
                for side in [16, 40, width - 1, width, width + 1, 200] {
                    let square = part(&image, region);
                    let (fast, slow) = (resized_fast(&square, side).unwrap(), resized(&square, side));
                    let pairs = fast.as_raw().iter().zip(slow.as_raw());
                    let differences: Vec<u8> = pairs.map(|(a, b)| a.abs_diff(*b)).collect();
                    let mean = differences.iter().map(|&d| f64::from(d)).sum::<f64>() / differences.len() as f64;
                    let largest = differences.iter().max().unwrap();
                    let is_close = *largest <= most && mean < most_in_mean;
                    assert!(is_close, "{contrast}, {width} to {side}: largest {largest}, mean {mean}");
                    assert_eq!(resized_region(&image, region, side).dimensions(), (side, side));
                }
            }
        }
    }
}

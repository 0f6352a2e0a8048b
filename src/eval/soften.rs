//! What a small VAE does to a picture, roughly: edges blur, flat areas get grain. The judge is fitted to some pictures
//! treated like this, so that softness alone does not change its mind.

use image::{Rgb, RgbImage};

use crate::rng::Rng;

/// How soft.
#[derive(Clone, Copy, Debug)]
pub struct Softness {
    /// Deviation of the Gaussian blur; 0 = sharp.
    pub sigma_px: f64,
    /// Deviation of normal noise in steps of 1/255; 0 = none.
    pub noise: f64,
}

/// `image` blurred, then grained; the grain is drawn from `rng`.
pub fn soften(image: &RgbImage, softness: Softness, rng: &mut Rng) -> RgbImage {
    let mut soft = if softness.sigma_px > 0.0 { blur(image, softness.sigma_px) } else { image.clone() };
    if softness.noise > 0.0 {
        soft.iter_mut().for_each(|v| *v = (*v as f64 + softness.noise * rng.normal()).round().clamp(0.0, 255.0) as u8);
    }
    soft
}

/// Gaussian blur along both axes, edges extended.
fn blur(image: &RgbImage, sigma_px: f64) -> RgbImage {
    let radius = (3.0 * sigma_px).ceil() as i64;
    let weights: Vec<f64> = (-radius..=radius).map(|d| (-0.5 * (d as f64 / sigma_px).powi(2)).exp()).collect();
    let total: f64 = weights.iter().sum();
    let (width, height) = (image.width() as i64, image.height() as i64);
    let along = |from: &RgbImage, dx: i64, dy: i64| {
        RgbImage::from_fn(from.width(), from.height(), |x, y| {
            let mut sums = [0.0; 3];
            for (tap, weight) in (-radius..=radius).zip(&weights) {
                let x = (x as i64 + tap * dx).clamp(0, width - 1) as u32;
                let y = (y as i64 + tap * dy).clamp(0, height - 1) as u32;
                let pixel = from.get_pixel(x, y).0;
                (0..3).for_each(|c| sums[c] += weight * pixel[c] as f64);
            }
            Rgb(sums.map(|sum| (sum / total).round() as u8))
        })
    };
    along(&along(image, 1, 0), 0, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLURRED: Softness = Softness { sigma_px: 1.0, noise: 0.0 };

    #[test]
    fn blur_keeps_flat_pictures() {
        let flat = RgbImage::from_pixel(9, 7, Rgb([10, 120, 250]));
        assert_eq!(soften(&flat, BLURRED, &mut Rng::new(0, "test", 0)), flat);
    }

    #[test]
    fn blur_spreads_a_point_by_the_gaussian() {
        let mut point = RgbImage::new(15, 15);
        point.put_pixel(7, 7, Rgb([255; 3]));
        let soft = soften(&point, BLURRED, &mut Rng::new(0, "test", 0));
        // exp(−d²/2)/Σexp(−k²/2) is 0.3991 in the middle and 0.2420 one pixel beside it: 255·0.3991² = 40.6, 255·0.3991·0.2420
        // = 24.6; one step of slack for rounding after each axis.
        for (x, expected) in [(7, 40.6), (8, 24.6), (6, 24.6)] {
            let value = soft.get_pixel(x, 7).0[0] as f64;
            assert!((value - expected).abs() < 1.0, "{x}: {value}");
        }
    }

    #[test]
    fn noise_has_its_deviation() {
        let grey = RgbImage::from_pixel(64, 64, Rgb([128; 3]));
        let soft = soften(&grey, Softness { sigma_px: 0.0, noise: 8.0 }, &mut Rng::new(0, "test", 0));
        let variance = soft.iter().map(|v| (*v as f64 - 128.0).powi(2)).sum::<f64>() / (64.0 * 64.0 * 3.0);
        // 12288 values: the deviation is known to 8/√24576 = 0.05.
        assert!((variance.sqrt() - 8.0).abs() < 0.25, "{variance}");
    }
}

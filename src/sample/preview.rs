//! Pictures of latents at almost no cost: each latent pixel becomes a colour by a linear map, fitted to the model's own
//! autoencoder.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use image::imageops::{self, FilterType};
use image::{Rgb, RgbImage};

use super::pipeline::Pipeline;
use super::request::SampleSettings;
use crate::rng::Rng;

/// Pictures that the map is fitted to.
const PICTURES: u64 = 4;
/// Latent pixels a side of each.
const SIDE: usize = 16;

/// The linear map from a latent pixel to a colour.
pub struct LatentColours {
    /// For red, green and blue: a weight for each latent channel, and an offset.
    weights: [Vec<f64>; 3],
    /// Pixels that a latent spans.
    scale: u32,
}

impl LatentColours {
    /// Fits the map to the latents of random soft colours, by least squares.
    pub fn fit(pipeline: &Pipeline, settings: &SampleSettings) -> Result<Self> {
        let scale = (settings.size / pipeline.latent_shape(settings.size).1) as u32;
        let side = SIDE as u32;
        let small: Vec<RgbImage> = (0..PICTURES).map(|number| soft_colours(number, side)).collect();
        let grown = |image: &RgbImage| imageops::resize(image, side * scale, side * scale, FilterType::Triangle);
        let pictures: Vec<RgbImage> = small.iter().map(grown).collect();
        let fitted = SampleSettings { size: SIDE * scale as usize, vae_tile: None, ..settings.clone() };
        let rows = latent_pixels(&pipeline.latents_of(&pictures, &fitted)?)?.concat();
        let colours: Vec<Rgb<u8>> = small.iter().flat_map(|image| image.pixels().copied()).collect();
        let weights = [0, 1, 2].map(|channel| {
            let levels: Vec<f64> = colours.iter().map(|colour| f64::from(colour.0[channel])).collect();
            least_squares(&rows, &levels)
        });
        Ok(Self { weights, scale })
    }

    /// Pictures of latents, in the size that decoding would give.
    ///
    /// # Shapes
    /// - latents `[k, c, h, w]` → k pictures
    pub fn pictures(&self, latents: &Tensor) -> Result<Vec<RgbImage>> {
        let (_, _, h, w) = latents.dims4()?;
        let level = |pixel: &[f64], weights: &[f64]| -> f64 { pixel.iter().zip(weights).map(|(a, b)| a * b).sum() };
        let picture = |pixels: &Vec<Vec<f64>>| {
            let small = RgbImage::from_fn(w as u32, h as u32, |x, y| {
                let pixel = &pixels[y as usize * w + x as usize];
                // A float cast to u8 saturates.
                Rgb([0, 1, 2].map(|channel: usize| level(pixel, &self.weights[channel]).round() as u8))
            });
            imageops::resize(&small, w as u32 * self.scale, h as u32 * self.scale, FilterType::Triangle)
        };
        Ok(latent_pixels(latents)?.iter().map(picture).collect())
    }
}

/// For each picture its latent pixels, row by row, with a 1 at the end of each.
fn latent_pixels(latents: &Tensor) -> Result<Vec<Vec<Vec<f64>>>> {
    let planes = latents.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_from(2)?.to_vec3::<f64>()?; // [k, c, h·w]
    let pixels = |planes: &Vec<Vec<f64>>| {
        (0..planes[0].len()).map(|at| planes.iter().map(|plane| plane[at]).chain([1.0]).collect()).collect()
    };
    Ok(planes.iter().map(pixels).collect())
}

/// Random colours on a coarse grid, drawn together.
fn soft_colours(number: u64, side: u32) -> RgbImage {
    let mut rng = Rng::new(0, "latent colours", number);
    let grid = 4 + 2 * number as u32;
    let coarse = RgbImage::from_fn(grid, grid, |_, _| Rgb([0; 3].map(|_: u8| rng.below(256) as u8)));
    imageops::resize(&coarse, side, side, FilterType::CatmullRom)
}

/// The weights w with the least Σ(row·w − level)², by the normal equations; a touch of ridge for channels that say nothing.
fn least_squares(rows: &[Vec<f64>], levels: &[f64]) -> Vec<f64> {
    let n = rows.first().map_or(0, Vec::len);
    let mut system = vec![vec![0.0; n + 1]; n];
    for (row, level) in rows.iter().zip(levels) {
        for i in 0..n {
            for j in 0..n {
                system[i][j] += row[i] * row[j];
            }
            system[i][n] += row[i] * level;
        }
    }
    for (i, row) in system.iter_mut().enumerate() {
        row[i] += 1e-6 * rows.len() as f64;
    }
    // The matrix is positive definite: elimination needs no pivots.
    for i in 0..n {
        let pivot = system[i].clone();
        for (_, row) in system.iter_mut().enumerate().filter(|(other, _)| *other != i) {
            let factor = row[i] / pivot[i];
            row.iter_mut().zip(&pivot).for_each(|(value, pivot)| *value -= factor * pivot);
        }
    }
    (0..n).map(|i| system[i][n] / system[i][i]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{images_from_tensor, resized};
    use crate::device::Runtime;
    use crate::diffusion::Guidance;
    use crate::model::{Files, toybox};

    #[test]
    fn least_squares_finds_the_weights_of_exact_levels() {
        let mut rng = Rng::new(3, "preview test", 0);
        let rows: Vec<Vec<f64>> = (0..50).map(|_| vec![rng.normal(), rng.normal(), 1.0]).collect();
        let levels: Vec<f64> = rows.iter().map(|row| 20.0 * row[0] - 7.0 * row[1] + 128.0).collect();
        let found = least_squares(&rows, &levels);
        assert!(found.iter().zip([20.0, -7.0, 128.0]).all(|(a, b)| (a - b).abs() < 1e-3), "{found:?}");
    }

    /// Toys that the map was not fitted to: 8 to 14 % of the variance was left.
    #[test]
    fn a_preview_looks_like_the_picture() {
        let pipeline = Pipeline::load(&Files::Embedded(toybox::FILES), &Runtime::cpu(), true).unwrap();
        let settings = SampleSettings::new(Guidance::Joint { scale: 1.0 }, 1, 64);
        let colours = LatentColours::fit(&pipeline, &settings).unwrap();
        for name in ["robot", "bird", "cat", "mug"] {
            let path = format!("{}/configs/toybox/examples/{name}.png", env!("CARGO_MANIFEST_DIR"));
            let picture = image::open(path).unwrap().into_rgb8();
            let latents = pipeline.latents_of(std::slice::from_ref(&picture), &settings).unwrap();
            let decoded = images_from_tensor(&pipeline.vae.decode(&latents).unwrap()).unwrap();
            let preview = &colours.pictures(&latents).unwrap()[0];
            assert_eq!(preview.dimensions(), picture.dimensions());
            // Compared at the size of the latents: finer things cannot be in it.
            let (a, b) = (resized(preview, 16), resized(&decoded[0], 16));
            let levels =
                |image: &RgbImage| -> Vec<f64> { image.as_raw().iter().map(|&level| f64::from(level)).collect() };
            let (a, b) = (levels(&a), levels(&b));
            let mean = b.iter().sum::<f64>() / b.len() as f64;
            let left: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
            let all: f64 = b.iter().map(|b| (b - mean).powi(2)).sum();
            assert!(left < 0.25 * all, "{name}: {:.3} of the variance is left", left / all);
        }
    }
}

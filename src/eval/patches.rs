//! What the judge looks at: how strongly small patches of a picture resemble each of a few hundred typical patches,
//! averaged over the middle, the upper and the lower part of the picture.
//!
//! Averages over places make it blind to where exactly the toy stands; the patches hold its colours, which of them
//! touch, and the grain of its pattern. The scheme is the random-patch dictionary with soft threshold of Coates, Lee and
//! Ng, "An analysis of single-layer networks in unsupervised feature learning" (2011).

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use image::{RgbImage, imageops};
use rayon::prelude::*;

use super::cholesky::Cholesky;
use crate::ops::{self, Conv2d};
use crate::rng::Rng;

/// Pictures are compared at this many pixels a side; halving 64 takes most of the softness of generated pictures away.
const SIDE: usize = 32;
/// Pixels a side of a patch.
const PATCH: usize = 5;
const PATCH_VALUES: usize = PATCH * PATCH * 3;
/// Positions of a patch along a side.
const PLACES: usize = SIDE - PATCH + 1;
/// Pictures that go through the network at once.
const BATCH: usize = 16;

/// Patches that mean and covariance are taken from, 80 for each of their values.
const WHITENING_SAMPLE: usize = 6000;
/// Patches taken from one picture: scaling the picture is most of the work.
const PER_PICTURE: usize = 4;
/// Added to the patches' variances before whitening, in units of their mean variance: fine detail below it does not count.
const WHITENING_RIDGE: f64 = 0.1;
/// Resemblance below this counts as none (whitened patches have about unit variance in strong directions).
const THRESHOLD: f32 = 0.5;

/// Typical patches as a convolution: whitening and comparison in one.
pub struct Patches {
    /// `[filters, 3, PATCH, PATCH]`
    weight: Tensor,
    /// `[filters]`
    bias: Tensor,
    n_filters: usize,
    /// `[pools, PLACES²]`, each row sums to one.
    pools: Vec<Vec<f32>>,
}

impl Patches {
    /// Takes `n_filters` typical patches from random places of `images`.
    pub fn fit(images: &[RgbImage], n_filters: usize, rng: &mut Rng) -> Result<Self> {
        ensure!(!images.is_empty(), "judge: there are no pictures to fit to; draw some");
        let mut draw = |count: usize| {
            let mut patches = Vec::with_capacity(count + PER_PICTURE);
            while patches.len() < count {
                patches.extend(random_patches(rng.pick(images), rng));
            }
            patches.truncate(count);
            patches
        };
        let sample = draw(WHITENING_SAMPLE);
        let mean: Vec<f64> =
            (0..PATCH_VALUES).map(|i| sample.iter().map(|p| p[i]).sum::<f64>() / sample.len() as f64).collect();
        let factor = Cholesky::factor(add_ridge(covariance(&sample, &mean)), PATCH_VALUES)?;

        let (mut weight, mut bias) = (Vec::with_capacity(n_filters * PATCH_VALUES), Vec::with_capacity(n_filters));
        for patch in draw(n_filters) {
            // With the covariance L·Lᵀ, L⁻¹·(x − mean) is white. The typical patch t becomes a unit vector there; the
            // resemblance of x is its product with x there, so that as a filter on x itself it is L⁻ᵀ·L⁻¹·(t − mean).
            let mut filter: Vec<f64> = patch.iter().zip(&mean).map(|(v, m)| v - m).collect();
            factor.solve_lower(&mut filter);
            let norm = filter.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-9);
            filter.iter_mut().for_each(|v| *v /= norm);
            factor.solve_upper(&mut filter);
            bias.push(-filter.iter().zip(&mean).map(|(f, m)| f * m).sum::<f64>() as f32);
            weight.extend(filter.iter().map(|v| *v as f32));
        }
        let weight = Tensor::from_vec(weight, (n_filters, 3, PATCH, PATCH), &Device::Cpu)?;
        let bias = Tensor::from_vec(bias, n_filters, &Device::Cpu)?;
        Ok(Self { weight, bias, n_filters, pools: pools() })
    }

    /// Length of a feature vector: both signs of every filter in every pool.
    pub fn width(&self) -> usize {
        self.pools.len() * 2 * self.n_filters
    }

    /// # Shapes
    /// - k images → `[k, width]`
    pub fn features(&self, images: &[RgbImage]) -> Result<Tensor> {
        let mut features = Vec::with_capacity(images.len() * self.width());
        for batch in images.chunks(BATCH) {
            let small: Vec<f32> = batch.par_iter().flat_map_iter(small_picture).collect();
            let small = Tensor::from_vec(small, (batch.len(), SIDE, SIDE, 3), &Device::Cpu)?;
            let geometry = Conv2d { stride: 1, pad: [0; 4] };
            let responses = ops::conv2d(&small, &self.weight, Some(&self.bias), geometry)?; // [b, places, places, filters]
            let responses = responses.flatten_all()?.to_vec1::<f32>()?;
            let pooled: Vec<Vec<f32>> =
                responses.par_chunks(PLACES * PLACES * self.n_filters).map(|places| self.pool(places)).collect();
            pooled.iter().for_each(|row| features.extend_from_slice(row));
        }
        Ok(Tensor::from_vec(features, (images.len(), self.width()), &Device::Cpu)?)
    }

    /// Responses `[PLACES², filters]` of one picture → its features.
    fn pool(&self, responses: &[f32]) -> Vec<f32> {
        let n = self.n_filters;
        let mut sums = vec![0f32; self.width()];
        let mut rectified = vec![0f32; 2 * n];
        for (place, row) in responses.chunks_exact(n).enumerate() {
            let (positive, negative) = rectified.split_at_mut(n);
            for ((p, m), v) in positive.iter_mut().zip(negative).zip(row) {
                *p = (v - THRESHOLD).max(0.0);
                *m = (-v - THRESHOLD).max(0.0);
            }
            for (pool, sums) in self.pools.iter().zip(sums.chunks_exact_mut(2 * n)) {
                let share = pool[place];
                if share > 0.0 {
                    sums.iter_mut().zip(&rectified).for_each(|(sum, v)| *sum += share * v);
                }
            }
        }
        // The root keeps a patch type that is all over the background from outshouting the rare ones.
        sums.iter_mut().for_each(|v| *v = v.sqrt());
        sums
    }
}

/// The picture at SIDE pixels, channel-last, 0 to 1.
fn small_picture(image: &RgbImage) -> Vec<f32> {
    let side = SIDE as u32;
    let small = imageops::resize(image, side, side, imageops::FilterType::Triangle);
    small.into_raw().into_iter().map(|v| v as f32 / 255.0).collect()
}

/// Patches of `image` in the order of a convolution's weight, `[3, PATCH, PATCH]` each.
fn random_patches(image: &RgbImage, rng: &mut Rng) -> Vec<Vec<f64>> {
    let small = small_picture(image);
    let mut patch = || {
        let (left, top) = (rng.below(PLACES), rng.below(PLACES));
        let places = (0..3).flat_map(|c| (0..PATCH * PATCH).map(move |i| (c, left + i % PATCH, top + i / PATCH)));
        places.map(|(c, x, y)| small[(y * SIDE + x) * 3 + c] as f64).collect()
    };
    (0..PER_PICTURE).map(|_| patch()).collect()
}

fn covariance(sample: &[Vec<f64>], mean: &[f64]) -> Vec<f64> {
    let n = mean.len();
    let mut sums = vec![0.0; n * n];
    for patch in sample {
        let centred: Vec<f64> = patch.iter().zip(mean).map(|(v, m)| v - m).collect();
        for (row, a) in sums.chunks_exact_mut(n).zip(&centred) {
            row.iter_mut().zip(&centred).for_each(|(sum, b)| *sum += a * b);
        }
    }
    sums.iter_mut().for_each(|v| *v /= sample.len() as f64);
    sums
}

fn add_ridge(mut covariance: Vec<f64>) -> Vec<f64> {
    let diagonal = || (0..PATCH_VALUES).map(|i| i * PATCH_VALUES + i);
    let variance = diagonal().map(|at| covariance[at]).sum::<f64>() / PATCH_VALUES as f64;
    // Pictures of one colour have no variance at all; the tiny constant keeps the matrix definite.
    diagonal().for_each(|at| covariance[at] += WHITENING_RIDGE * variance + 1e-9);
    covariance
}

/// The middle, where the toy stands; the upper and the lower part, which tell scenes apart.
fn pools() -> Vec<Vec<f32>> {
    let weigh = |weight: &dyn Fn(f64, f64) -> f64| {
        let share = |i: usize| (i as f64 + 0.5) / PLACES as f64;
        let weights: Vec<f64> = (0..PLACES * PLACES).map(|i| weight(share(i % PLACES), share(i / PLACES))).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|w| (w / total) as f32).collect()
    };
    vec![
        weigh(&|x, y| (-((x - 0.5).powi(2) + (y - 0.55).powi(2)) / (2.0 * 0.2f64.powi(2))).exp()),
        weigh(&|_, y| if y < 0.5 { 1.0 } else { 0.0 }),
        weigh(&|_, y| if y < 0.5 { 0.0 } else { 1.0 }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(count: usize) -> Vec<RgbImage> {
        let mut rng = Rng::new(4, "patches test", 0);
        let mut picture = || RgbImage::from_fn(64, 64, |_, _| image::Rgb([0; 3].map(|_: u8| rng.below(256) as u8)));
        (0..count).map(|_| picture()).collect()
    }

    #[test]
    fn every_pool_is_an_average() {
        for pool in pools() {
            assert!((pool.iter().sum::<f32>() - 1.0).abs() < 1e-4);
        }
    }

    #[test]
    fn features_do_not_depend_on_the_batch() {
        let images = noise(BATCH + 3);
        let patches = Patches::fit(&images, 12, &mut Rng::new(1, "patches test", 0)).unwrap();
        let all = patches.features(&images).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(all[0].len(), patches.width());
        for index in [0, BATCH + 1] {
            let alone = patches.features(&images[index..=index]).unwrap().to_vec2::<f32>().unwrap();
            let error = alone[0].iter().zip(&all[index]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error < 1e-5, "picture {index}: {error}");
        }
    }

    #[test]
    fn pictures_of_one_colour_have_features() {
        let flat = [RgbImage::from_pixel(64, 64, image::Rgb([7, 8, 9]))];
        let patches = Patches::fit(&flat, 4, &mut Rng::new(1, "patches test", 0)).unwrap();
        let features = patches.features(&flat).unwrap().to_vec2::<f32>().unwrap();
        assert!(features[0].iter().all(|v| v.is_finite()));
    }
}

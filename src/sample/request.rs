//! What is asked of a model, and what comes back.

use candle_core::Tensor;
use image::{GrayImage, RgbImage};

use crate::diffusion::{Guidance, Restraint, Sampler};

/// A known picture of a set.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Square, of the size that is sampled.
    pub image: RgbImage,
    /// Empty: the null text.
    pub caption: String,
    /// How strongly the other pictures of the set attend to it: 1 as they would, 0 not at all.
    pub weight: f64,
    /// Of the picture's size: only what is white here is attended to; None: all of it.
    pub mask: Option<GrayImage>,
}

impl Reference {
    /// A picture that is attended to as the network would.
    pub fn new(image: RgbImage, caption: impl Into<String>) -> Self {
        Self { image, caption: caption.into(), weight: 1.0, mask: None }
    }
}

/// One set to paint: references first, then one picture a prompt.
#[derive(Clone, Debug)]
pub struct SetRequest {
    /// Known images, in this order.
    pub references: Vec<Reference>,
    /// One a new image.
    pub prompts: Vec<String>,
    /// The new images' text in the branches without text; empty: the null text, which the references keep in any case.
    pub negative_prompt: String,
    /// One a prompt: a picture depends on its own seed, not on its batch.
    pub seeds: Vec<u64>,
}

/// How pictures are sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleSettings {
    /// How one noise level follows another.
    pub sampler: Sampler,
    /// Network calls a picture.
    pub steps: usize,
    /// What the predictions are pushed towards.
    pub guidance: Guidance,
    /// What keeps the push in bounds.
    pub restraint: Restraint,
    /// Side of the pictures in pixels.
    pub size: usize,
    /// Branches, sets and pictures go through the networks one after the other: the least memory, the same numbers but for
    /// the rounding of sums.
    pub is_frugal: bool,
    /// Side of the tiles, in pixels, in which pictures go through the autoencoder; None: whole.
    pub vae_tile: Option<usize>,
}

impl SampleSettings {
    /// The plain way: DDIM, without restraint, as much at once as goes well.
    pub fn new(guidance: Guidance, steps: usize, size: usize) -> Self {
        Self {
            sampler: Sampler::Ddim,
            steps,
            guidance,
            restraint: Restraint::default(),
            size,
            is_frugal: false,
            vae_tile: None,
        }
    }
}

/// How often a picture with a known part is painted: each round after the first begins with the picture so far under new noise,
/// and what does not fit the known part goes (resampling: RePaint, Lugmayr et al. 2022).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rounds {
    /// 1: once.
    pub count: usize,
    /// How deep under noise a further round begins, as a share of the noise schedule: 1 is all noise.
    pub from: f64,
}

impl Rounds {
    /// Painted once.
    pub const ONE: Self = Self { count: 1, from: 1.0 };
}

/// The generated pictures of all sets, in the order of the requests.
pub struct Painted {
    /// The new pictures, in the order of the prompts.
    pub images: Vec<RgbImage>,
    /// As the U-Net left them, `[k, c, h, w]`.
    pub latents: Tensor,
}

//! What is asked of a model, and what comes back.

use candle_core::Tensor;
use image::RgbImage;

use crate::diffusion::{Guidance, Sampler};

/// A known picture of a set.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Square, of the size that is sampled.
    pub image: RgbImage,
    /// Empty: the null text.
    pub caption: String,
}

/// One set to paint: references first, then one picture a prompt.
#[derive(Clone, Debug)]
pub struct SetRequest {
    /// Known images, in this order.
    pub references: Vec<Reference>,
    /// One a new image.
    pub prompts: Vec<String>,
    /// One a prompt: a picture depends on its own seed, not on its batch (but for the rounding of large sums).
    pub seeds: Vec<u64>,
}

/// How pictures are sampled.
#[derive(Clone, Debug)]
pub struct SampleSettings {
    /// How one noise level follows another.
    pub sampler: Sampler,
    /// Network calls a picture.
    pub steps: usize,
    /// What the predictions are pushed towards.
    pub guidance: Guidance,
    /// Side of the pictures in pixels.
    pub size: usize,
}

/// The generated pictures of all sets, in the order of the requests.
pub struct Painted {
    /// The new pictures, in the order of the prompts.
    pub images: Vec<RgbImage>,
    /// As the U-Net left them, `[k, c, h, w]`.
    pub latents: Tensor,
}

//! Painting many sets: how many go through the networks at once, and latents to pictures.

use anyhow::{Context as _, Result};
use candle_core::Tensor;
use image::RgbImage;

use super::noise::GivenNoise;
use super::pipeline::Pipeline;
use super::request::{Painted, SampleSettings, SetRequest};
use crate::data::{images_from_tensor, tensor_from_images};

/// Latent pixels (images · branches · h · w) that go through the U-Net at once: two sets of one reference and one target
/// at 512².
const LATENT_PIXELS_A_BATCH: usize = 32_768;

impl Pipeline {
    /// Paints sets of one shape. `on_step` hears of every step done, out of [`Pipeline::steps_of`]; its error ends the
    /// painting. `given` holds the noise of all targets of all requests, in their order.
    pub fn paint(
        &self,
        requests: &[SetRequest],
        settings: &SampleSettings,
        given: Option<&GivenNoise>,
        on_step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Painted> {
        let size = settings.size;
        self.check_size(size)?;
        let first = requests.first().context("nothing to paint: no set was asked for")?;
        let (n_references, n_targets) = (first.references.len(), first.prompts.len());
        if let Some(given) = given {
            let targets = requests.len() * n_targets;
            given.validate(targets, n_references, settings.steps, self.latent_shape(size))?;
        }
        let mut latents = Vec::new();
        let mut painted = 0;
        for batch in requests.chunks(self.sets_at_once(requests, settings)) {
            let own = given.map(|given| given.of_targets(painted, batch.len() * n_targets)).transpose()?;
            latents.push(self.paint_batch(batch, settings, own.as_ref(), on_step)?);
            painted += batch.len() * n_targets;
        }
        let latents = Tensor::cat(&latents, 0)?; // [k, c, h, w]
        Ok(Painted { images: self.decode(&latents, size)?, latents })
    }

    /// Pictures of `size` pixels through the VAE and back: as good as any picture that this model paints can be.
    pub fn reconstruct(&self, images: &[RgbImage], size: usize) -> Result<Vec<RgbImage>> {
        let mut seen = Vec::with_capacity(images.len());
        for some in images.chunks(Self::images_at_once(size)) {
            let pixels = tensor_from_images(some, &self.runtime.device)?.to_dtype(self.runtime.dtype)?;
            seen.extend(self.decode(&self.vae.latents_from_images(&pixels)?, size)?);
        }
        Ok(seen)
    }

    fn decode(&self, latents: &Tensor, size: usize) -> Result<Vec<RgbImage>> {
        let (k, at_once) = (latents.dim(0)?, Self::images_at_once(size));
        let mut images = Vec::with_capacity(k);
        for first in (0..k).step_by(at_once) {
            let some = latents.narrow(0, first, at_once.min(k - first))?.contiguous()?;
            images.extend(images_from_tensor(&self.vae.decode(&some.to_dtype(self.runtime.dtype)?)?)?);
        }
        Ok(images)
    }

    /// How many pictures of `size` pixels go through the VAE together.
    fn images_at_once(size: usize) -> usize {
        (64 * 64 * 64 / (size * size)).max(1)
    }

    /// Steps that [`Pipeline::paint`] will report.
    pub fn steps_of(&self, requests: &[SetRequest], settings: &SampleSettings) -> usize {
        requests.len().div_ceil(self.sets_at_once(requests, settings)) * settings.steps
    }

    /// How many of the sets go through the network together.
    pub fn sets_at_once(&self, requests: &[SetRequest], settings: &SampleSettings) -> usize {
        let images = requests.first().map_or(1, |set| set.references.len() + set.prompts.len());
        let side = settings.size / self.vae.config().downscale();
        (LATENT_PIXELS_A_BATCH / (images * settings.guidance.branches().len() * side * side).max(1)).max(1)
    }
}

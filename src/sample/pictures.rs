//! Pictures through the autoencoder, as many at once as the memory for one large one holds.

use anyhow::Result;
use candle_core::{DType, Tensor};
use image::RgbImage;

use super::pipeline::Pipeline;
use super::request::SampleSettings;
use crate::data::{images_from_tensor, tensor_from_images};
use crate::invalid::invalid;

impl Pipeline {
    /// Clean latents of pictures of one size, f32.
    ///
    /// # Shapes
    /// - k pictures → `[k, c, h, w]`
    pub fn latents_of(&self, images: &[RgbImage], settings: &SampleSettings) -> Result<Tensor> {
        let mut latents = Vec::new();
        for some in images.chunks(at_once(settings)) {
            latents.push(self.encoded(&tensor_from_images(some, &self.runtime.device)?, settings)?);
        }
        Ok(Tensor::cat(&latents, 0)?)
    }

    /// Clean latents of a picture that is masked out all over, as networks for inpainting are trained with: mid-grey, the 0
    /// of their pixels.
    ///
    /// # Shapes
    /// - returns `[1, c, h, w]`
    pub(super) fn masked_latents(&self, settings: &SampleSettings) -> Result<Tensor> {
        let side = settings.size;
        self.latents_of_pixels(&Tensor::zeros((1, 3, side, side), DType::F32, &self.runtime.device)?, settings)
    }

    /// The same of pictures as numbers in [−1, 1].
    ///
    /// # Shapes
    /// - pixels `[k, 3, h, w]` → `[k, c, h, w]`
    pub(super) fn latents_of_pixels(&self, pixels: &Tensor, settings: &SampleSettings) -> Result<Tensor> {
        let some = |pixels: Tensor| self.encoded(&pixels, settings);
        let latents = pieces(pixels, at_once(settings))?.into_iter().map(some).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&latents, 0)?)
    }

    fn encoded(&self, pixels: &Tensor, settings: &SampleSettings) -> Result<Tensor> {
        let pixels = pixels.to_dtype(self.vae_dtype)?;
        let latents = match settings.vae_tile {
            Some(tile) => self.vae.latents_in_tiles(&pixels, tile)?,
            None => self.vae.latents_from_images(&pixels)?,
        };
        Ok(latents.to_dtype(DType::F32)?)
    }

    /// The pictures that latents stand for.
    ///
    /// # Shapes
    /// - latents `[k, c, h, w]` → k pictures
    pub fn pictures_of(&self, latents: &Tensor, settings: &SampleSettings) -> Result<Vec<RgbImage>> {
        let mut images = Vec::with_capacity(latents.dim(0)?);
        for some in pieces(latents, at_once(settings))? {
            images.extend(images_from_tensor(&self.decoded(&some, settings)?)?);
        }
        Ok(images)
    }

    /// The same as numbers, in [−1, 1] and a little beyond, f32.
    ///
    /// # Shapes
    /// - latents `[k, c, h, w]` → `[k, 3, h, w]`
    pub(super) fn pixels_of(&self, latents: &Tensor, settings: &SampleSettings) -> Result<Tensor> {
        let some = |latents: Tensor| Ok(self.decoded(&latents, settings)?.to_dtype(DType::F32)?);
        let pixels = pieces(latents, at_once(settings))?.into_iter().map(some).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&pixels, 0)?)
    }

    fn decoded(&self, latents: &Tensor, settings: &SampleSettings) -> Result<Tensor> {
        let latents = latents.to_dtype(self.vae_dtype)?;
        Ok(match settings.vae_tile {
            Some(tile) => self.vae.decode_in_tiles(&latents, tile)?,
            None => self.vae.decode(&latents)?,
        })
    }

    /// Pictures of the settings' size through the autoencoder and back: as good as any picture that this model paints can
    /// be.
    pub fn reconstruct(&self, images: &[RgbImage], settings: &SampleSettings) -> Result<Vec<RgbImage>> {
        self.pictures_of(&self.latents_of(images, settings)?, settings)
    }

    /// The tile that the autoencoder works in for pictures of `size` pixels: `asked`, or its own where the memory is to be
    /// spared; None where the whole picture is no larger, or 0 was asked for.
    pub fn vae_tile(&self, size: usize, asked: Option<usize>, is_frugal: bool) -> Result<Option<usize>> {
        let multiple = self.vae.tile_multiple();
        let own = || is_frugal.then(|| self.vae.native_tile().next_multiple_of(multiple));
        let Some(tile) = asked.or_else(own).filter(|&tile| tile > 0) else { return Ok(None) };
        if !tile.is_multiple_of(multiple) {
            let near = tile.next_multiple_of(multiple);
            return Err(invalid(format!(
                "--vae-tile {tile}: this model takes multiples of {multiple} pixels, such as {near}, or 0 for no tiles"
            )));
        }
        Ok((tile < size).then_some(tile))
    }
}

/// At most `at_once` pictures each.
///
/// # Shapes
/// - all `[k, …]` → `[at_once, …]` …, the last perhaps fewer
fn pieces(all: &Tensor, at_once: usize) -> Result<Vec<Tensor>> {
    let k = all.dim(0)?;
    let piece = |first| Ok(all.narrow(0, first, at_once.min(k - first))?.contiguous()?);
    (0..k).step_by(at_once).map(piece).collect()
}

/// How many pictures go through the autoencoder together.
fn at_once(settings: &SampleSettings) -> usize {
    let side = settings.vae_tile.unwrap_or(settings.size);
    if settings.is_frugal { 1 } else { (64 * 64 * 64 / (side * side)).max(1) }
}

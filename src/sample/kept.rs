//! Painting around what is known of a picture. A network for inpainting is given the known pixels beside its noisy latents, as
//! diffusers gives them. With any other it is the replacement trick (§3.3) by pixels: at every step the picture that the
//! network sees in the noise is decoded, its known pixels are put back, and it is encoded again; the walk goes on towards that.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use image::{GrayImage, RgbImage};

use super::noise::GivenNoise;
use super::pipeline::Pipeline;
use super::request::{Painted, Rounds, SampleSettings, SetRequest};
use crate::data::tensor_from_images;
use crate::diffusion::Level;
use crate::model::Family;
use crate::shape::SetShape;

/// A picture of which a part is known.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Of the size that is sampled.
    pub image: RgbImage,
    /// Of that size too, 255 where the picture is known.
    pub mask: GrayImage,
}

impl Pipeline {
    /// Paints sets of one new picture each, without references; `kept` says what is known of each. `rounds` are for the
    /// replacement trick alone: a network for inpainting sees the known part from the beginning. `on_step` hears of every
    /// step done; its error ends the painting. `given` holds the noise of all pictures, in their order. On the CPU a picture has
    /// the same bits in any batch. The known part comes back as network and autoencoder leave it.
    pub fn inpaint(
        &self,
        requests: &[SetRequest],
        kept: &[Kept],
        settings: &SampleSettings,
        rounds: Rounds,
        given: Option<&GivenNoise>,
        on_step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Painted> {
        ensure!(requests.len() == kept.len() && !kept.is_empty(), "one known part a picture, at least one");
        for (request, kept) in requests.iter().zip(kept) {
            ensure!(
                request.references.is_empty() && request.prompts.len() == 1 && request.seeds.len() == 1,
                "a picture with a known part is a set of its own, without references"
            );
            let side = settings.size as u32;
            ensure!(
                kept.image.dimensions() == (side, side) && kept.mask.dimensions() == (side, side),
                "a known part must have {side} pixels a side"
            );
        }
        self.in_batches(requests, settings, given, &mut |batch, given| {
            let (requests, kept) = (&requests[batch.clone()], &kept[batch]);
            match self.family {
                Family::Inpainting => {
                    let conditions = self.conditions_beside(requests, &self.masked(kept, settings)?, settings)?;
                    let mut revise = |_: Level, _: &Tensor, output: Tensor| on_step().map(|()| output);
                    self.paint_alone(requests, &conditions, settings, given, Rounds::ONE, &mut revise)
                }
                _ => self.replace(requests, kept, settings, rounds, given, on_step),
            }
        })
    }

    /// By the replacement trick, `[b, c, h, w]`.
    fn replace(
        &self,
        requests: &[SetRequest],
        kept: &[Kept],
        settings: &SampleSettings,
        rounds: Rounds,
        given: Option<&GivenNoise>,
        on_step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Tensor> {
        let conditions = self.conditions(requests, SetShape::new(requests.len(), 1), None, settings)?;
        let known = Known::new(self, kept)?;
        let prediction = self.schedule.config().prediction_type;
        let mut revise = |level: Level, x: &Tensor, output: Tensor| -> Result<Tensor> {
            on_step()?;
            let (clean, _) = prediction.clean_and_noise(level.alpha, x, &output.to_dtype(DType::F32)?)?;
            let clean = known.put_back(self, &clean, settings)?;
            Ok(prediction.output_for(level.alpha, x, &clean)?)
        };
        self.paint_alone(requests, &conditions, settings, given, rounds, &mut revise)
    }

    /// Mask and masked picture as a network for inpainting is given them in all branches: known is what is more than half
    /// white, the mask at the latents' size is that of each latent's first pixel, what is not known is grey (diffusers
    /// `StableDiffusionInpaintPipeline`).
    ///
    /// # Shapes
    /// - b known parts → `[branches·b, 1 + c, h, w]`
    fn masked(&self, kept: &[Kept], settings: &SampleSettings) -> Result<Tensor> {
        let (device, b) = (&self.runtime.device, kept.len());
        let (_, h, w) = self.latent_shape(settings.size);
        let f = (settings.size / h) as u32;
        let is_known = |kept: &Kept, x: u32, y: u32| kept.mask.get_pixel(x, y).0[0] > 127;
        let mut mask = Vec::with_capacity(b * h * w);
        for kept in kept {
            for y in 0..h as u32 {
                mask.extend((0..w as u32).map(|x| if is_known(kept, x * f, y * f) { 0f32 } else { 1.0 }));
            }
        }
        let mask = Tensor::from_vec(mask, (b, 1, h, w), device)?;
        let known = Known::by(self, kept, |level| if level > 127 { 1.0 } else { 0.0 })?;
        let channels = Tensor::cat(&[&mask, &self.latents_of_pixels(&known.pixels, settings)?], 1)?;
        Ok(Tensor::cat(&vec![&channels; settings.guidance.branches().len()], 0)?)
    }
}

/// The known pixels of a batch.
struct Known {
    /// `[b, 3, h, w]` in [−1, 1], 0 where nothing is known.
    pixels: Tensor,
    /// `[b, 1, h, w]`, 1 where nothing is known.
    unknown: Tensor,
}

impl Known {
    fn new(pipeline: &Pipeline, kept: &[Kept]) -> Result<Self> {
        Self::by(pipeline, kept, |level| f32::from(level) / 255.0)
    }

    /// As far as `share` of the mask's level says.
    fn by(pipeline: &Pipeline, kept: &[Kept], share: impl Fn(u8) -> f32) -> Result<Self> {
        let device = &pipeline.runtime.device;
        let images: Vec<RgbImage> = kept.iter().map(|kept| kept.image.clone()).collect();
        let pixels = tensor_from_images(&images, device)?; // [b, 3, h, w]
        let (b, _, h, w) = pixels.dims4()?;
        let mask = kept.iter().flat_map(|kept| kept.mask.pixels().map(|pixel| share(pixel.0[0])));
        let mask = Tensor::from_vec(mask.collect::<Vec<f32>>(), (b, 1, h, w), device)?;
        Ok(Self { pixels: pixels.broadcast_mul(&mask)?, unknown: (1.0 - mask)? })
    }

    /// # Shapes
    /// - latents `[b, c, h, w]` → latents of the pictures with their known pixels, of that shape
    fn put_back(&self, pipeline: &Pipeline, latents: &Tensor, settings: &SampleSettings) -> Result<Tensor> {
        let pictures = pipeline.pixels_of(latents, settings)?.clamp(-1.0, 1.0)?;
        let mixed = (pictures.broadcast_mul(&self.unknown)? + &self.pixels)?; // [b, 3, h, w]
        pipeline.latents_of_pixels(&mixed, settings)
    }
}

//! Painting around what is known of a picture, with a model that was not made for it: the replacement trick (§3.3) by pixels.
//! At every step the picture that the network sees in the noise is decoded, its known pixels are put back, and it is encoded
//! again; the walk goes on towards that.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use image::{GrayImage, RgbImage};

use super::noise::BatchNoise;
use super::pipeline::Pipeline;
use super::request::{Painted, SampleSettings, SetRequest};
use crate::data::tensor_from_images;
use crate::diffusion::Level;
use crate::ops::alike_in_any_batch;
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
    /// Paints sets of one new picture each, without references; `kept` says what is known of each. On the CPU a picture has
    /// the same bits in any batch. The known part comes back as the autoencoder leaves it.
    pub fn inpaint(&self, requests: &[SetRequest], kept: &[Kept], settings: &SampleSettings) -> Result<Painted> {
        self.check_size(settings.size)?;
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
        let at_once = self.sets_at_once(requests, settings);
        let batches = requests.chunks(at_once).zip(kept.chunks(at_once));
        alike_in_any_batch(|| {
            let latents = batches.map(|(requests, kept)| self.inpaint_batch(requests, kept, settings));
            let latents = Tensor::cat(&latents.collect::<Result<Vec<_>>>()?, 0)?; // [k, c, h, w]
            Ok(Painted { images: self.pictures_of(&latents, settings)?, latents })
        })
    }

    /// The final latents, `[b, c, h, w]`.
    fn inpaint_batch(&self, requests: &[SetRequest], kept: &[Kept], settings: &SampleSettings) -> Result<Tensor> {
        let device = &self.runtime.device;
        let shape = SetShape::new(requests.len(), 1);
        let seeds: Vec<&[u64]> = requests.iter().map(|set| set.seeds.as_slice()).collect();
        let noise = BatchNoise { seeds: &seeds, references: 0, latent: self.latent_shape(settings.size), given: None };
        let conditions = self.conditions(requests, shape, None, settings)?;
        let known = Known::new(self, kept)?;
        let walk = settings.sampler.walk(&self.schedule, settings.steps)?;
        let prediction = self.schedule.config().prediction_type;
        let mut predict = |_: usize, level: Level, x: &Tensor| -> Result<Tensor> {
            let predictions = self.predict(x, level, &conditions, shape, settings)?;
            let output = settings.restraint.combine(settings.guidance, &predictions)?.to_dtype(DType::F32)?;
            let (clean, _) = prediction.clean_and_noise(level.alpha, x, &output)?;
            let clean = known.put_back(self, &clean, settings)?;
            Ok(prediction.output_for(level.alpha, x, &clean)?)
        };
        walk.run(&noise.start(device)?, &mut predict, &mut |step| noise.fresh_at(step, device))
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
        let device = &pipeline.runtime.device;
        let images: Vec<RgbImage> = kept.iter().map(|kept| kept.image.clone()).collect();
        let pixels = tensor_from_images(&images, device)?; // [b, 3, h, w]
        let (b, _, h, w) = pixels.dims4()?;
        let mask = kept.iter().flat_map(|kept| kept.mask.pixels().map(|pixel| f32::from(pixel.0[0]) / 255.0));
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

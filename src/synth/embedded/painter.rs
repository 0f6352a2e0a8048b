//! A jedi or Stable Diffusion model as a painter of scenes around a thing, by the replacement trick: at every step the known
//! part of the picture is put back at its noise level, and only the rest is the model's.

use anyhow::Result;
use image::RgbImage;

use crate::diffusion::Guidance;
use crate::sample::{Kept, Pipeline, SampleSettings, SetRequest};
use crate::synth::stage::{Answers, InpaintAsk, Inpainter};

/// Goes up when the pictures change.
pub const VERSION: u32 = 1;

/// Paints with a pipeline.
pub struct PipelinePainter {
    pipeline: Pipeline,
    settings: SampleSettings,
}

impl PipelinePainter {
    /// Paints in the pipeline's own size.
    pub fn new(pipeline: Pipeline, steps: usize, guidance: f64) -> Self {
        let size = pipeline.native_size();
        Self { pipeline, settings: SampleSettings::new(Guidance::Joint { scale: guidance }, steps, size) }
    }

    fn painted(&self, asks: &[InpaintAsk]) -> Result<Vec<RgbImage>> {
        let requests: Vec<SetRequest> = asks
            .iter()
            .map(|ask| SetRequest {
                references: vec![],
                prompts: vec![ask.prompt.to_owned()],
                negative_prompt: String::new(),
                seeds: vec![ask.seed],
            })
            .collect();
        let kept: Vec<Kept> =
            asks.iter().map(|ask| Kept { image: ask.image.clone(), mask: ask.known.clone() }).collect();
        Ok(self.pipeline.inpaint(&requests, &kept, &self.settings)?.images)
    }
}

impl Inpainter for PipelinePainter {
    fn size(&self) -> u32 {
        self.settings.size as u32
    }

    fn inpainted(&mut self, asks: &[InpaintAsk]) -> Answers<RgbImage> {
        match self.painted(asks) {
            Ok(pictures) => pictures.into_iter().map(Ok).collect(),
            // One bad ask must not cost the others their pictures.
            Err(_) if asks.len() > 1 => asks.chunks(1).flat_map(|ask| self.inpainted(ask)).collect(),
            Err(error) => vec![Err(error)],
        }
    }
}

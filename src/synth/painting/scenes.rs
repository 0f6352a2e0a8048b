//! A jedi or Stable Diffusion model as a painter of scenes around a thing: one for inpainting is given what is known beside its
//! noise, with any other the known part of the picture is put back at every step (the replacement trick), and only the rest is
//! the model's.

use anyhow::Result;
use image::RgbImage;

use super::{Manner, OnStep, each};
use crate::interrupt::Interrupt;
use crate::sample::{Kept, Pipeline, Rounds, SampleSettings, SetRequest};
use crate::synth::stage::{Answers, InpaintAsk, Inpainter};

/// Goes up when the pictures change.
pub const VERSION: u32 = 1;

/// Paints with a pipeline.
pub struct PipelinePainter {
    pipeline: Pipeline,
    settings: SampleSettings,
    rounds: Rounds,
    interrupt: Interrupt,
}

impl PipelinePainter {
    /// Paints pictures of `size` pixels; `rounds` are for the replacement trick.
    pub fn new(pipeline: Pipeline, manner: Manner, rounds: Rounds, size: usize, interrupt: Interrupt) -> Self {
        Self { pipeline, settings: manner.at(size), rounds, interrupt }
    }

    fn painted(&self, asks: &[InpaintAsk], on_step: OnStep) -> Result<Vec<RgbImage>> {
        let request = |ask: &InpaintAsk| SetRequest {
            references: vec![],
            prompts: vec![ask.prompt.to_owned()],
            negative_prompt: String::new(),
            seeds: vec![ask.seed],
        };
        let requests: Vec<SetRequest> = asks.iter().map(request).collect();
        let kept: Vec<Kept> =
            asks.iter().map(|ask| Kept { image: ask.image.clone(), mask: ask.known.clone() }).collect();
        Ok(self.pipeline.inpaint(&requests, &kept, &self.settings, self.rounds, None, on_step)?.images)
    }
}

impl Inpainter for PipelinePainter {
    fn size(&self) -> u32 {
        self.settings.size as u32
    }

    fn inpainted(&mut self, asks: &[InpaintAsk]) -> Answers<RgbImage> {
        each(&self.interrupt, asks, &mut |asks, on_step| self.painted(asks, on_step))
    }
}

//! A text-to-image model as a painter of collages.

use anyhow::Result;
use image::RgbImage;

use super::{Manner, OnStep, each};
use crate::interrupt::Interrupt;
use crate::sample::{Pipeline, SampleSettings, SetRequest};
use crate::synth::stage::{Answers, Collage, CollageAsk, CollagePainter};

/// Goes up when the pictures change.
pub const VERSION: u32 = 1;

/// Paints what the prompt says. What a collage shows nobody knows then.
pub struct CollageModel {
    pipeline: Pipeline,
    settings: SampleSettings,
    interrupt: Interrupt,
}

impl CollageModel {
    /// Paints pictures of `size` pixels.
    pub fn new(pipeline: Pipeline, manner: Manner, size: usize, interrupt: Interrupt) -> Self {
        Self { pipeline, settings: manner.at(size), interrupt }
    }

    fn painted(&self, asks: &[CollageAsk], on_step: OnStep) -> Result<Vec<RgbImage>> {
        let request = |ask: &CollageAsk| SetRequest {
            references: vec![],
            prompts: vec![ask.prompt.to_owned()],
            negative_prompt: String::new(),
            seeds: vec![ask.seed],
        };
        let requests: Vec<SetRequest> = asks.iter().map(request).collect();
        Ok(self.pipeline.paint(&requests, &self.settings, None, on_step)?.images)
    }
}

impl CollagePainter for CollageModel {
    fn collages(&mut self, asks: &[CollageAsk]) -> Answers<Collage> {
        let pictures = each(&self.interrupt, asks, &mut |asks, on_step| self.painted(asks, on_step));
        pictures.into_iter().map(|picture| Ok(Collage { image: picture?, truth: None })).collect()
    }
}

//! What is asked, with every default filled in: the settings that the library samples with.

use anyhow::Result;

use super::asked::Asked;
use super::plan::Run;
use super::record::RecordedGuidance;
use crate::cli;
use crate::commands::steering::Steering;
use crate::diffusion::{Guidance, Restraint, Sampler};
use crate::sample::{Pipeline, SampleSettings};

/// The settings of a wish; `model_scale` is the model's own.
pub fn settings(asked: &Asked, run: &Run, pipeline: &Pipeline, model_scale: f64) -> Result<SampleSettings> {
    let size = asked.size.unwrap_or(pipeline.native_size());
    pipeline.check_size(size)?;
    Ok(SampleSettings {
        is_frugal: run.is_frugal,
        vae_tile: pipeline.vae_tile(size, run.vae_tile, run.is_frugal)?,
        ..Steering::new(&asked.steering(), model_scale)?.at(size)
    })
}

/// The sampler as the flags name it, and whether its levels are Karras's.
pub fn recorded_sampler(sampler: Sampler) -> (cli::Sampler, bool) {
    match sampler {
        Sampler::Ddim => (cli::Sampler::Ddim, false),
        Sampler::DpmSolver { is_karras } => (cli::Sampler::DpmSolver, is_karras),
        Sampler::Euler { is_karras } => (cli::Sampler::Euler, is_karras),
        Sampler::EulerAncestral => (cli::Sampler::EulerAncestral, false),
        Sampler::UniPc { is_karras } => (cli::Sampler::UniPc, is_karras),
    }
}

/// The guidance as the flags name it.
pub fn recorded_guidance(settings: &SampleSettings) -> RecordedGuidance {
    let (kind, scale, text_scale, image_scale) = match settings.guidance {
        Guidance::Joint { scale } => (cli::Guidance::Joint, Some(scale), None, None),
        Guidance::TextOnly { scale } => (cli::Guidance::TextOnly, Some(scale), None, None),
        Guidance::TextFirst { text_scale, image_scale } => {
            (cli::Guidance::TextFirst, None, Some(text_scale), Some(image_scale))
        }
        Guidance::ImageFirst { text_scale, image_scale } => {
            (cli::Guidance::ImageFirst, None, Some(text_scale), Some(image_scale))
        }
    };
    let Restraint { is_normalised: normalised, rescale } = settings.restraint;
    RecordedGuidance { kind, scale, text_scale, image_scale, normalised, rescale }
}

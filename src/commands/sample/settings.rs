//! What is asked, with every default filled in: the settings that the library samples with.

use anyhow::Result;

use super::asked::Asked;
use super::plan::Run;
use super::record::RecordedGuidance;
use crate::cli;
use crate::diffusion::{Guidance, Restraint, Sampler};
use crate::invalid::invalid;
use crate::sample::{Pipeline, SampleSettings};

const STEPS: usize = 30;

/// The settings of a wish; `model_scale` is the model's own.
pub fn settings(asked: &Asked, run: &Run, pipeline: &Pipeline, model_scale: f64) -> Result<SampleSettings> {
    let size = asked.size.unwrap_or(pipeline.native_size());
    pipeline.check_size(size)?;
    Ok(SampleSettings {
        sampler: sampler(asked)?,
        steps: asked.steps.unwrap_or(STEPS),
        guidance: guidance(asked, model_scale)?,
        restraint: restraint(asked)?,
        size,
        is_frugal: run.is_frugal,
        vae_tile: pipeline.vae_tile(size, run.vae_tile, run.is_frugal)?,
    })
}

/// The sampler that is asked for.
pub fn sampler(asked: &Asked) -> Result<Sampler> {
    let is_karras = asked.karras.unwrap_or(false);
    let sampler = match asked.sampler.unwrap_or_default() {
        cli::Sampler::DpmSolver => Sampler::DpmSolver { is_karras },
        cli::Sampler::Euler => Sampler::Euler { is_karras },
        cli::Sampler::UniPc => Sampler::UniPc { is_karras },
        cli::Sampler::Ddim if !is_karras => Sampler::Ddim,
        cli::Sampler::EulerAncestral if !is_karras => Sampler::EulerAncestral,
        _ => return Err(invalid("--karras: works with --sampler dpm++, euler or unipc")),
    };
    Ok(sampler)
}

/// The guidance that is asked for.
pub fn guidance(asked: &Asked, model_scale: f64) -> Result<Guidance> {
    let kind = asked.guidance.unwrap_or_default();
    let scale = asked.scale.unwrap_or(model_scale);
    let text_scale = asked.text_scale.unwrap_or(scale);
    let image_scale = asked.image_scale.unwrap_or(scale);
    for (flag, value) in [("--text-scale", asked.text_scale), ("--image-scale", asked.image_scale)] {
        if let Some(value) = value.filter(|_| has_one_scale(kind)) {
            return Err(invalid(format!(
                "{flag} {value}: works with --guidance text-first or image-first; the other ways take --scale"
            )));
        }
    }
    Ok(match kind {
        cli::Guidance::Joint => Guidance::Joint { scale },
        cli::Guidance::TextOnly => Guidance::TextOnly { scale },
        cli::Guidance::TextFirst => Guidance::TextFirst { text_scale, image_scale },
        cli::Guidance::ImageFirst => Guidance::ImageFirst { text_scale, image_scale },
    })
}

fn restraint(asked: &Asked) -> Result<Restraint> {
    let is_normalised = asked.normalise_guidance.unwrap_or(false);
    if is_normalised && has_one_scale(asked.guidance.unwrap_or_default()) {
        return Err(invalid(
            "--normalise-guidance: works with --guidance text-first or image-first, which push in two directions",
        ));
    }
    Ok(Restraint { is_normalised, rescale: asked.guidance_rescale.unwrap_or(0.0) })
}

fn has_one_scale(kind: cli::Guidance) -> bool {
    matches!(kind, cli::Guidance::Joint | cli::Guidance::TextOnly)
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

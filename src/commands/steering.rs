//! The flags of sampling with every default filled in.

use anyhow::Result;

use crate::cli::{self, SteeringArgs};
use crate::diffusion::{Guidance, Restraint, Sampler};
use crate::invalid::invalid;
use crate::sample::SampleSettings;

const STEPS: usize = 30;

/// How pictures of any size are sampled.
pub struct Steering {
    sampler: Sampler,
    steps: usize,
    guidance: Guidance,
    restraint: Restraint,
}

impl Steering {
    /// By the flags; `model_scale` is the model's own. Flags that do not go together are refused.
    pub fn new(asked: &SteeringArgs, model_scale: f64) -> Result<Self> {
        Ok(Self {
            sampler: sampler(asked)?,
            steps: asked.steps.unwrap_or(STEPS),
            guidance: guidance(asked, model_scale)?,
            restraint: restraint(asked)?,
        })
    }

    /// Pictures of `size` pixels, as much at once as goes well.
    pub fn at(self, size: usize) -> SampleSettings {
        let Self { sampler, steps, guidance, restraint } = self;
        SampleSettings { sampler, restraint, ..SampleSettings::new(guidance, steps, size) }
    }
}

/// The sampler that is asked for.
fn sampler(asked: &SteeringArgs) -> Result<Sampler> {
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
fn guidance(asked: &SteeringArgs, model_scale: f64) -> Result<Guidance> {
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

fn restraint(asked: &SteeringArgs) -> Result<Restraint> {
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

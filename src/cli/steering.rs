//! How pictures are sampled: the flags of every verb that measures or makes them. None has a default here: `jedi sample` puts
//! them together with a prompts file and an earlier picture first.

use clap::{ArgAction, Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::{steps, values};

#[derive(Args, Clone, Debug, Default, PartialEq, Serialize)]
pub struct SteeringArgs {
    /// Denoising steps [default: 30]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[arg(long, value_name = "N", value_parser = steps())]
    pub steps: Option<usize>,
    /// Sampling method [default: ddim]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[arg(long, value_enum)]
    pub sampler: Option<Sampler>,
    /// Spread the noise levels as Karras et al. do; with --sampler dpm++, euler or unipc
    #[serde(skip_serializing_if = "Option::is_none")]
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub karras: Option<bool>,
    /// What the guidance pushes towards [default: joint]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[arg(long, value_enum)]
    pub guidance: Option<Guidance>,
    /// Guidance scale, 1 = no guidance [default: the model's own, else 3]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[arg(long, value_name = "λ", value_parser = values::scale)]
    pub scale: Option<f64>,
    /// Scale of the direction that adds the text; only with --guidance text-first or image-first [default: --scale]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[arg(long, value_name = "λ", value_parser = values::scale)]
    pub text_scale: Option<f64>,
    /// Scale of the direction that adds the references; only with --guidance text-first or image-first
    /// [default: --scale]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[arg(long, value_name = "λ", value_parser = values::scale)]
    pub image_scale: Option<f64>,
    /// Scale the two directions to the smaller of their norms first; only with --guidance text-first or image-first
    #[serde(skip_serializing_if = "Option::is_none")]
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub normalise_guidance: Option<bool>,
    /// How far the spread of the guided prediction goes back to the unguided one's, 0 to 1; about 0.7 cures over-exposed
    /// pictures at high scales [default: 0]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[arg(long, value_name = "φ", value_parser = values::share)]
    pub guidance_rescale: Option<f64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampler {
    /// Deterministic DDIM
    #[default]
    Ddim,
    /// DPM-Solver++ 2M: good pictures in 15 to 25 steps
    #[value(name = "dpm++")]
    #[serde(rename = "dpm++")]
    DpmSolver,
    /// Euler steps
    Euler,
    /// Euler steps with fresh noise: the picture keeps changing with the number of steps
    #[value(name = "euler-a")]
    #[serde(rename = "euler-a")]
    EulerAncestral,
    /// UniPC: good pictures in 8 to 20 steps
    #[value(name = "unipc")]
    #[serde(rename = "unipc")]
    UniPc,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Guidance {
    /// Text and references together
    #[default]
    Joint,
    /// First the text, then the references on top of it
    TextFirst,
    /// First the references, then the text on top of them
    ImageFirst,
    /// The text alone; the references condition but are not pushed
    TextOnly,
}

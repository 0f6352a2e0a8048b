//! The `--config` file of `jedi train`.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::data_settings::{DataConfig, DataLayout};
pub use super::lora::LoraConfig;
pub use super::rates::{Decay, OnHost, OptimizerConfig};
use crate::invalid::invalid;
use crate::ops::Precision;

/// All that a run depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// What is trained.
    pub objective: ObjectiveKind,
    /// Of initial weights, data order, noise and everything else that is drawn.
    #[serde(default)]
    pub seed: u64,
    /// What is built, and from which weights.
    pub model: ModelConfig,
    /// What it is shown.
    pub data: DataConfig,
    /// How weights follow gradients.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Only for objective `joint`.
    #[serde(default)]
    pub joint: JointConfig,
    /// Adapters in place of the whole network; only for objective `joint`.
    #[serde(default)]
    pub lora: LoraConfig,
    /// Data that is never trained on, for the held-out loss of objective `joint`; none: toys that no run is trained on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation: Vec<ValidationConfig>,
    /// Only for objective `autoencoder`.
    #[serde(default)]
    pub autoencoder: AutoencoderConfig,
    /// How long, and what is kept.
    pub run: RunConfig,
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ObjectiveKind {
    /// The VAE: pictures to latents and back.
    Autoencoder,
    /// U-Net and text encoder: denoise the images of a set together.
    Joint,
}

/// Networks and where their weights come from: folders, or models on the hub (`owner/name`, `owner/name@revision`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Folder in the diffusers layout whose configs and tokenizer say what is built; its weights are not read.
    pub architecture: PathBuf,
    /// Objective `joint`: model folder with the trained VAE.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae: Option<PathBuf>,
    /// Model folder whose weights training starts from; none: freshly drawn weights. A plain Stable Diffusion U-Net is
    /// widened to the joint input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_from: Option<PathBuf>,
    /// Parameters that stay as they are, by patterns of their names in which `*` stands for anything: `text_encoder.*`,
    /// `unet.down_blocks.*`. They cost neither gradients nor moments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub freeze: Vec<String>,
}

/// A `[[validation]]` source; its pictures are as large as the training pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidationConfig {
    /// What its losses are called in the record.
    pub name: String,
    /// A folder, a `.tar` or a pattern; its first sets are taken.
    pub source: String,
    /// What a sample is.
    #[serde(default)]
    pub layout: DataLayout,
}

/// Objective `joint` (§3.2, §4; design of the null branches).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JointConfig {
    /// n, drawn evenly at every step.
    pub set_sizes: Vec<usize>,
    /// Probability that an image's reference is hidden (mask 1).
    pub mask_probability: f64,
    /// Probability that in a set whose images are all given, or all hidden, one is turned over: only sets that hold both
    /// teach to carry a subject over. The paper leaves it to chance (0).
    pub mixed_sets: f64,
    /// Probability that a set loses all its captions; half of these also lose all references.
    pub set_text_dropout: f64,
    /// Probability that an image loses its caption.
    pub image_text_dropout: f64,
    /// γ of min-SNR weighting (Hang et al. 2023; 5 there): the loss of a picture is multiplied by min(SNR, γ)/SNR, or by
    /// min(SNR, γ)/(SNR + 1) where the velocity is predicted, so that nearly clean pictures do not outweigh the others. 0: the
    /// plain mean, as in the paper.
    pub min_snr_gamma: f64,
    /// How much more a place counts in the loss where the subject is than where it is not, by the masks of the data; pictures
    /// without one count alike everywhere, and each picture counts as much as before. 1: no difference, as in the paper.
    pub subject_weight: f64,
    /// Deviation of noise that is the same at all places of a channel of a picture, added to the noise, so that pictures can
    /// become darker or lighter as a whole (0.05 to 0.1 where it is used). 0: none, as in the paper.
    pub noise_offset: f64,
    /// Memory for the latents of training pictures, in GB (10⁹ bytes); sets beyond it are encoded anew each time that they
    /// are dealt, which changes the speed alone. 0: none are kept.
    pub latent_cache_gb: f64,
}

impl Default for JointConfig {
    fn default() -> Self {
        Self {
            set_sizes: vec![2, 3, 4],
            mask_probability: 0.5,
            mixed_sets: 0.0,
            set_text_dropout: 0.1,
            image_text_dropout: 0.1,
            min_snr_gamma: 0.0,
            subject_weight: 1.0,
            noise_offset: 0.0,
            latent_cache_gb: 4.0,
        }
    }
}

/// Objective `autoencoder`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AutoencoderConfig {
    /// Weight of the mean KL divergence of a latent to the standard normal.
    pub kl_weight: f64,
    /// Weight of the absolute errors of pixels and of the differences of neighbouring pixels, beside the squared error.
    pub outline_weight: f64,
}

impl Default for AutoencoderConfig {
    fn default() -> Self {
        Self { kl_weight: 1e-3, outline_weight: 0.1 }
    }
}

/// What networks compute in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum ComputeDtype {
    #[default]
    F32,
    Bf16,
}

impl From<ComputeDtype> for DType {
    fn from(dtype: ComputeDtype) -> Self {
        match dtype {
            ComputeDtype::F32 => Self::F32,
            ComputeDtype::Bf16 => Self::BF16,
        }
    }
}

/// Length of the run and its rhythm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Images a step, b·n.
    pub images_per_step: usize,
    /// Images that pass through the networks at a time, whole sets of them (one set at least); gradients are added up over
    /// the step, which gives what the whole batch gives, in less memory. 0: all at once.
    #[serde(default)]
    pub micro_batch: usize,
    /// On a GPU, what the networks of the joint objective compute in; parameters, their gradients and moments, the loss and the
    /// VAE are f32 in any case.
    #[serde(default)]
    pub dtype: ComputeDtype,
    /// How exactly matrix products are computed on a CPU with a tile unit.
    #[serde(default)]
    pub matmul_precision: Precision,
    /// Keep less for the gradients and compute the U-Net's stages twice: slower, in less memory.
    #[serde(default)]
    pub gradient_checkpointing: bool,
    /// Many ranks: each keeps the moments and averages of its part of the parameters alone (ZeRO stage 1), which takes less
    /// memory and nothing else.
    #[serde(default)]
    pub shard_optimizer: bool,
    /// Steps between validations; 0: none.
    #[serde(default = "default_every")]
    pub validate_every: u64,
    /// Steps between checkpoints, each with its preview sheet.
    #[serde(default = "default_every")]
    pub checkpoint_every: u64,
    /// Write checkpoints beside training, from a copy of weights and moments in the host's memory; false: training waits.
    #[serde(default = "default_beside")]
    pub save_beside: bool,
    /// Held-out toys on the preview sheet of a checkpoint; 0: no sheet.
    #[serde(default = "default_preview")]
    pub preview_images: usize,
    /// Checkpoints kept, the latest ones; 0: all.
    #[serde(default = "default_keep", alias = "keep_checkpoints")]
    pub keep_last: usize,
    /// And for good the checkpoint of every so many steps; 0: none.
    #[serde(default)]
    pub keep_every: u64,
}

fn default_every() -> u64 {
    500
}
fn default_preview() -> usize {
    24
}
fn default_beside() -> bool {
    true
}
fn default_keep() -> usize {
    2
}

impl TrainConfig {
    /// Refuses values that no run can have, with the setting's name and range.
    pub fn validate(&self) -> Result<()> {
        let (optimizer, joint) = (&self.optimizer, &self.joint);
        let from_zero = 0.0..f64::INFINITY;
        for (name, value, range) in [
            ("optimizer.lr", optimizer.lr, from_zero.clone()),
            ("optimizer.eps", optimizer.eps, f64::MIN_POSITIVE..f64::INFINITY),
            ("optimizer.beta1", optimizer.beta1, 0.0..1.0),
            ("optimizer.beta2", optimizer.beta2, 0.0..1.0),
            ("optimizer.weight_decay", optimizer.weight_decay, from_zero.clone()),
            ("optimizer.clip_norm", optimizer.clip_norm, from_zero.clone()),
            ("optimizer.end_share", optimizer.end_share, 0.0..1.0),
            ("optimizer.ema_decay", optimizer.ema_decay, 0.0..1.0),
            ("lora.alpha", self.lora.alpha, from_zero.clone()),
            ("autoencoder.kl_weight", self.autoencoder.kl_weight, from_zero.clone()),
            ("autoencoder.outline_weight", self.autoencoder.outline_weight, from_zero.clone()),
            ("joint.noise_offset", joint.noise_offset, from_zero.clone()),
            ("joint.subject_weight", joint.subject_weight, 0.01..1000.0),
            ("joint.min_snr_gamma", joint.min_snr_gamma, from_zero.clone()),
            ("joint.latent_cache_gb", joint.latent_cache_gb, from_zero),
        ] {
            if !range.contains(&value) {
                return Err(invalid(format!("{name} = {value}: must lie in [{}, {})", range.start, range.end)));
            }
        }
        for (name, value) in [
            ("joint.mask_probability", joint.mask_probability),
            ("joint.mixed_sets", joint.mixed_sets),
            ("joint.set_text_dropout", joint.set_text_dropout),
            ("joint.image_text_dropout", joint.image_text_dropout),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return Err(invalid(format!("{name} = {value}: is a probability, so it must lie in [0, 1]")));
            }
        }
        for (name, value) in [("run.steps", self.run.steps), ("run.images_per_step", self.run.images_per_step as u64)] {
            if value == 0 {
                return Err(invalid(format!("{name} = 0: must be at least 1")));
            }
        }
        if self.objective == ObjectiveKind::Autoencoder && self.run.dtype != ComputeDtype::F32 {
            return Err(invalid(
                "run.dtype: bf16 is for objective joint; an autoencoder is trained in f32, so leave it out",
            ));
        }
        if self.objective == ObjectiveKind::Autoencoder && self.lora.rank > 0 {
            return Err(invalid("lora.rank: adapters are for objective joint; leave [lora] out"));
        }
        if self.lora.rank > 0 && self.lora.targets.is_empty() {
            return Err(invalid("lora.targets: is empty; name at least one layer, or leave [lora] out"));
        }
        let is_joint = self.objective == ObjectiveKind::Joint;
        if is_joint && self.model.vae.is_none() {
            return Err(invalid("model.vae: missing; the joint objective needs a trained VAE"));
        }
        self.data.validate(if is_joint { &joint.set_sizes } else { &[] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_values_are_refused_by_name() {
        let text = "objective = 'autoencoder'\nmodel = { architecture = 'a' }\ndata = { source = 'toybox' }\n\
                    run = { steps = 1, images_per_step = 4 }";
        let good: TrainConfig = toml::from_str(text).unwrap();
        good.validate().unwrap();
        let refusal = |change: fn(&mut TrainConfig)| {
            let mut config = good.clone();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(refusal(|c| c.optimizer.beta1 = 1.0).starts_with("optimizer.beta1 = 1: "));
        assert!(refusal(|c| c.optimizer.lr = f64::NAN).starts_with("optimizer.lr = NaN: "));
        assert!(refusal(|c| c.joint.mask_probability = 5.0).starts_with("joint.mask_probability = 5: "));
        assert!(refusal(|c| c.run.images_per_step = 0).starts_with("run.images_per_step = 0: "));
        assert!(refusal(|c| c.run.dtype = ComputeDtype::Bf16).starts_with("run.dtype: "));
        assert!(refusal(|c| c.objective = ObjectiveKind::Joint).starts_with("model.vae: "));
        assert!(refusal(|c| c.joint.latent_cache_gb = -1.0).starts_with("joint.latent_cache_gb = -1: "));
        let few_pictures = |c: &mut TrainConfig| {
            (c.objective, c.model.vae, c.data.images) = (ObjectiveKind::Joint, Some("vae".into()), 3);
        };
        assert!(refusal(few_pictures).starts_with("data.images = 3: joint.set_sizes asks for 4"));
    }
}

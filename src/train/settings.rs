//! The `--config` file of `jedi train`.

use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

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
}

/// Where the pictures come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// `toybox`: drawn as needed; else a folder, a `.tar` or a pattern such as `{00000..00099}.tar`.
    pub source: String,
    /// Files: what a sample is.
    #[serde(default)]
    pub layout: DataLayout,
    /// Toybox: how many different sets there are.
    #[serde(default = "default_sets")]
    pub sets: usize,
    /// Toybox: pictures a set.
    #[serde(default = "default_images")]
    pub images: usize,
    /// Toybox: seed of the sets.
    #[serde(default)]
    pub seed: u64,
    /// Side of the training pictures in pixels.
    #[serde(default = "default_size")]
    pub size: u32,
}

/// How the pictures of a sample lie in its files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataLayout {
    /// Strips or loose sets.
    #[default]
    Sets,
    /// One picture a sample (img2dataset).
    Single,
}

fn default_sets() -> usize {
    16_384
}
fn default_images() -> usize {
    4
}
fn default_size() -> u32 {
    64
}

/// AdamW, its learning rate over time, clipping and averaging.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Learning rate behind the warm-up, per update.
    pub lr: f64,
    /// Memory of the mean gradient.
    pub beta1: f64,
    /// Memory of the mean squared gradient.
    pub beta2: f64,
    /// Added to the root of the mean squared gradient.
    pub eps: f64,
    /// Share of a weight, times `lr`, that an update takes away.
    pub weight_decay: f64,
    /// Steps from 0 to `lr`.
    pub warmup_steps: u64,
    /// What becomes of `lr` behind the warm-up.
    pub decay: Decay,
    /// Largest global norm of a gradient; 0: no clipping.
    pub clip_norm: f64,
    /// Of the averaged weights, which are the ones that are sampled from; 0: no averaging.
    pub ema_decay: f64,
}

/// The learning rate behind the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Stays at `lr`.
    Constant,
    /// Half a cosine from `lr` at the end of the warm-up to a hundredth of it at `run.steps`.
    Cosine,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            lr: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            warmup_steps: 500,
            decay: Decay::Constant,
            clip_norm: 1.0,
            ema_decay: 0.9999,
        }
    }
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

/// Length of the run and its rhythm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Images a step, b·n.
    pub images_per_step: usize,
    /// How exactly matrix products are computed on a CPU with a tile unit.
    #[serde(default)]
    pub matmul_precision: Precision,
    /// Keep less for the gradients and compute the U-Net's stages twice: slower, in less memory.
    #[serde(default)]
    pub gradient_checkpointing: bool,
    /// Steps between validations; 0: none.
    #[serde(default = "default_every")]
    pub validate_every: u64,
    /// Steps between checkpoints, each with its preview sheet.
    #[serde(default = "default_every")]
    pub checkpoint_every: u64,
    /// Checkpoints kept, the latest ones; 0: all.
    #[serde(default = "default_keep")]
    pub keep_checkpoints: usize,
}

fn default_every() -> u64 {
    500
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
            ("optimizer.ema_decay", optimizer.ema_decay, 0.0..1.0),
            ("autoencoder.kl_weight", self.autoencoder.kl_weight, from_zero.clone()),
            ("autoencoder.outline_weight", self.autoencoder.outline_weight, from_zero.clone()),
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
        for (name, value) in [
            ("run.steps", self.run.steps),
            ("run.images_per_step", self.run.images_per_step as u64),
            ("data.size", u64::from(self.data.size)),
            ("data.sets", self.data.sets as u64),
            ("data.images", self.data.images as u64),
        ] {
            if value == 0 {
                return Err(invalid(format!("{name} = 0: must be at least 1")));
            }
        }
        if self.objective == ObjectiveKind::Joint {
            if self.model.vae.is_none() {
                return Err(invalid("model.vae: missing; the joint objective needs a trained VAE"));
            }
            let (images, n_needed) = (self.data.images, joint.set_sizes.iter().copied().max().unwrap_or(0));
            if self.data.source == "toybox" && images < n_needed {
                return Err(invalid(format!(
                    "data.images = {images}: joint.set_sizes asks for {n_needed} pictures a set"
                )));
            }
        }
        Ok(())
    }
}

impl OptimizerConfig {
    /// The learning rate of update `step` (from 0) of `steps`.
    pub fn lr_at(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup_steps {
            return self.lr * (step + 1) as f64 / self.warmup_steps as f64;
        }
        match self.decay {
            Decay::Constant => self.lr,
            Decay::Cosine => {
                let span = steps.saturating_sub(self.warmup_steps).max(1);
                let share = ((step - self.warmup_steps) as f64 / span as f64).min(1.0);
                self.lr * (0.01 + 0.99 * 0.5 * (1.0 + (std::f64::consts::PI * share).cos()))
            }
        }
    }

    /// The averaging factor of update `step` (from 0): short memory at first, so that the average follows the early steps.
    pub fn ema_decay_at(&self, step: u64) -> f64 {
        self.ema_decay.min((1.0 + step as f64) / (10.0 + step as f64))
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
        assert!(refusal(|c| c.objective = ObjectiveKind::Joint).starts_with("model.vae: "));
        assert!(refusal(|c| c.joint.latent_cache_gb = -1.0).starts_with("joint.latent_cache_gb = -1: "));
        let few_pictures = |c: &mut TrainConfig| {
            (c.objective, c.model.vae, c.data.images) = (ObjectiveKind::Joint, Some("vae".into()), 3);
        };
        assert!(refusal(few_pictures).starts_with("data.images = 3: joint.set_sizes asks for 4"));
    }

    #[test]
    fn the_learning_rate_warms_up_and_decays() {
        let settings = OptimizerConfig { lr: 1.0, warmup_steps: 10, decay: Decay::Cosine, ..Default::default() };
        assert!((settings.lr_at(0, 110) - 0.1).abs() < 1e-12);
        assert!((settings.lr_at(9, 110) - 1.0).abs() < 1e-12);
        assert!((settings.lr_at(60, 110) - 0.505).abs() < 1e-12);
        assert!((settings.lr_at(110, 110) - 0.01).abs() < 1e-12);
        assert_eq!(OptimizerConfig { decay: Decay::Constant, ..settings }.lr_at(10_000, 110), 1.0);
    }
}

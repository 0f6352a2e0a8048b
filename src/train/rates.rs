//! `[optimizer]` of a run: how weights follow gradients, and what the learning rate is at each step.

use serde::{Deserialize, Serialize};

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
    /// Share of `lr` that is left at the end of a cosine or a line.
    pub end_share: f64,
    /// Largest global norm of a gradient; 0: no clipping.
    pub clip_norm: f64,
    /// Of the averaged weights, which are the ones that are sampled from; 0: no averaging.
    pub ema_decay: f64,
    /// What is kept in the host's memory while the parameters are on a GPU (on the CPU all is there anyway).
    pub on_host: OnHost,
}

/// What a GPU need not hold, for the price of a trip between the memories at every update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnHost {
    /// Everything is where the parameters are.
    #[default]
    Nothing,
    /// The averaged weights, 4 bytes a parameter. They follow on the CPU; weights travel there.
    Averages,
    /// Moments too, 12 bytes a parameter. The CPU makes the update; gradients and weights travel there, new weights back.
    All,
}

/// The learning rate behind the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Stays at `lr`.
    Constant,
    /// Half a cosine from `lr` at the end of the warm-up to `end_share` of it at `run.steps`.
    Cosine,
    /// A straight line between the same two.
    Linear,
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
            end_share: 0.01,
            clip_norm: 1.0,
            ema_decay: 0.9999,
            on_host: OnHost::Nothing,
        }
    }
}

impl OptimizerConfig {
    /// The learning rate of update `step` (from 0) of `steps`.
    pub fn lr_at(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup_steps {
            return self.lr * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let span = steps.saturating_sub(self.warmup_steps).max(1);
        let share = ((step - self.warmup_steps) as f64 / span as f64).min(1.0);
        let left = match self.decay {
            Decay::Constant => return self.lr,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * share).cos()),
            Decay::Linear => 1.0 - share,
        };
        self.lr * (self.end_share + (1.0 - self.end_share) * left)
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
    fn the_learning_rate_warms_up_and_decays() {
        let settings = OptimizerConfig { lr: 1.0, warmup_steps: 10, decay: Decay::Cosine, ..Default::default() };
        assert!((settings.lr_at(0, 110) - 0.1).abs() < 1e-12);
        assert!((settings.lr_at(9, 110) - 1.0).abs() < 1e-12);
        assert!((settings.lr_at(60, 110) - 0.505).abs() < 1e-12);
        assert!((settings.lr_at(110, 110) - 0.01).abs() < 1e-12);
        let line = OptimizerConfig { decay: Decay::Linear, end_share: 0.2, ..settings.clone() };
        assert!((line.lr_at(35, 110) - 0.8).abs() < 1e-12);
        assert!((line.lr_at(110, 110) - 0.2).abs() < 1e-12 && (line.lr_at(500, 110) - 0.2).abs() < 1e-12);
        assert_eq!(OptimizerConfig { decay: Decay::Constant, ..settings }.lr_at(10_000, 110), 1.0);
    }
}

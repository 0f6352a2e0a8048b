//! The noise schedule: how much signal is left at each timestep, in f64.

use anyhow::{Result, ensure};
use candle_core::{Result as CandleResult, Tensor};
use serde::{Deserialize, Serialize};

/// `scheduler/scheduler_config.json`; the fields that jedi acts upon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScheduleConfig {
    /// The class that diffusers reads it with.
    #[serde(rename = "_class_name")]
    pub class_name: String,
    /// Timesteps of training.
    pub num_train_timesteps: usize,
    /// Variance added in the first timestep.
    pub beta_start: f64,
    /// Variance added in the last one.
    pub beta_end: f64,
    /// How the variances lie between the two.
    pub beta_schedule: BetaSchedule,
    /// Whether the variances are rescaled so that nothing of the picture is left in the last timestep (Lin et al. 2023,
    /// algorithm 1): else a network in training reads coarse colours there that sampling's pure noise does not have.
    pub rescale_betas_zero_snr: bool,
    /// What the network predicts.
    pub prediction_type: PredictionType,
    /// Which of the training timesteps are sampled at.
    pub timestep_spacing: Spacing,
    /// Added to the sampled timesteps.
    pub steps_offset: usize,
    /// Whether the step to the picture itself assumes ᾱ = 1, instead of ᾱ₀.
    pub set_alpha_to_one: bool,
    /// Must be false: only pixel-space models clip the predicted picture. Written out because diffusers' own default is true.
    pub clip_sample: bool,
}

impl Default for ScheduleConfig {
    /// Stable Diffusion 1.4's.
    fn default() -> Self {
        Self {
            class_name: "DDIMScheduler".into(),
            num_train_timesteps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            rescale_betas_zero_snr: false,
            prediction_type: PredictionType::Epsilon,
            timestep_spacing: Spacing::Leading,
            steps_offset: 1,
            set_alpha_to_one: false,
            clip_sample: false,
        }
    }
}

/// The variances between `beta_start` and `beta_end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// Evenly spaced.
    Linear,
    /// Linear in √β.
    ScaledLinear,
    /// ᾱ falls as a squared cosine, whatever `beta_start` and `beta_end` (Nichol & Dhariwal 2021, eq. 17): more of the
    /// timesteps at middling noise, which is what small pictures need.
    #[serde(rename = "squaredcos_cap_v2")]
    SquaredCosine,
}

/// What the network's output means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise ε.
    Epsilon,
    /// v = √ᾱ·ε − √(1−ᾱ)·x₀ (Salimans & Ho 2022).
    VPrediction,
}

/// How sampling steps are spread over the training timesteps (Lin et al. 2023, table 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spacing {
    /// From 0 upwards in equal steps.
    Leading,
    /// From the last timestep downwards in equal steps.
    Trailing,
    /// From the first to the last timestep.
    Linspace,
}

/// The ᾱ that [`BetaSchedule::SquaredCosine`] follows, in front of timestep `i`.
fn cosine(i: usize, steps: usize) -> f64 {
    ((i as f64 / steps as f64 + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2)
}

/// √ᾱ shifted so that the last is 0 and stretched so that the first stays (Lin et al. 2023, algorithm 1).
fn rescale_to_zero_snr(alphas_cumprod: &mut [f64]) {
    let (first, last) = (alphas_cumprod[0].sqrt(), alphas_cumprod[alphas_cumprod.len() - 1].sqrt());
    for alpha in alphas_cumprod {
        *alpha = ((alpha.sqrt() - last) * first / (first - last)).powi(2);
    }
}

/// ᾱ of every training timestep.
#[derive(Clone, Debug)]
pub struct NoiseSchedule {
    config: ScheduleConfig,
    alphas_cumprod: Vec<f64>,
}

impl NoiseSchedule {
    /// Precomputes ᾱ of every timestep.
    pub fn new(config: &ScheduleConfig) -> Result<Self> {
        let steps = config.num_train_timesteps;
        ensure!(!config.clip_sample, "scheduler config: clip_sample is for pixel-space models; set it to false");
        ensure!(steps > 1, "scheduler config: num_train_timesteps must be at least 2, not {steps}");
        let between = |low: f64, high: f64, i: usize| low + (high - low) * i as f64 / (steps - 1) as f64;
        let mut product = 1.0;
        let mut alphas_cumprod: Vec<f64> = (0..steps)
            .map(|i| {
                let beta = match config.beta_schedule {
                    BetaSchedule::Linear => between(config.beta_start, config.beta_end, i),
                    BetaSchedule::ScaledLinear => between(config.beta_start.sqrt(), config.beta_end.sqrt(), i).powi(2),
                    BetaSchedule::SquaredCosine => (1.0 - cosine(i + 1, steps) / cosine(i, steps)).min(0.999),
                };
                product *= 1.0 - beta;
                product
            })
            .collect();
        if config.rescale_betas_zero_snr {
            ensure!(
                config.prediction_type == PredictionType::VPrediction,
                "scheduler config: rescale_betas_zero_snr needs prediction_type v_prediction: of pure noise the noise says nothing"
            );
            rescale_to_zero_snr(&mut alphas_cumprod);
        }
        Ok(Self { config: config.clone(), alphas_cumprod })
    }

    /// What it was made from.
    pub fn config(&self) -> &ScheduleConfig {
        &self.config
    }

    /// Timesteps of training.
    pub fn train_steps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// ᾱ_t.
    pub fn alpha_cumprod(&self, timestep: usize) -> f64 {
        self.alphas_cumprod[timestep]
    }

    /// ᾱ behind the last sampling step.
    pub fn final_alpha_cumprod(&self) -> f64 {
        if self.config.set_alpha_to_one { 1.0 } else { self.alphas_cumprod[0] }
    }

    /// The timesteps of a sampling run, from noise to picture (diffusers `set_timesteps`).
    pub fn sampling_timesteps(&self, steps: usize) -> Result<Vec<usize>> {
        let total = self.train_steps();
        ensure!((1..=total).contains(&steps), "--steps {steps}: must lie in 1..={total}");
        let last = total - 1;
        Ok((0..steps)
            .rev()
            .map(|i| match self.config.timestep_spacing {
                Spacing::Leading => (i * (total / steps) + self.config.steps_offset).min(last),
                Spacing::Trailing => ((i + 1) as f64 * total as f64 / steps as f64).round_ties_even() as usize - 1,
                Spacing::Linspace if steps == 1 => 0,
                Spacing::Linspace => (i as f64 * last as f64 / (steps - 1) as f64).round_ties_even() as usize,
            })
            .collect())
    }

    /// √ᾱ_t·x₀ + √(1−ᾱ_t)·ε with one timestep a leading index.
    ///
    /// # Shapes
    /// - clean, noise `[b, ..]`, timesteps b of them → `[b, ..]`
    pub fn add_noise(&self, clean: &Tensor, noise: &Tensor, timesteps: &[usize]) -> CandleResult<Tensor> {
        let (signal, spread) = self.factors(clean, timesteps)?;
        clean.broadcast_mul(&signal)? + noise.broadcast_mul(&spread)?
    }

    /// What the network is to predict: ε, or v = √ᾱ_t·ε − √(1−ᾱ_t)·x₀.
    ///
    /// # Shapes
    /// - as [`NoiseSchedule::add_noise`]
    pub fn target(&self, clean: &Tensor, noise: &Tensor, timesteps: &[usize]) -> CandleResult<Tensor> {
        match self.config.prediction_type {
            PredictionType::Epsilon => Ok(noise.clone()),
            PredictionType::VPrediction => {
                let (signal, spread) = self.factors(clean, timesteps)?;
                noise.broadcast_mul(&signal)? - clean.broadcast_mul(&spread)?
            }
        }
    }

    /// What min-SNR weighting multiplies the squared error at `timestep` with (Hang et al. 2023, §3.4; diffusers'
    /// `train_text_to_image.py --snr_gamma`). The SNR is ᾱ/(1−ᾱ).
    pub fn min_snr_weight(&self, timestep: usize, gamma: f64) -> f64 {
        let alpha = self.alphas_cumprod[timestep];
        let snr = alpha / (1.0 - alpha);
        match self.config.prediction_type {
            PredictionType::Epsilon => (gamma / snr).min(1.0),
            PredictionType::VPrediction => snr.min(gamma) / (snr + 1.0),
        }
    }

    /// √ᾱ_t and √(1−ᾱ_t), shaped to multiply `like`.
    fn factors(&self, like: &Tensor, timesteps: &[usize]) -> CandleResult<(Tensor, Tensor)> {
        let mut shape = vec![1; like.rank()];
        shape[0] = timesteps.len();
        let factor = |f: &dyn Fn(f64) -> f64| {
            let values: Vec<f32> = timesteps.iter().map(|&t| f(self.alphas_cumprod[t]).sqrt() as f32).collect();
            Tensor::from_vec(values, shape.as_slice(), like.device())?.to_dtype(like.dtype())
        };
        Ok((factor(&|alpha| alpha)?, factor(&|alpha| 1.0 - alpha)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule() -> NoiseSchedule {
        NoiseSchedule::new(&ScheduleConfig::default()).unwrap()
    }

    #[test]
    fn the_signal_only_ever_decreases() {
        let schedule = schedule();
        assert!(schedule.alphas_cumprod.windows(2).all(|w| w[1] < w[0]));
        assert!(schedule.alpha_cumprod(0) < 1.0 && schedule.alpha_cumprod(999) > 0.0);
    }

    #[test]
    fn alphas_agree_with_diffusers() {
        // DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod[[0, 500, 999]]
        let schedule = schedule();
        for (t, expected) in [(0, 0.99915), (500, 0.27632), (999, 0.00466)] {
            let found = schedule.alpha_cumprod(t);
            assert!((found - expected).abs() < 2e-3 * expected.max(0.01) + 5e-6, "ᾱ_{t} = {found}, not {expected}");
        }
    }

    #[test]
    fn alphas_rescaled_to_zero_agree_with_diffusers() {
        // DDIMScheduler(.., prediction_type="v_prediction", rescale_betas_zero_snr=True).alphas_cumprod[[0, 500, 998, 999]]
        let config = ScheduleConfig {
            prediction_type: PredictionType::VPrediction,
            rescale_betas_zero_snr: true,
            ..Default::default()
        };
        let schedule = NoiseSchedule::new(&config).unwrap();
        for (t, expected) in [(0, 0.9991500), (500, 0.2410185), (998, 1.96796e-7), (999, 0.0)] {
            let found = schedule.alpha_cumprod(t);
            assert!((found - expected).abs() < 1e-3 * expected + 1e-12, "ᾱ_{t} = {found}, not {expected}");
        }
        let message =
            NoiseSchedule::new(&ScheduleConfig { prediction_type: PredictionType::Epsilon, ..config }).unwrap_err();
        assert!(message.to_string().contains("v_prediction"), "{message}");
    }

    #[test]
    fn min_snr_weights_agree_with_diffusers() {
        // snr = compute_snr(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), t);
        // minimum(snr, 5) / snr, and / (snr + 1) for v_prediction, at t = 0, 200, 500, 999
        let epsilon = schedule();
        let velocity = ScheduleConfig { prediction_type: PredictionType::VPrediction, ..Default::default() };
        let velocity = NoiseSchedule::new(&velocity).unwrap();
        for (t, of_noise, of_velocity) in
            [(0, 0.00425372, 0.00425011), (200, 1.0, 0.753692), (500, 1.0, 0.276332), (999, 1.0, 0.00466009)]
        {
            assert!((epsilon.min_snr_weight(t, 5.0) - of_noise).abs() < 2e-5, "{t}");
            assert!((velocity.min_snr_weight(t, 5.0) - of_velocity).abs() < 2e-5, "{t}");
        }
    }

    #[test]
    fn leading_timesteps_are_those_of_stable_diffusion() {
        // PNDM/DDIM of SD1.4 at 4 steps, steps_offset 1.
        assert_eq!(schedule().sampling_timesteps(4).unwrap(), [751, 501, 251, 1]);
        assert!(schedule().sampling_timesteps(0).is_err());
        assert!(schedule().sampling_timesteps(1001).is_err());
    }

    #[test]
    fn the_velocity_and_the_noisy_latents_give_back_the_clean_ones() {
        let config = ScheduleConfig { prediction_type: PredictionType::VPrediction, ..Default::default() };
        let schedule = NoiseSchedule::new(&config).unwrap();
        let tensor = |value: f32| Tensor::from_slice(&[value], (1, 1, 1, 1), &candle_core::Device::Cpu).unwrap();
        let (clean, noise) = (tensor(0.7), tensor(-1.3));
        for t in [0, 400, 999] {
            let value = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0] as f64;
            let noisy = value(schedule.add_noise(&clean, &noise, &[t]).unwrap());
            let velocity = value(schedule.target(&clean, &noise, &[t]).unwrap());
            let alpha = schedule.alpha_cumprod(t);
            assert!((alpha.sqrt() * noisy - (1.0 - alpha).sqrt() * velocity - 0.7).abs() < 1e-6);
        }
    }

    #[test]
    fn noise_mixes_by_the_timestep_of_each_image() {
        let schedule = schedule();
        let ones = Tensor::ones((2, 1, 1, 1), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        let zeros = ones.zeros_like().unwrap();
        let mixed = schedule.add_noise(&ones, &zeros, &[0, 999]).unwrap().flatten_all().unwrap();
        let mixed = mixed.to_vec1::<f32>().unwrap();
        assert!((mixed[0] as f64 - schedule.alpha_cumprod(0).sqrt()).abs() < 1e-6);
        assert!((mixed[1] as f64 - schedule.alpha_cumprod(999).sqrt()).abs() < 1e-6);
    }
}

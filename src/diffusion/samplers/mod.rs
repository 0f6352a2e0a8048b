//! Samplers: from noise to clean latents by calls of a (guided) network, which is a closure to them. Each is a function of
//! a [`Walk`] (its noise levels) and equals diffusers' scheduler of the same name, made `from_config` of the model's own.
//! Read `levels` (where the network is called), then `ddim`, the simplest.

pub mod ddim;
mod dpm_solver;
mod euler;
mod levels;
mod unipc;

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::schedule::{NoiseSchedule, PredictionType};
use levels::{Spread, sigma_of};

/// Which sampler walks the noise levels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sampler {
    /// Deterministic DDIM, η = 0 (Song et al. 2020, equation 12).
    #[default]
    Ddim,
    /// DPM-Solver++ of the second order with two steps' memory, midpoint (Lu et al. 2022, algorithm 2).
    DpmSolver {
        /// Noise levels as Karras et al. spread them, instead of the model's timesteps.
        is_karras: bool,
    },
    /// Euler steps in σ (Karras et al. 2022, algorithm 2 without churn).
    Euler {
        /// As for DPM-Solver++.
        is_karras: bool,
    },
    /// Euler steps to a lower noise level than asked for, and fresh noise up to it (k-diffusion's `euler_ancestral`).
    EulerAncestral,
    /// UniPC of the second order, B₂(h) (Zhao et al. 2023): a predictor, and a corrector that costs no call.
    UniPc {
        /// As for DPM-Solver++.
        is_karras: bool,
    },
}

/// A call of the network: what it is told of the noise in its input, √ᾱ·clean + √(1−ᾱ)·noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// On the scale of training; between two of its timesteps for some samplers.
    pub timestep: f64,
    /// ᾱ.
    pub alpha: f64,
}

/// The network: number of the call, its level, x of that level; returns the (guided) output.
pub type Predict<'a> = dyn FnMut(usize, Level, &Tensor) -> Result<Tensor> + 'a;

/// Standard normal noise in the shape of x, for the step of this number; only ancestral samplers ask for it.
pub type FreshNoise<'a> = dyn FnMut(usize) -> Result<Tensor> + 'a;

/// The noise levels of a sampling run.
#[derive(Clone, Debug)]
pub struct Walk {
    sampler: Sampler,
    prediction: PredictionType,
    levels: Vec<Level>,
    /// ᾱ behind each step.
    next_alphas: Vec<f64>,
    /// σ of the start noise, for samplers whose x is clean + σ·noise; 1 for the others.
    start_sigma: f64,
}

impl Sampler {
    /// The noise levels of `steps` calls of the network, from noise to picture.
    pub fn walk(self, schedule: &NoiseSchedule, steps: usize) -> Result<Walk> {
        let karras = |is_karras, timesteps| if is_karras { Spread::Karras } else { timesteps };
        let sigmas = match self {
            Self::Ddim => return ddim::walk(schedule, steps),
            Self::DpmSolver { is_karras } => karras(is_karras, Spread::SkipsLast).sigmas(schedule, steps)?,
            Self::UniPc { is_karras } => karras(is_karras, Spread::SkipsLast).sigmas(schedule, steps)?,
            Self::Euler { is_karras } => karras(is_karras, Spread::Timesteps).sigmas_between(schedule, steps)?,
            Self::EulerAncestral => Spread::Timesteps.sigmas(schedule, steps)?,
        };
        let start_sigma = match self {
            Self::Euler { .. } | Self::EulerAncestral => levels::start_sigma(schedule, &sigmas),
            _ => 1.0,
        };
        let alpha = |sigma: f64| 1.0 / (sigma * sigma + 1.0);
        let levels: Vec<Level> =
            sigmas.iter().map(|&(timestep, sigma)| Level { timestep, alpha: alpha(sigma) }).collect();
        // Behind the last step nothing is left of the noise.
        let next_alphas = levels[1..].iter().map(|level| level.alpha).chain([1.0]).collect();
        let prediction = schedule.config().prediction_type;
        Ok(Walk { sampler: self, prediction, levels, next_alphas, start_sigma })
    }
}

impl Walk {
    /// The calls of the network, from noise to picture.
    pub fn levels(&self) -> &[Level] {
        &self.levels
    }

    /// The end of this walk, from its first call at or below `timestep` on: [`Walk::run`] takes it from √ᾱ·clean + √(1−ᾱ)·noise
    /// at the level of that call to the picture. None where no call is so late.
    pub fn tail(&self, timestep: f64) -> Option<Self> {
        let first = self.levels.iter().position(|level| level.timestep <= timestep)?;
        let levels = self.levels[first..].to_vec();
        let start_sigma = match self.sampler {
            // Their x is clean + σ·noise.
            Sampler::Euler { .. } | Sampler::EulerAncestral => levels[0].alpha.sqrt().recip(),
            _ => 1.0,
        };
        Some(Self { levels, next_alphas: self.next_alphas[first..].to_vec(), start_sigma, ..*self })
    }

    /// Walks from standard normal noise to the picture; every call's answer has the shape of its x.
    ///
    /// # Shapes
    /// - noise of any shape → that shape
    pub fn run(&self, noise: &Tensor, predict: &mut Predict, fresh: &mut FreshNoise) -> Result<Tensor> {
        match self.sampler {
            Sampler::Ddim => ddim::run(self, noise, predict),
            Sampler::DpmSolver { .. } => dpm_solver::run(self, noise, predict),
            Sampler::Euler { .. } => euler::run(self, noise, predict),
            Sampler::EulerAncestral => euler::run_ancestral(self, noise, predict, fresh),
            Sampler::UniPc { .. } => unipc::run(self, noise, predict),
        }
    }

    /// σ at the level of each call, and behind the last.
    fn sigmas(&self) -> Vec<f64> {
        let first = self.levels.first().map(|level| sigma_of(level.alpha));
        first.into_iter().chain(self.next_alphas.iter().map(|&alpha| sigma_of(alpha))).collect()
    }

    /// Clean latents by the network's output for x at the level of call `step`.
    fn clean(&self, step: usize, x: &Tensor, output: &Tensor) -> CandleResult<Tensor> {
        Ok(self.prediction.clean_and_noise(self.levels[step].alpha, x, output)?.0)
    }
}

impl PredictionType {
    /// The picture and the noise that x at ᾱ = `alpha` is mixed of, by the network's output.
    ///
    /// # Shapes
    /// - x, output of one shape → twice that shape
    pub fn clean_and_noise(self, alpha: f64, x: &Tensor, output: &Tensor) -> CandleResult<(Tensor, Tensor)> {
        let (signal, spread) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        Ok(match self {
            Self::Epsilon => (((x - (output * spread)?)? / signal)?, output.clone()),
            Self::VPrediction => (((x * signal)? - (output * spread)?)?, ((output * signal)? + (x * spread)?)?),
        })
    }

    /// The output of a network that sees the picture `clean` in x at ᾱ = `alpha`: the inverse of
    /// [`PredictionType::clean_and_noise`].
    ///
    /// # Shapes
    /// - x, clean of one shape → that shape
    pub fn output_for(self, alpha: f64, x: &Tensor, clean: &Tensor) -> CandleResult<Tensor> {
        let (signal, spread) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        match self {
            Self::Epsilon => (x - (clean * signal)?)? / spread,
            Self::VPrediction => ((x * signal)? - clean)? / spread,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::ScheduleConfig;
    use candle_core::Device;

    const ALL: [Sampler; 8] = [
        Sampler::Ddim,
        Sampler::DpmSolver { is_karras: false },
        Sampler::DpmSolver { is_karras: true },
        Sampler::Euler { is_karras: false },
        Sampler::Euler { is_karras: true },
        Sampler::EulerAncestral,
        Sampler::UniPc { is_karras: false },
        Sampler::UniPc { is_karras: true },
    ];

    #[test]
    fn the_output_for_a_picture_leads_back_to_it() {
        for prediction in [PredictionType::Epsilon, PredictionType::VPrediction] {
            for alpha in [0.004, 0.5, 0.99] {
                let (x, clean) = (tensor(0.7), tensor(-1.3));
                let output = prediction.output_for(alpha, &x, &clean).unwrap();
                let (again, noise) = prediction.clean_and_noise(alpha, &x, &output).unwrap();
                assert!((value(&again) + 1.3).abs() < 1e-12);
                assert!((alpha.sqrt() * value(&again) + (1.0 - alpha).sqrt() * value(&noise) - 0.7).abs() < 1e-12);
            }
        }
    }

    fn tensor(value: f64) -> Tensor {
        Tensor::from_slice(&[value], 1, &Device::Cpu).unwrap()
    }

    fn value(tensor: &Tensor) -> f64 {
        tensor.to_vec1::<f64>().unwrap()[0]
    }

    /// A network that knows the picture leads every sampler to it, whatever the noise: all of the noise that x holds at a
    /// level is predicted, fresh noise too.
    #[test]
    fn a_network_that_knows_the_picture_leads_to_it() {
        let clean = 0.7;
        for prediction_type in [PredictionType::Epsilon, PredictionType::VPrediction] {
            let schedule = NoiseSchedule::new(&ScheduleConfig { prediction_type, ..Default::default() }).unwrap();
            for sampler in ALL {
                let walk = sampler.walk(&schedule, 10).unwrap();
                let mut predict = |_: usize, level: Level, x: &Tensor| {
                    let (signal, spread) = (level.alpha.sqrt(), (1.0 - level.alpha).sqrt());
                    let noise = (value(x) - signal * clean) / spread;
                    Ok(tensor(match prediction_type {
                        PredictionType::Epsilon => noise,
                        PredictionType::VPrediction => signal * noise - spread * clean,
                    }))
                };
                let mut fresh = |step: usize| Ok(tensor(step as f64 - 4.5));
                let found = value(&walk.run(&tensor(-1.3), &mut predict, &mut fresh).unwrap());
                // DDIM stops at ᾱ₀ (set_alpha_to_one false), with the rest of the noise; the others at the picture.
                let (first, rest) = (walk.levels[0].alpha, walk.next_alphas[9]);
                let noise = (-1.3 - first.sqrt() * clean) / (1.0 - first).sqrt();
                let expected = rest.sqrt() * clean + noise * (1.0 - rest).sqrt();
                assert!((found - expected).abs() < 1e-9, "{sampler:?} {prediction_type:?}: {found}, not {expected}");
            }
        }
    }

    #[test]
    fn the_end_of_a_walk_leads_from_a_picture_under_noise_to_it() {
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        for sampler in ALL {
            let walk = sampler.walk(&schedule, 10).unwrap();
            let tail = walk.tail(600.0).unwrap();
            let n_before = walk.levels.iter().filter(|level| level.timestep > 600.0).count();
            assert!(n_before > 0 && tail.levels == walk.levels[n_before..], "{sampler:?}");
            assert!(tail.levels[0].timestep <= 600.0 && walk.tail(-1.0).is_none(), "{sampler:?}");
            let (clean, alpha) = (0.7, tail.levels[0].alpha);
            let mut inputs = vec![];
            let mut predict = |_: usize, level: Level, x: &Tensor| {
                inputs.push(value(x));
                Ok(tensor((value(x) - level.alpha.sqrt() * clean) / (1.0 - level.alpha).sqrt()))
            };
            let start = alpha.sqrt() * clean + (1.0 - alpha).sqrt() * 0.4;
            let found = value(&tail.run(&tensor(start), &mut predict, &mut |_| Ok(tensor(0.4))).unwrap());
            assert!((inputs[0] - start).abs() < 1e-9, "{sampler:?}: the network saw {}, not {start}", inputs[0]);
            // DDIM keeps the noise of its last level.
            let rest = *tail.next_alphas.last().unwrap();
            let expected = rest.sqrt() * clean + (1.0 - rest).sqrt() * 0.4;
            assert!((found - expected).abs() < 1e-9, "{sampler:?}: {found}, not {expected}");
        }
    }

    #[test]
    fn levels_fall_from_noise_to_picture() {
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        for sampler in ALL {
            for steps in [1, 2, 7, 30, 100] {
                let walk = sampler.walk(&schedule, steps).unwrap();
                assert_eq!((walk.levels().len(), walk.next_alphas.len()), (steps, steps), "{sampler:?}");
                let alphas: Vec<f64> = walk.levels().iter().map(|level| level.alpha).collect();
                assert!(alphas.windows(2).all(|pair| pair[0] < pair[1]), "{sampler:?}, {steps} steps");
                assert!(walk.levels().iter().all(|level| (0.0..=999.0).contains(&level.timestep)), "{sampler:?}");
            }
            assert!(sampler.walk(&schedule, 0).is_err() && sampler.walk(&schedule, 1001).is_err(), "{sampler:?}");
        }
    }

    #[test]
    fn the_scaled_samplers_tell_the_network_the_level_of_its_own_input() {
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        for sampler in [Sampler::Euler { is_karras: false }, Sampler::EulerAncestral] {
            let walk = sampler.walk(&schedule, 5).unwrap();
            for level in walk.levels() {
                let expected = schedule.alpha_cumprod(level.timestep as usize);
                assert!((level.alpha - expected).abs() < 1e-12, "{sampler:?} at {}", level.timestep);
            }
        }
    }
}

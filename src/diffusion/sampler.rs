//! Sampler steps: from x_t and the network's (guided) output to x at the next timestep.

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::schedule::{NoiseSchedule, PredictionType};

/// Which sampler walks the timesteps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sampler {
    /// Deterministic DDIM, η = 0 (Song et al. 2020, equation 12).
    #[default]
    Ddim,
}

/// A sampling run's timesteps and their steps.
pub struct Walk {
    schedule: NoiseSchedule,
    timesteps: Vec<usize>,
}

impl Sampler {
    /// The timesteps of `steps` denoising steps, from noise to picture.
    pub fn walk(self, schedule: &NoiseSchedule, steps: usize) -> Result<Walk> {
        let Self::Ddim = self;
        Ok(Walk { schedule: schedule.clone(), timesteps: schedule.sampling_timesteps(steps)? })
    }
}

impl Walk {
    /// From noise to picture.
    pub fn timesteps(&self) -> &[usize] {
        &self.timesteps
    }

    /// x at the timestep behind number `step`.
    ///
    /// # Shapes
    /// - x, output of one shape → that shape
    pub fn step(&self, step: usize, x: &Tensor, output: &Tensor) -> CandleResult<Tensor> {
        let alpha = self.schedule.alpha_cumprod(self.timesteps[step]);
        // diffusers steps by a fixed stride, not to the next timestep; the two differ when steps do not divide 1000.
        let stride = self.schedule.train_steps() / self.timesteps.len();
        let next = match self.timesteps[step].checked_sub(stride) {
            Some(t) => self.schedule.alpha_cumprod(t),
            None => self.schedule.final_alpha_cumprod(),
        };
        let (clean, noise) = match self.schedule.config().prediction_type {
            PredictionType::Epsilon => {
                let clean = ((x - (output * (1.0 - alpha).sqrt())?)? / alpha.sqrt())?;
                (clean, output.clone())
            }
            PredictionType::VPrediction => (
                ((x * alpha.sqrt())? - (output * (1.0 - alpha).sqrt())?)?,
                ((output * alpha.sqrt())? + (x * (1.0 - alpha).sqrt())?)?,
            ),
        };
        (clean * next.sqrt())? + (noise * (1.0 - next).sqrt())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::ScheduleConfig;
    use candle_core::Device;

    /// With the true noise as the network's output one step lands on the same trajectory at the next timestep.
    #[test]
    fn the_true_noise_leads_along_the_trajectory() {
        for prediction_type in [PredictionType::Epsilon, PredictionType::VPrediction] {
            let schedule = NoiseSchedule::new(&ScheduleConfig { prediction_type, ..Default::default() }).unwrap();
            let walk = Sampler::Ddim.walk(&schedule, 10).unwrap();
            let (clean, noise) = (0.7f64, -1.3f64);
            let at = |alpha: f64| alpha.sqrt() * clean + (1.0 - alpha).sqrt() * noise;
            for step in 0..10 {
                let alpha = schedule.alpha_cumprod(walk.timesteps()[step]);
                let output = match prediction_type {
                    PredictionType::Epsilon => noise,
                    PredictionType::VPrediction => alpha.sqrt() * noise - (1.0 - alpha).sqrt() * clean,
                };
                let tensor = |v: f64| Tensor::from_slice(&[v], 1, &Device::Cpu).unwrap();
                let stepped = walk.step(step, &tensor(at(alpha)), &tensor(output)).unwrap();
                let next = match walk.timesteps().get(step + 1) {
                    Some(&t) => schedule.alpha_cumprod(t),
                    None => schedule.final_alpha_cumprod(),
                };
                assert!((stepped.to_vec1::<f64>().unwrap()[0] - at(next)).abs() < 1e-9);
            }
        }
    }
}

//! Deterministic DDIM, η = 0 (Song et al. 2020, equation 12): diffusers `DDIMScheduler`.

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::{Level, Predict, Sampler, Walk};
use crate::diffusion::schedule::NoiseSchedule;

pub(super) fn walk(schedule: &NoiseSchedule, steps: usize) -> Result<Walk> {
    let timesteps = schedule.sampling_timesteps(steps)?;
    // diffusers steps by a fixed stride, not to the next timestep; the two differ when steps do not divide 1000.
    let stride = schedule.train_steps() / steps;
    let next = |t: usize| t.checked_sub(stride).map_or(schedule.final_alpha_cumprod(), |t| schedule.alpha_cumprod(t));
    let level = |&t: &usize| Level { timestep: t as f64, alpha: schedule.alpha_cumprod(t) };
    Ok(Walk {
        sampler: Sampler::Ddim,
        prediction: schedule.config().prediction_type,
        levels: timesteps.iter().map(level).collect(),
        next_alphas: timesteps.iter().map(|&t| next(t)).collect(),
        start_sigma: 1.0,
    })
}

pub(super) fn run(walk: &Walk, noise: &Tensor, predict: &mut Predict) -> Result<Tensor> {
    let mut x = noise.clone();
    for (step, &level) in walk.levels.iter().enumerate() {
        let output = predict(step, level, &x)?;
        x = next(walk, step, &x, &output)?;
    }
    Ok(x)
}

/// x behind step number `step` of a DDIM walk.
///
/// # Shapes
/// - x, output of one shape → that shape
pub fn next(walk: &Walk, step: usize, x: &Tensor, output: &Tensor) -> CandleResult<Tensor> {
    let (clean, noise) = walk.prediction.clean_and_noise(walk.levels[step].alpha, x, output)?;
    let alpha = walk.next_alphas[step];
    (clean * alpha.sqrt())? + (noise * (1.0 - alpha).sqrt())?
}

//! Euler steps in σ (Karras et al. 2022, algorithm 2 without churn) and their ancestral form: diffusers
//! `EulerDiscreteScheduler` and `EulerAncestralDiscreteScheduler`. x is clean + σ·noise here; the network sees it divided
//! by √(σ²+1), and the noise that it predicts is dx/dσ.

use anyhow::Result;
use candle_core::Tensor;

use super::{FreshNoise, Predict, Walk};

pub fn run(walk: &Walk, noise: &Tensor, predict: &mut Predict) -> Result<Tensor> {
    let sigmas = walk.sigmas();
    let mut x = (noise * walk.start_sigma)?;
    for step in 0..walk.levels.len() {
        let slope = slope(walk, step, &x, predict)?;
        x = (x + (slope * (sigmas[step + 1] - sigmas[step]))?)?;
    }
    Ok(x)
}

pub fn run_ancestral(walk: &Walk, noise: &Tensor, predict: &mut Predict, fresh: &mut FreshNoise) -> Result<Tensor> {
    let sigmas = walk.sigmas();
    let mut x = (noise * walk.start_sigma)?;
    for step in 0..walk.levels.len() {
        let slope = slope(walk, step, &x, predict)?;
        let (from, to) = (sigmas[step], sigmas[step + 1]);
        let up = (to * to * (from * from - to * to) / (from * from)).sqrt();
        let down = (to * to - up * up).sqrt();
        x = (x + (slope * (down - from))?)?;
        if up > 0.0 {
            x = (x + (fresh(step)? * up)?)?;
        }
    }
    Ok(x)
}

/// dx/dσ at the level of call `step`: the noise that the network sees.
fn slope(walk: &Walk, step: usize, x: &Tensor, predict: &mut Predict) -> Result<Tensor> {
    let level = walk.levels[step];
    // 1/√(σ²+1).
    let input = (x * level.alpha.sqrt())?;
    let output = predict(step, level, &input)?;
    Ok(walk.prediction.clean_and_noise(level.alpha, &input, &output)?.1)
}

//! DPM-Solver++ of the second order with two steps' memory, midpoint (Lu et al. 2022, algorithm 2): diffusers
//! `DPMSolverMultistepScheduler` with its defaults.

use anyhow::Result;
use candle_core::Tensor;

use super::{Predict, Walk};

pub fn run(walk: &Walk, noise: &Tensor, predict: &mut Predict) -> Result<Tensor> {
    let lambdas: Vec<f64> = walk.sigmas().into_iter().map(|sigma| -sigma.ln()).collect();
    let last = walk.levels.len() - 1;
    let mut x = noise.clone();
    let mut before: Option<Tensor> = None;
    for (step, &level) in walk.levels.iter().enumerate() {
        let clean = walk.clean(step, &x, &predict(step, level, &x)?)?;
        let next = walk.next_alphas[step];
        // λ is infinite behind the last step, and e^−h is 0.
        let shrink = (lambdas[step] - lambdas[step + 1]).exp_m1();
        let mut direction = clean.clone();
        // The last step, to no noise at all, is of the first order.
        if let Some(before) = before.filter(|_| step < last) {
            let ratio = (lambdas[step] - lambdas[step - 1]) / (lambdas[step + 1] - lambdas[step]);
            direction = (direction + ((&clean - before)? * (0.5 / ratio))?)?;
        }
        x = ((x * ((1.0 - next) / (1.0 - level.alpha)).sqrt())? - (direction * (next.sqrt() * shrink))?)?;
        before = Some(clean);
    }
    Ok(x)
}

//! UniPC of the second order with B₂(h) = e^h − 1 on the predicted picture (Zhao et al. 2023, algorithm 7): diffusers
//! `UniPCMultistepScheduler` with its defaults. Each call of the network first corrects the x that it was made for, then
//! predicts the next one.

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::{Predict, Walk};

/// The order of the solver: one call before the present one is remembered.
const ORDER: usize = 2;

/// A call of the network that is remembered.
struct Call {
    lambda: f64,
    clean: Tensor,
}

pub fn run(walk: &Walk, noise: &Tensor, predict: &mut Predict) -> Result<Tensor> {
    let lambdas: Vec<f64> = walk.sigmas().into_iter().map(|sigma| -sigma.ln()).collect();
    let steps = walk.levels.len();
    let mut x = noise.clone();
    // The x that the last prediction started from, and its order.
    let mut start: Option<(Tensor, usize)> = None;
    let mut calls: Vec<Call> = Vec::new();
    for (step, &level) in walk.levels.iter().enumerate() {
        let clean = walk.clean(step, &x, &predict(step, level, &x)?)?;
        if let Some((from, order)) = start {
            let span = Span::new(walk, &lambdas, step - 1);
            x = span.corrected(&from, &calls, &clean, order)?;
        }
        calls.push(Call { lambda: lambdas[step], clean });
        if calls.len() > ORDER {
            calls.remove(0);
        }
        let order = ORDER.min(steps - step).min(calls.len());
        let next = Span::new(walk, &lambdas, step).predicted(&x, &calls, order)?;
        start = Some((x, order));
        x = next;
    }
    Ok(x)
}

/// From the level of one call to the next.
struct Span {
    /// Factor of x where the span starts: σ_t/σ_s of √(1−ᾱ).
    keep: f64,
    /// √ᾱ where it ends.
    signal: f64,
    /// e^−h − 1, and −h itself.
    shrink: f64,
    minus_h: f64,
}

impl Span {
    fn new(walk: &Walk, lambdas: &[f64], step: usize) -> Self {
        let (from, to) = (walk.levels[step].alpha, walk.next_alphas[step]);
        let minus_h = lambdas[step] - lambdas[step + 1];
        Self { keep: ((1.0 - to) / (1.0 - from)).sqrt(), signal: to.sqrt(), shrink: minus_h.exp_m1(), minus_h }
    }

    /// The step of the first order that both forms refine by `direction`: x·σ_t/σ_s − √ᾱ·(e^−h − 1)·(last + direction).
    fn ended(&self, x: &Tensor, last: &Tensor, direction: Option<Tensor>) -> CandleResult<Tensor> {
        let towards = match direction {
            Some(direction) => (last + direction)?,
            None => last.clone(),
        };
        (x * self.keep)? - (towards * (self.signal * self.shrink))?
    }

    /// How the picture changed over the call before the last, by unit of the span.
    fn slope_before(&self, calls: &[Call]) -> CandleResult<(f64, Tensor)> {
        let [before, last] = calls else { candle_core::bail!("unipc: the second order needs two calls") };
        let ratio = (before.lambda - last.lambda) / -self.minus_h;
        Ok((ratio, ((&before.clean - &last.clean)? / ratio)?))
    }

    /// UniP.
    fn predicted(&self, x: &Tensor, calls: &[Call], order: usize) -> CandleResult<Tensor> {
        let direction = match order {
            1 => None,
            _ => Some((self.slope_before(calls)?.1 * 0.5)?),
        };
        self.ended(x, &calls[calls.len() - 1].clean, direction)
    }

    /// UniC: the same step again, with the picture `clean` that the network saw at its end.
    fn corrected(&self, x: &Tensor, calls: &[Call], clean: &Tensor, order: usize) -> CandleResult<Tensor> {
        let last = &calls[calls.len() - 1].clean;
        let change = (clean - last)?;
        let direction = match order {
            1 => (change * 0.5)?,
            _ => {
                let (ratio, before) = self.slope_before(calls)?;
                // ρ₁ + ρ₂ = b₁ and ρ₁·ratio + ρ₂ = b₂.
                let [first, second] = self.weights();
                let rho = (first - second) / (1.0 - ratio);
                ((before * rho)? + (change * (first - rho))?)?
            }
        };
        self.ended(x, last, Some(direction))
    }

    /// b₁ and b₂ of B₂: φ_k(−h)·k!/B, by recursion.
    fn weights(&self) -> [f64; 2] {
        let hh = self.minus_h;
        let phi_2 = self.shrink / hh - 1.0;
        let phi_3 = phi_2 / hh - 0.5;
        [phi_2 / self.shrink, 2.0 * phi_3 / self.shrink]
    }
}

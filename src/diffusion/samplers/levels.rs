//! Where samplers call the network: timesteps and σ = √((1−ᾱ)/ᾱ), spread over the schedule as diffusers spreads them.

use anyhow::Result;

use crate::diffusion::schedule::{NoiseSchedule, Spacing};
use crate::invalid::invalid;

/// Which noise levels a sampler takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// `steps` timesteps by the model's own spacing (diffusers' Euler schedulers).
    Timesteps,
    /// `steps + 1` timesteps by the model's own spacing, of which the last, the picture, is not called
    /// (DPMSolverMultistep, UniPCMultistep).
    SkipsLast,
    /// Even steps of σ^(1/7) (Karras et al. 2022, equation 5, ρ = 7).
    Karras,
}

impl Spread {
    /// Timestep and σ of each call; Karras levels between the largest and the smallest σ of the whole schedule, their
    /// timesteps rounded (as the multistep schedulers do).
    pub fn sigmas(self, schedule: &NoiseSchedule, steps: usize) -> Result<Vec<(f64, f64)>> {
        let (total, all) = (schedule.train_steps(), all_sigmas(schedule));
        if self == Self::Karras {
            check_steps(steps, total)?;
            let levels = karras(all[total - 1], all[0], steps);
            return Ok(levels.into_iter().map(|sigma| (timestep_of(sigma, &all).round_ties_even(), sigma)).collect());
        }
        let timesteps = match self {
            Self::SkipsLast => skipping_last(schedule, steps)?,
            _ => timesteps(schedule, steps)?,
        };
        Ok(timesteps.into_iter().map(|t| (t, interpolated(&all, t))).collect())
    }

    /// The same, but Karras levels between the first and the last σ of [`Spread::Timesteps`], their timesteps not rounded
    /// (as EulerDiscrete does).
    pub fn sigmas_between(self, schedule: &NoiseSchedule, steps: usize) -> Result<Vec<(f64, f64)>> {
        let plain = Self::Timesteps.sigmas(schedule, steps)?;
        if self != Self::Karras {
            return Ok(plain);
        }
        let all = all_sigmas(schedule);
        let levels = karras(plain[0].1, plain[steps - 1].1, steps);
        Ok(levels.into_iter().map(|sigma| (timestep_of(sigma, &all), sigma)).collect())
    }
}

/// What the start noise of a sampler with x = clean + σ·noise is multiplied by: σ itself where the spacing begins at the
/// last timestep, all noise; else x is a mixture already and as large as one.
pub fn start_sigma(schedule: &NoiseSchedule, levels: &[(f64, f64)]) -> f64 {
    let first = levels.first().map_or(1.0, |level| level.1);
    match schedule.config().timestep_spacing {
        Spacing::Linspace | Spacing::Trailing => first,
        Spacing::Leading => (first * first + 1.0).sqrt(),
    }
}

/// √((1−ᾱ)/ᾱ), where nothing is left of the picture that of 2⁻²⁴, as in diffusers.
pub fn sigma_of(alpha: f64) -> f64 {
    let alpha = alpha.max(2.0_f64.powi(-24));
    ((1.0 - alpha) / alpha).sqrt()
}

fn all_sigmas(schedule: &NoiseSchedule) -> Vec<f64> {
    (0..schedule.train_steps()).map(|t| sigma_of(schedule.alpha_cumprod(t))).collect()
}

fn check_steps(steps: usize, most: usize) -> Result<()> {
    match (1..=most).contains(&steps) {
        true => Ok(()),
        false => Err(invalid(format!("--steps {steps}: must lie in 1..={most} for this sampler"))),
    }
}

/// DDIM's, but that even spacing from the first to the last is not rounded.
fn timesteps(schedule: &NoiseSchedule, steps: usize) -> Result<Vec<f64>> {
    let rounded = schedule.sampling_timesteps(steps)?;
    if schedule.config().timestep_spacing != Spacing::Linspace || steps == 1 {
        return Ok(rounded.into_iter().map(|t| t as f64).collect());
    }
    let last = (schedule.train_steps() - 1) as f64;
    Ok((0..steps).rev().map(|i| i as f64 * last / (steps - 1) as f64).collect())
}

fn skipping_last(schedule: &NoiseSchedule, steps: usize) -> Result<Vec<f64>> {
    let (total, config) = (schedule.train_steps(), schedule.config());
    check_steps(steps, total - 1)?;
    let last = total - 1;
    Ok((1..=steps)
        .rev()
        .map(|i| match config.timestep_spacing {
            Spacing::Leading => (i * (total / (steps + 1)) + config.steps_offset).min(last) as f64,
            Spacing::Trailing => (i as f64 * total as f64 / steps as f64).round_ties_even() - 1.0,
            // In this order, as numpy multiplies: 15·(999/30) falls just below 499.5.
            Spacing::Linspace => (i as f64 * (last as f64 / steps as f64)).round_ties_even(),
        })
        .collect())
}

fn karras(largest: f64, smallest: f64, steps: usize) -> Vec<f64> {
    const RHO: f64 = 7.0;
    let (high, low) = (largest.powf(1.0 / RHO), smallest.powf(1.0 / RHO));
    let at = |i: usize| (high + i as f64 / (steps - 1).max(1) as f64 * (low - high)).powf(RHO);
    (0..steps).map(at).collect()
}

/// σ at a timestep between two of the schedule's.
fn interpolated(sigmas: &[f64], timestep: f64) -> f64 {
    let low = (timestep.max(0.0) as usize).min(sigmas.len() - 1);
    let high = (low + 1).min(sigmas.len() - 1);
    sigmas[low] + (sigmas[high] - sigmas[low]) * (timestep - low as f64)
}

/// The timestep whose σ this is, between two of the schedule's by log σ.
fn timestep_of(sigma: f64, sigmas: &[f64]) -> f64 {
    let high = sigmas.partition_point(|&other| other <= sigma).clamp(1, sigmas.len() - 1);
    let (below, above) = (sigmas[high - 1].ln(), sigmas[high].ln());
    let share = ((sigma.ln() - below) / (above - below)).clamp(0.0, 1.0);
    (high - 1) as f64 + share
}

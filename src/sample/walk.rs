//! The guided walk of a batch from noise to latents. The sampler knows the targets alone; the references join them for each
//! call of the network, at its noise level (the replacement trick).

use anyhow::{Result, ensure};
use candle_core::{DType, Result as CandleResult, Tensor};

use super::conditions::Conditions;
use super::noise::{BatchNoise, GivenNoise};
use super::pipeline::Pipeline;
use super::request::{Rounds, SampleSettings, SetRequest};
use crate::diffusion::Level;
use crate::diffusion::schedule::PredictionType;
use crate::shape::SetShape;

/// A call of the network that is done.
pub struct Step<'a> {
    /// From 0.
    pub number: usize,
    level: Level,
    prediction: PredictionType,
    x: &'a Tensor,
    output: &'a Tensor,
}

impl Step<'_> {
    /// The clean latents of the targets as the network sees them now, `[b·targets, c, h, w]`.
    pub fn clean(&self) -> CandleResult<Tensor> {
        Ok(self.prediction.clean_and_noise(self.level.alpha, self.x, self.output)?.0)
    }
}

impl Pipeline {
    /// The final latents of the targets, `[b·targets, c, h, w]`.
    pub(super) fn paint_batch(
        &self,
        sets: &[SetRequest],
        settings: &SampleSettings,
        given: Option<&GivenNoise>,
        watch: &mut dyn FnMut(&Step) -> Result<()>,
    ) -> Result<Tensor> {
        let device = &self.runtime.device;
        let (n_references, n_targets) = (sets[0].references.len(), sets[0].prompts.len());
        ensure!(
            sets.iter().all(|set| set.references.len() == n_references
                && set.prompts.len() == n_targets
                && set.seeds.len() == n_targets),
            "sets of one batch must have one shape"
        );
        let shape = SetShape::new(sets.len(), n_references + n_targets);
        let seeds: Vec<&[u64]> = sets.iter().map(|set| set.seeds.as_slice()).collect();
        let latent = self.latent_shape(settings.size);
        let noise = BatchNoise { seeds: &seeds, references: n_references, latent, given };

        let known = self.known(sets, settings)?;
        let conditions = self.conditions(sets, shape, known.as_ref(), settings)?;
        let walk = settings.sampler.walk(&self.schedule, settings.steps)?;
        let prediction = self.schedule.config().prediction_type;
        let mut predict = |number: usize, level: Level, x: &Tensor| -> Result<Tensor> {
            let all = match &known {
                Some(known) => with_references(known, &noise.references_at(number, device)?, level.alpha, x, shape)?,
                None => x.clone(),
            };
            let predictions = self.predict(&all, level, &conditions, shape, settings)?;
            let targets = predictions.iter().map(|all| targets_of(all, shape, n_references));
            let targets = targets.collect::<Result<Vec<_>>>()?;
            let output = settings.restraint.combine(settings.guidance, &targets)?;
            watch(&Step { number, level, prediction, x, output: &output })?;
            Ok(output)
        };
        walk.run(&noise.start(device)?, &mut predict, &mut |step| noise.fresh_at(step, device))
    }

    /// The final latents of sets of one picture without references, `[b, c, h, w]`, painted in `rounds`. `revise` hears of
    /// every call of the network, and may put another output in the place of the guided one.
    pub(super) fn paint_alone(
        &self,
        sets: &[SetRequest],
        conditions: &Conditions,
        settings: &SampleSettings,
        given: Option<&GivenNoise>,
        rounds: Rounds,
        revise: &mut dyn FnMut(Level, &Tensor, Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let device = &self.runtime.device;
        let shape = SetShape::new(sets.len(), 1);
        let seeds: Vec<&[u64]> = sets.iter().map(|set| set.seeds.as_slice()).collect();
        let noise = BatchNoise { seeds: &seeds, references: 0, latent: self.latent_shape(settings.size), given };
        let walk = settings.sampler.walk(&self.schedule, settings.steps)?;
        let mut predict = |_: usize, level: Level, x: &Tensor| -> Result<Tensor> {
            let predictions = self.predict(x, level, conditions, shape, settings)?;
            revise(level, x, settings.restraint.combine(settings.guidance, &predictions)?)
        };
        let mut x = walk.run(&noise.start(device)?, &mut predict, &mut |step| noise.fresh_at(step, device))?;
        let late = rounds.from * self.schedule.train_steps() as f64;
        let Some(tail) = walk.tail(late).filter(|_| rounds.count > 1) else { return Ok(x) };
        for again in 1..rounds.count {
            let alpha = tail.levels()[0].alpha;
            x = ((x * alpha.sqrt())? + (noise.over_at(again, device)? * (1.0 - alpha).sqrt())?)?;
            x = tail.run(&x, &mut predict, &mut |step| noise.fresh_at(again * settings.steps + step, device))?;
        }
        Ok(x)
    }

    /// One prediction a branch, `[b·n, c, h, w]` each, f32 whatever the network computes in.
    pub(super) fn predict(
        &self,
        x: &Tensor,
        level: Level,
        conditions: &Conditions,
        shape: SetShape,
        settings: &SampleSettings,
    ) -> Result<Vec<Tensor>> {
        let x = x.to_dtype(self.runtime.dtype)?;
        let branches = settings.guidance.branches().len();
        let at_once = if settings.is_frugal { 1 } else { branches };
        let mut predictions = Vec::with_capacity(branches);
        for first in (0..branches).step_by(at_once) {
            let own = conditions.of_branches(first, at_once, shape.total())?;
            let input = own.input(&Tensor::cat(&vec![&x; at_once], 0)?)?; // [branches·b·n, in_channels, h, w]
            let all = SetShape::new(at_once * shape.sets, shape.images);
            let timesteps = Tensor::from_vec(vec![level.timestep as f32; all.sets], all.sets, &self.runtime.device)?;
            let output =
                self.unet.forward_seeing(&input, &timesteps, own.told(), all, &own.sight(self.probe.as_ref()))?;
            for branch in 0..at_once {
                predictions.push(output.narrow(0, branch * shape.total(), shape.total())?.to_dtype(DType::F32)?);
            }
        }
        Ok(predictions)
    }
}

/// The replacement trick (§3.3): at every call the known images are their clean latents with fresh noise, at the noise
/// level that the network is told.
///
/// # Shapes
/// - known, noise `[b·references, c, h, w]`, x `[b·targets, c, h, w]` → `[b·n, c, h, w]`
fn with_references(known: &Tensor, noise: &Tensor, alpha: f64, x: &Tensor, shape: SetShape) -> Result<Tensor> {
    let noisy = ((known * alpha.sqrt())? + (noise * (1.0 - alpha).sqrt())?)?;
    let (_, c, h, w) = x.dims4()?;
    let n_references = known.dim(0)? / shape.sets;
    let noisy = noisy.reshape((shape.sets, n_references, c, h, w))?; // [b, references, c, h, w]
    let targets = x.reshape((shape.sets, shape.images - n_references, c, h, w))?; // [b, targets, c, h, w]
    Ok(Tensor::cat(&[&noisy, &targets], 1)?.reshape((shape.total(), c, h, w))?) // [b·n, c, h, w]
}

/// # Shapes
/// - all `[b·n, c, h, w]` → `[b·targets, c, h, w]`
fn targets_of(all: &Tensor, shape: SetShape, n_references: usize) -> Result<Tensor> {
    let (_, c, h, w) = all.dims4()?;
    let n_targets = shape.images - n_references;
    let targets = all.reshape((shape.sets, shape.images, c, h, w))?.narrow(1, n_references, n_targets)?;
    Ok(targets.contiguous()?.reshape((shape.sets * n_targets, c, h, w))?) // [b·targets, c, h, w]
}

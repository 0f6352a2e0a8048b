//! The guided walk of a batch from noise to latents, with the replacement trick.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};

use super::conditions::Conditions;
use super::noise::{BatchNoise, GivenNoise};
use super::pipeline::Pipeline;
use super::request::{SampleSettings, SetRequest};
use crate::shape::SetShape;

impl Pipeline {
    /// The final latents of the targets, `[b·targets, c, h, w]`.
    pub(super) fn paint_batch(
        &self,
        sets: &[SetRequest],
        settings: &SampleSettings,
        given: Option<&GivenNoise>,
        on_step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Tensor> {
        let (device, dtype) = (&self.runtime.device, self.runtime.dtype);
        let (n_references, n_targets) = (sets[0].references.len(), sets[0].prompts.len());
        ensure!(
            sets.iter().all(|set| set.references.len() == n_references
                && set.prompts.len() == n_targets
                && set.seeds.len() == n_targets),
            "sets of one batch must have one shape"
        );
        let shape = SetShape::new(sets.len(), n_references + n_targets);
        let latent = self.latent_shape(settings.size);
        let seeds: Vec<&[u64]> = sets.iter().map(|set| set.seeds.as_slice()).collect();
        let noise = BatchNoise { seeds: &seeds, references: n_references, latent, given };

        let known = self.known(sets, shape, latent)?;
        let conditions = self.conditions(sets, shape, &known, settings.guidance.branches())?;
        let walk = settings.sampler.walk(&self.schedule, settings.steps)?;
        let mut x = noise.start(device)?; // [b·n, c, h, w]
        for (step, &timestep) in walk.timesteps().iter().enumerate() {
            if n_references > 0 {
                x = self.with_references(&x, &known, &noise.references_at(step, device)?, timestep, shape)?;
            }
            let predictions = self.predict(&x.to_dtype(dtype)?, timestep, &conditions, shape)?;
            x = walk.step(step, &x, &settings.guidance.combine(&predictions)?.to_dtype(DType::F32)?)?;
            on_step()?;
        }
        targets_of(&x, shape, n_references)
    }

    /// The replacement trick (§3.3): at every step the known images are their clean latents with fresh noise.
    fn with_references(
        &self,
        x: &Tensor,
        known: &Option<Tensor>,
        noise: &Tensor,
        timestep: usize,
        shape: SetShape,
    ) -> Result<Tensor> {
        let Some(known) = known else { return Ok(x.clone()) };
        let noisy = self.schedule.add_noise(known, noise, &vec![timestep; known.dim(0)?])?;
        let (_, c, h, w) = x.dims4()?;
        let n_references = known.dim(0)? / shape.sets;
        let noisy = noisy.reshape((shape.sets, n_references, c, h, w))?; // [b, references, c, h, w]
        let x = x.reshape((shape.sets, shape.images, c, h, w))?; // [b, n, c, h, w]
        let targets = x.narrow(1, n_references, shape.images - n_references)?;
        Ok(Tensor::cat(&[&noisy, &targets.contiguous()?], 1)?.reshape((shape.total(), c, h, w))?) // [b·n, c, h, w]
    }

    /// One prediction a branch.
    fn predict(&self, x: &Tensor, timestep: usize, conditions: &Conditions, shape: SetShape) -> Result<Vec<Tensor>> {
        let x = Tensor::cat(&vec![x; conditions.branches], 0)?; // [branches·b·n, c, h, w]
        let input = match &conditions.channels {
            None => x,
            Some(channels) => {
                let (total, extra, ..) = channels.dims4()?;
                let (_, _, h, w) = x.dims4()?;
                Tensor::cat(&[&x, &channels.broadcast_as((total, extra, h, w))?.contiguous()?], 1)?
            }
        };
        let all = SetShape::new(conditions.branches * shape.sets, shape.images);
        let timesteps = Tensor::from_vec(vec![timestep as i64; all.sets], all.sets, &self.runtime.device)?;
        let output = self.unet.forward(&input, &timesteps, &conditions.context, all)?;
        Ok((0..conditions.branches)
            .map(|branch| output.narrow(0, branch * shape.total(), shape.total()))
            .collect::<candle_core::Result<_>>()?)
    }
}

/// # Shapes
/// - x `[b·n, c, h, w]` → `[b·targets, c, h, w]`
fn targets_of(x: &Tensor, shape: SetShape, n_references: usize) -> Result<Tensor> {
    let (_, c, h, w) = x.dims4()?;
    let n_targets = shape.images - n_references;
    let x = x.reshape((shape.sets, shape.images, c, h, w))?.narrow(1, n_references, n_targets)?;
    Ok(x.contiguous()?.reshape((shape.sets * n_targets, c, h, w))?) // [b·targets, c, h, w]
}

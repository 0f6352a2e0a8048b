//! The noise of a sampling run: drawn for each picture from its own seed, or given.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Device, Tensor};

use crate::invalid::invalid;
use crate::model::files::read_safetensors;
use crate::rng::Rng;

/// Noise that other programs hand in (`jedi sample --noise`).
#[derive(Clone, Debug)]
pub struct GivenNoise {
    /// Start noise of the generated images, `[k, c, h, w]`.
    pub target: Tensor,
    /// Noise of the replacement trick, `[steps, n, c, h, w]`, the same for every set; not needed without references.
    pub reference: Option<Tensor>,
    /// Noise of an ancestral sampler's steps, `[steps, k, c, h, w]`; drawn from the seeds where it is not given.
    pub ancestral: Option<Tensor>,
}

impl GivenNoise {
    /// Reads `target` and, where they are there, `reference` and `ancestral` of a safetensors file.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display();
        if !path.is_file() {
            return Err(invalid(format!("--noise {name}: no such file; check the path")));
        }
        let mut tensors = read_safetensors(path)?;
        let mut take = |key| tensors.remove(key).map(|tensor| tensor.to_dtype(DType::F32)).transpose();
        let target = take("target")?.with_context(|| format!("{name}: tensor target is missing"))?;
        Ok(Self { target, reference: take("reference")?, ancestral: take("ancestral")? })
    }

    /// The noise of `count` targets from number `first` on.
    pub fn of_targets(&self, first: usize, count: usize) -> Result<Self> {
        let of_steps = |ancestral: &Tensor| ancestral.narrow(1, first, count);
        Ok(Self {
            target: self.target.narrow(0, first, count)?,
            reference: self.reference.clone(),
            ancestral: self.ancestral.as_ref().map(of_steps).transpose()?,
        })
    }

    /// Checks the shapes against a run of `targets` images (of all sets) of `latent` (c, h, w) with `references` over `steps`.
    pub fn validate(
        &self,
        targets: usize,
        references: usize,
        steps: usize,
        latent: (usize, usize, usize),
    ) -> Result<()> {
        let (c, h, w) = latent;
        let found = self.target.dims();
        ensure!(
            found == [targets, c, h, w],
            "--noise: tensor target is {found:?}, this run needs {:?}",
            [targets, c, h, w]
        );
        if references > 0 {
            let expected = [steps, references, c, h, w];
            let reference = self.reference.as_ref();
            let found = reference.with_context(|| format!("--noise: tensor reference {expected:?} is missing"))?.dims();
            ensure!(found == expected, "--noise: tensor reference is {found:?}, this run needs {expected:?}");
        }
        if let Some(ancestral) = &self.ancestral {
            let (expected, found) = ([steps, targets, c, h, w], ancestral.dims());
            ensure!(found == expected, "--noise: tensor ancestral is {found:?}, this run needs {expected:?}");
        }
        Ok(())
    }
}

/// Start noise of the picture with this seed.
///
/// # Shapes
/// - `[c, h, w]` on the host
pub fn target_noise(seed: u64, (c, h, w): (usize, usize, usize)) -> Result<Tensor> {
    Ok(Rng::new(seed, "target noise", 0).normal_tensor(&[c, h, w])?)
}

/// Noise of the replacement trick for reference number `reference` at step `step` of the set whose first picture has this
/// seed.
///
/// # Shapes
/// - `[c, h, w]` on the host
pub fn reference_noise(seed: u64, step: usize, reference: usize, (c, h, w): (usize, usize, usize)) -> Result<Tensor> {
    let index = (step as u64) << 32 | reference as u64;
    Ok(Rng::new(seed, "reference noise", index).normal_tensor(&[c, h, w])?)
}

/// Noise that an ancestral sampler adds at step `step` to the picture with this seed.
///
/// # Shapes
/// - `[c, h, w]` on the host
pub fn ancestral_noise(seed: u64, step: usize, (c, h, w): (usize, usize, usize)) -> Result<Tensor> {
    Ok(Rng::new(seed, "ancestral noise", step as u64).normal_tensor(&[c, h, w])?)
}

/// Noise over the picture with this seed before it is painted again, for the time of number `again`.
///
/// # Shapes
/// - `[c, h, w]` on the host
pub fn noise_again(seed: u64, again: usize, (c, h, w): (usize, usize, usize)) -> Result<Tensor> {
    Ok(Rng::new(seed, "noise again", again as u64).normal_tensor(&[c, h, w])?)
}

/// All noise of a batch of sets.
pub struct BatchNoise<'a> {
    /// Seeds of the targets of each set.
    pub seeds: &'a [&'a [u64]],
    /// References a set.
    pub references: usize,
    /// (c, h, w).
    pub latent: (usize, usize, usize),
    /// Holds the targets of all sets of the batch.
    pub given: Option<&'a GivenNoise>,
}

impl BatchNoise<'_> {
    /// # Shapes
    /// - `[b·targets, c, h, w]`: the targets' start noise
    pub fn start(&self, device: &Device) -> Result<Tensor> {
        match self.given {
            Some(given) => Ok(given.target.to_device(device)?),
            None => self.of_targets(|seed| target_noise(seed, self.latent), device),
        }
    }

    /// # Shapes
    /// - `[b·targets, c, h, w]`: what an ancestral sampler adds at step `step`
    pub fn fresh_at(&self, step: usize, device: &Device) -> Result<Tensor> {
        match self.given.and_then(|given| given.ancestral.as_ref()) {
            Some(ancestral) => Ok(ancestral.get(step)?.to_device(device)?),
            None => self.of_targets(|seed| ancestral_noise(seed, step, self.latent), device),
        }
    }

    /// # Shapes
    /// - `[b·targets, c, h, w]`: what lies over the targets before they are painted again, for the time of number `again`
    pub fn over_at(&self, again: usize, device: &Device) -> Result<Tensor> {
        self.of_targets(|seed| noise_again(seed, again, self.latent), device)
    }

    fn of_targets(&self, noise: impl Fn(u64) -> Result<Tensor>, device: &Device) -> Result<Tensor> {
        let all = self.seeds.concat().into_iter().map(noise).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&all, 0)?.to_device(device)?)
    }

    /// # Shapes
    /// - `[b·references, c, h, w]`
    pub fn references_at(&self, step: usize, device: &Device) -> Result<Tensor> {
        let mut all = Vec::new();
        for seeds in self.seeds {
            for reference in 0..self.references {
                all.push(match self.given.and_then(|given| given.reference.as_ref()) {
                    Some(given) => given.get(step)?.get(reference)?,
                    None => reference_noise(seeds[0], step, reference, self.latent)?,
                });
            }
        }
        Ok(Tensor::stack(&all, 0)?.to_device(device)?)
    }
}

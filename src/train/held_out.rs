//! The held-out loss: sets that are never trained on, always the same noise and timesteps, told by source and by timestep.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use candle_core::Tensor;

use super::batch::{Batch, Denoiser};
use super::latents::Encoder;
use super::share::Share;
use crate::data::SetSource;
use crate::diffusion::NoiseSchedule;
use crate::rng::Rng;
use crate::shape::SetShape;

/// Sets of a source, and images in each, where it has as many.
const SHAPE: SetShape = SetShape { sets: 32, images: 3 };
/// Ranges that the timesteps are told in.
const BUCKETS: usize = 4;

/// A part of the held-out loss: its name, and sum and number of the sets that fall into it.
pub type PartLoss = (String, f64, usize);

/// Held-out sets of each source.
pub struct HeldOut {
    sources: Vec<(String, Batch)>,
    train_steps: usize,
    /// Through the networks at a time.
    images_at_once: usize,
}

impl HeldOut {
    /// The first sets of each source with their first image given, at timesteps spread evenly.
    pub fn new(
        encoder: &Encoder,
        sources: &[(String, Arc<dyn SetSource>)],
        schedule: &NoiseSchedule,
        seed: u64,
        images_at_once: usize,
    ) -> Result<Self> {
        let train_steps = schedule.train_steps();
        let held = |(name, source): &(String, Arc<dyn SetSource>)| -> Result<(String, Batch)> {
            let batch =
                batch(encoder, source.as_ref(), train_steps, seed).with_context(|| format!("validation {name}"))?;
            Ok((name.clone(), batch))
        };
        let sources = sources.iter().map(held).collect::<Result<_>>()?;
        Ok(Self { sources, train_steps, images_at_once })
    }

    /// What a share of each source's sets adds to the mean loss of them all, and to each part: a source, and a source's sets of
    /// a range of timesteps. Every share tells of the same parts.
    pub fn losses(&self, denoiser: Denoiser, share: Share) -> Result<(f64, Vec<PartLoss>)> {
        let n_all: usize = self.sources.iter().map(|(_, batch)| batch.shape.sets).sum();
        let (mut total, mut parts): (f64, Vec<PartLoss>) = (0.0, vec![]);
        for (name, batch) in &self.sources {
            let own = share.range(batch.shape.sets);
            let sets_at_once = (self.images_at_once / batch.shape.images).max(1);
            let mut losses = Vec::with_capacity(own.len());
            for first in own.clone().step_by(sets_at_once) {
                let sets = batch.sets(first..(first + sets_at_once).min(own.end))?;
                losses.extend(denoiser.losses_of_sets(&sets)?);
            }
            total += losses.iter().sum::<f64>() / n_all as f64;
            parts.push((name.clone(), losses.iter().sum(), losses.len()));
            for bucket in 0..BUCKETS {
                let [low, high] = [bucket, bucket + 1].map(|edge| edge * self.train_steps / BUCKETS);
                let timesteps = &batch.timesteps[own.clone()];
                let inside = timesteps.iter().zip(&losses).filter(|(t, _)| (low..high).contains(t));
                let losses: Vec<f64> = inside.map(|(_, loss)| *loss).collect();
                parts.push((format!("{name}/t{low:03}-{:03}", high - 1), losses.iter().sum(), losses.len()));
            }
        }
        Ok((total, parts))
    }
}

fn batch(encoder: &Encoder, source: &dyn SetSource, train_steps: usize, seed: u64) -> Result<Batch> {
    let images = SHAPE.images.min(source.read(0)?.images.len());
    let shape = SetShape { sets: SHAPE.sets.min(source.n_sets()), images };
    let (mut clean, mut tokens) = (Vec::new(), Vec::new());
    for set_idx in 0..shape.sets {
        let set = source.read(set_idx)?;
        ensure!(
            set.images.len() >= images,
            "validation set number {set_idx} needs {images} pictures, as the first one has"
        );
        clean.extend_from_slice(&encoder.latents(&set.images)?[..images]);
        tokens.extend_from_slice(&encoder.tokens(&set.captions)?[..images]);
    }
    let clean = Tensor::stack(&clean, 0)?; // [b·n, c, h, w]
    let noise = Rng::new(seed, "validation noise", 0).normal_tensor(clean.dims())?;
    let timesteps = (0..shape.sets).map(|i| (2 * i + 1) * train_steps / (2 * shape.sets)).collect();
    // An image alone has nothing to be given.
    let masked = (0..shape.total()).map(|i| images == 1 || i % images != 0).collect();
    Ok(Batch { shape, clean, noise, weights: None, masked, timesteps, tokens, context: None })
}

//! The judge: which toy and which scene does a picture show?
//!
//! It chooses among the toys of a closed world, mostly by their colours and how these lie together: a toy with the right
//! colours and the wrong ears is still nearer to its model than to any other. Measured by `tests/judge.rs`, also on
//! scenes in which it never saw the toy.

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use image::RgbImage;
use rayon::prelude::*;
use serde::Serialize;

use super::discriminant::Discriminant;
use super::patches::Patches;
use super::soften::{Softness, soften};
use super::world::{Labelled, World};
use crate::rng::Rng;

/// In units of the features' mean variance. 0.001 and 0.01 judge alike; 0.1 cost three points under a blur of 2 px.
const RIDGE: f64 = 0.003;

/// How the judge is made; with the same settings and pictures it is the same judge.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct JudgeSettings {
    /// Of the pictures that it is fitted to.
    pub seed: u64,
    /// Typical patches that pictures are compared with.
    pub n_filters: usize,
    /// Pictures of every toy in every scene that the caller draws for fitting.
    pub variations: u64,
}

impl Default for JudgeSettings {
    fn default() -> Self {
        Self { seed: 0, n_filters: 200, variations: 5 }
    }
}

/// A fitted judge.
pub struct Judge {
    world: World,
    patches: Patches,
    discriminant: Discriminant,
}

/// What the judge sees in one picture: a score for every toy and every scene; the highest is the answer.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// One a toy, the largest wins.
    pub toy_scores: Vec<f32>,
    /// One a scene.
    pub scene_scores: Vec<f32>,
}

impl Judge {
    /// Fits a judge to real pictures. To keep it from learning which toy goes with which scene they must hold every toy
    /// in every scene equally often ([`World::draw_all`]). Half of them are softened.
    pub fn fit(world: &World, samples: &[Labelled], settings: &JudgeSettings) -> Result<Self> {
        world.check()?;
        ensure!(settings.n_filters > 0, "judge: it needs at least one filter");
        for Labelled { label, .. } in samples {
            ensure!(
                label.toy < world.n_toys() && label.scene < world.n_scenes(),
                "judge: {label:?} is not in a world of {} toys and {} scenes",
                world.n_toys(),
                world.n_scenes()
            );
        }
        let images: Vec<RgbImage> = samples
            .par_iter()
            .enumerate()
            .map(|(index, sample)| vary(&sample.image, &mut Rng::new(settings.seed, "judge soften", index as u64)))
            .collect();
        let patches = Patches::fit(&images, settings.n_filters, &mut Rng::new(settings.seed, "judge patches", 0))?;
        let discriminant = Discriminant::fit(&patches.features(&images)?, &targets(world, samples)?, RIDGE)?;
        Ok(Self { world: world.clone(), patches, discriminant })
    }

    /// The world it answers in.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// What it sees in each of `images`.
    pub fn verdicts(&self, images: &[RgbImage]) -> Result<Vec<Verdict>> {
        if images.is_empty() {
            return Ok(vec![]);
        }
        let scores = self.discriminant.scores(&self.patches.features(images)?)?.to_vec2::<f32>()?; // [k, toys + scenes]
        let verdict = |row: &Vec<f32>| {
            let (toys, scenes) = row.split_at(self.world.n_toys());
            Verdict { toy_scores: toys.to_vec(), scene_scores: scenes.to_vec() }
        };
        Ok(scores.iter().map(verdict).collect())
    }
}

impl Verdict {
    /// The toy it takes the picture for.
    pub fn toy(&self) -> usize {
        best(&self.toy_scores, 0..self.toy_scores.len())
    }

    /// The same when told the kind: the best among `toys`.
    pub fn toy_among(&self, toys: impl Iterator<Item = usize>) -> usize {
        best(&self.toy_scores, toys)
    }

    /// The scene it takes the picture for.
    pub fn scene(&self) -> usize {
        best(&self.scene_scores, 0..self.scene_scores.len())
    }
}

/// The first of `candidates` with the highest score; 0 if there are none.
fn best(scores: &[f32], candidates: impl Iterator<Item = usize>) -> usize {
    candidates.reduce(|best, next| if scores[next] > scores[best] { next } else { best }).unwrap_or(0)
}

/// Every second picture softened by a random amount.
fn vary(image: &RgbImage, rng: &mut Rng) -> RgbImage {
    if rng.chance(0.5) {
        return image.clone();
    }
    let softness = Softness { sigma_px: rng.between(0.3, 1.6), noise: rng.between(0.0, 12.0) };
    soften(image, softness, rng)
}

/// One for the toy and one for the scene, `[k, toys + scenes]`.
fn targets(world: &World, samples: &[Labelled]) -> Result<Tensor> {
    let classes = world.n_toys() + world.n_scenes();
    let mut targets = vec![0f32; samples.len() * classes];
    for (row, Labelled { label, .. }) in targets.chunks_exact_mut(classes).zip(samples) {
        row[label.toy] = 1.0;
        row[world.n_toys() + label.scene] = 1.0;
    }
    Ok(Tensor::from_vec(targets, (samples.len(), classes), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_the_highest_of_those_allowed() {
        let verdict = Verdict { toy_scores: vec![0.9, 0.2, 0.3], scene_scores: vec![-0.2, -0.1] };
        assert_eq!((verdict.toy(), verdict.scene()), (0, 1));
        assert_eq!(verdict.toy_among([1, 2].into_iter()), 2);
    }
}

//! The closed world that the judge answers in: so many toys of so many kinds, so many scenes.

use std::ops::Range;

use anyhow::{Result, ensure};
use image::RgbImage;
use rayon::prelude::*;

/// Toys and scenes by number; kinds group the toys.
#[derive(Clone, Debug)]
pub struct World {
    /// The kind of every toy.
    pub kinds: Vec<usize>,
    /// The name of every scene.
    pub scenes: Vec<String>,
    /// How many wordings a prompt can have.
    pub n_wordings: usize,
}

/// What a picture shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// The number of the toy.
    pub toy: usize,
    /// The number of the scene.
    pub scene: usize,
}

/// A picture of which the answer is known.
#[derive(Clone)]
pub struct Labelled {
    /// The picture.
    pub image: RgbImage,
    /// What it shows.
    pub label: Label,
}

/// Draws a real picture. The number is the variation (pose, details of the scene): another number, another picture.
pub type Draw<'a> = dyn Fn(Label, u64) -> RgbImage + Sync + 'a;

impl World {
    /// Fails on a world in which nothing can be told apart.
    pub fn check(&self) -> Result<()> {
        let (toys, scenes) = (self.kinds.len(), self.scenes.len());
        ensure!(
            toys > 1 && scenes > 1,
            "world: {toys} toys in {scenes} scenes leave nothing to tell apart; use two of each"
        );
        ensure!(self.n_wordings > 0, "world: there is no wording for a prompt; give at least one");
        Ok(())
    }

    /// Toys that can be answered.
    pub fn n_toys(&self) -> usize {
        self.kinds.len()
    }

    /// Scenes that can be answered.
    pub fn n_scenes(&self) -> usize {
        self.scenes.len()
    }

    /// Numbers of the toys of a kind.
    pub fn toys_of_kind(&self, kind: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.n_toys()).filter(move |&toy| self.kinds[toy] == kind)
    }

    /// Every toy in every scene, equally often, so that a scene says nothing about a toy: `variations.len()` pictures a
    /// pair. Ranges that do not overlap give pictures that do not repeat.
    pub fn draw_all(&self, variations: Range<u64>, draw: &Draw) -> Vec<Labelled> {
        let labels = (0..self.n_toys()).flat_map(|toy| (0..self.n_scenes()).map(move |scene| Label { toy, scene }));
        let asked: Vec<(Label, u64)> = labels.flat_map(|label| variations.clone().map(move |v| (label, v))).collect();
        asked.into_par_iter().map(|(label, variation)| Labelled { image: draw(label, variation), label }).collect()
    }
}

//! Which sets and which of their images a training step sees: a function of (seed, step) alone.

use anyhow::{Result, ensure};

use crate::invalid::invalid;
use crate::rng::Rng;
use crate::shape::SetShape;

/// How steps are filled.
#[derive(Clone, Debug)]
pub struct LoaderSettings {
    /// Of the order of sets and of the set sizes.
    pub seed: u64,
    /// Images a step, b·n; every set size must divide it.
    pub images_per_step: usize,
    /// n is drawn evenly from these at every step.
    pub set_sizes: Vec<usize>,
}

/// The sets of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchPlan {
    /// Sets in the batch, images in each.
    pub shape: SetShape,
    /// One a set of the batch: its number in the source.
    pub set_idxs: Vec<usize>,
}

/// Deals out the sets of a source: each once an epoch, every epoch in another order.
pub struct Loader {
    settings: LoaderSettings,
    n_sets: usize,
    /// The step that `dealt` belongs to.
    step: u64,
    /// Sets dealt before `step`.
    dealt: usize,
    epoch: Option<(usize, Vec<usize>)>,
}

impl Loader {
    /// Deals out `n_sets` sets; refuses set sizes that do not fill a step.
    pub fn new(settings: LoaderSettings, n_sets: usize) -> Result<Self> {
        ensure!(n_sets > 0, "the data source holds no sets");
        if settings.set_sizes.is_empty() {
            return Err(invalid("joint.set_sizes: is empty; give at least one set size"));
        }
        let images = settings.images_per_step;
        for &n in &settings.set_sizes {
            if n == 0 || images == 0 || !images.is_multiple_of(n) {
                return Err(invalid(format!("run.images_per_step {images}: not a multiple of the set size {n}")));
            }
        }
        Ok(Self { settings, n_sets, step: 0, dealt: 0, epoch: None })
    }

    /// The sets of `step`.
    pub fn plan(&mut self, step: u64) -> BatchPlan {
        if step < self.step {
            (self.step, self.dealt) = (0, 0);
        }
        while self.step < step {
            self.dealt += self.shape_of(self.step).sets;
            self.step += 1;
        }
        let shape = self.shape_of(step);
        let set_idxs = (self.dealt..self.dealt + shape.sets).map(|position| self.set_at(position)).collect();
        BatchPlan { shape, set_idxs }
    }

    /// The fewest sets that a step can have.
    pub fn fewest_sets(&self) -> usize {
        let largest = self.settings.set_sizes.iter().max().copied().unwrap_or(1);
        self.settings.images_per_step / largest
    }

    fn shape_of(&self, step: u64) -> SetShape {
        let n = *Rng::new(self.settings.seed, "set size", step).pick(&self.settings.set_sizes);
        SetShape::new(self.settings.images_per_step / n, n)
    }

    fn set_at(&mut self, position: usize) -> usize {
        let epoch = position / self.n_sets;
        let order = match &self.epoch {
            Some((known, order)) if *known == epoch => order,
            _ => {
                let mut order: Vec<usize> = (0..self.n_sets).collect();
                Rng::new(self.settings.seed, "epoch order", epoch as u64).shuffle(&mut order);
                &self.epoch.insert((epoch, order)).1
            }
        };
        order[position % self.n_sets]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loader(n_sets: usize) -> Loader {
        let settings = LoaderSettings { seed: 3, images_per_step: 12, set_sizes: vec![2, 3, 4] };
        Loader::new(settings, n_sets).unwrap()
    }

    #[test]
    fn a_plan_is_a_function_of_the_step() {
        let mut forward = loader(50);
        let plans: Vec<_> = (0..40).map(|step| forward.plan(step)).collect();
        for step in [39, 0, 17, 18] {
            assert_eq!(loader(50).plan(step), plans[step as usize]);
            assert_eq!(forward.plan(step), plans[step as usize]);
        }
    }

    #[test]
    fn every_set_comes_once_an_epoch() {
        let mut loader = loader(30);
        let mut seen: Vec<usize> = (0..100).flat_map(|step| loader.plan(step).set_idxs).collect();
        seen.truncate(seen.len() / 30 * 30);
        for epoch in seen.chunks(30) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, Vec::from_iter(0..30));
        }
    }

    #[test]
    fn all_set_sizes_come_up_and_fill_the_step() {
        let mut loader = loader(1000);
        let shapes: Vec<_> = (0..60).map(|step| loader.plan(step).shape).collect();
        assert!(shapes.iter().all(|shape| shape.total() == 12));
        assert!([2, 3, 4].iter().all(|n| shapes.iter().any(|shape| shape.images == *n)));
    }
}

//! Which sets of which sources a training step sees, and how many images of each: a function of (seed, step) alone, so that
//! it is the same on any number of ranks and workers, and after any restart.

use std::ops::Range;

use anyhow::{Result, ensure};

use super::order::{EpochOrder, Runs};
use crate::invalid::invalid;
use crate::rng::Rng;
use crate::shape::SetShape;

/// One of the sources that a run mixes.
#[derive(Clone, Debug)]
pub struct Share {
    /// Sets in the source.
    pub n_sets: usize,
    /// The share of images that come from it is its weight over the sum of all weights.
    pub weight: f64,
    /// n is drawn evenly from these at every step.
    pub set_sizes: Vec<usize>,
    /// Cuts of each set that are dealt: 1 always the plain one, 0 a new one each time.
    pub variants: u64,
    /// How the source lies on the disk.
    pub runs: Runs,
}

/// A set in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    /// Number of the source.
    pub source: usize,
    /// Number of the set in its source.
    pub set_idx: usize,
    /// Which cut of the set; 0 is the plain one.
    pub variant: u64,
    /// Sets of this source that were dealt before it: names the random numbers that belong to it.
    pub position: u64,
}

/// The sets of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchPlan {
    /// Sets in the batch, images in each.
    pub shape: SetShape,
    /// One a set of the batch.
    pub slots: Vec<Slot>,
}

impl BatchPlan {
    /// What rank `rank` of `n_ranks` does of the step: its sets in order; all parts together are the step.
    pub fn part(&self, rank: usize, n_ranks: usize) -> BatchPlan {
        let slots = self.slots[part_of(self.slots.len(), rank, n_ranks)].to_vec();
        BatchPlan { shape: SetShape { sets: slots.len(), ..self.shape }, slots }
    }
}

/// The places of `0..n_sets` that rank `rank` of `n_ranks` has.
pub fn part_of(n_sets: usize, rank: usize, n_ranks: usize) -> Range<usize> {
    n_sets * rank / n_ranks..n_sets * (rank + 1) / n_ranks
}

/// Deals out the sets of sources: of each source every set once an epoch, every epoch in another order. All sets of a step
/// hold the same number of images n; a step of n mixes all sources that give sets of n, by their weights.
#[derive(Clone)]
pub struct Loader {
    seed: u64,
    images_per_step: usize,
    shares: Vec<Share>,
    orders: Vec<EpochOrder>,
    /// The step that `dealt` belongs to.
    step: u64,
    /// Sets of each source dealt before `step`.
    dealt: Vec<u64>,
}

impl Loader {
    /// Deals out steps of `images_per_step` images; refuses set sizes that do not fill a step.
    pub fn new(seed: u64, images_per_step: usize, shares: Vec<Share>) -> Result<Self> {
        ensure!(!shares.is_empty(), "there is no data source");
        for share in &shares {
            ensure!(share.n_sets > 0, "the data source holds no sets");
            if share.set_sizes.is_empty() {
                return Err(invalid("joint.set_sizes: is empty; give at least one set size"));
            }
            for &n in &share.set_sizes {
                if n == 0 || images_per_step == 0 || !images_per_step.is_multiple_of(n) {
                    return Err(invalid(format!(
                        "run.images_per_step {images_per_step}: not a multiple of the set size {n}"
                    )));
                }
            }
        }
        if !shares.iter().any(|share| share.weight > 0.0) {
            return Err(invalid("data.sources: the weights are all 0; at least one must be more"));
        }
        let order = |(source, share): (usize, &Share)| EpochOrder::new(seed, source, share.n_sets, share.runs.clone());
        let orders = shares.iter().enumerate().map(order).collect();
        Ok(Self { seed, images_per_step, orders, step: 0, dealt: vec![0; shares.len()], shares })
    }

    /// Images of all ranks in a step.
    pub fn images_per_step(&self) -> usize {
        self.images_per_step
    }

    /// The fewest sets that a step can have.
    pub fn fewest_sets(&self) -> usize {
        let sizes = self.shares.iter().filter(|share| share.weight > 0.0).flat_map(|share| &share.set_sizes);
        self.images_per_step / sizes.max().copied().unwrap_or(1)
    }

    /// The shape of `step`.
    pub fn shape_of(&self, step: u64) -> SetShape {
        let mut rng = Rng::new(self.seed, "set size", step);
        let all: Vec<usize> = (0..self.shares.len()).collect();
        let of = weighted(&mut rng, &all, |source| self.shares[source].weight);
        let n = *rng.pick(&self.shares[of].set_sizes);
        SetShape::new(self.images_per_step / n, n)
    }

    /// The sets of `step`.
    pub fn plan(&mut self, step: u64) -> BatchPlan {
        if step < self.step {
            self.step = 0;
            self.dealt.fill(0);
        }
        while self.step < step {
            let (_, sources) = self.drawn(self.step);
            sources.into_iter().for_each(|source| self.dealt[source] += 1);
            self.step += 1;
        }
        let (shape, sources) = self.drawn(step);
        let mut dealt = self.dealt.clone();
        let slots = sources.into_iter().map(|source| {
            dealt[source] += 1;
            self.slot(source, dealt[source] - 1)
        });
        BatchPlan { shape, slots: slots.collect() }
    }

    /// The shape of a step and the source of each of its sets.
    fn drawn(&self, step: u64) -> (SetShape, Vec<usize>) {
        let shape = self.shape_of(step);
        let n = shape.images;
        // P(source | n) is as its weight times P(n | source): in the long run each source gives its share of images.
        let share_of_n = |source: usize| {
            let Share { weight, set_sizes, .. } = &self.shares[source];
            weight * set_sizes.iter().filter(|&&size| size == n).count() as f64 / set_sizes.len() as f64
        };
        let able: Vec<usize> = (0..self.shares.len()).filter(|&source| share_of_n(source) > 0.0).collect();
        let mut rng = Rng::new(self.seed, "source of a set", step);
        let sources = (0..shape.sets).map(|_| weighted(&mut rng, &able, share_of_n)).collect();
        (shape, sources)
    }

    fn slot(&mut self, source: usize, position: u64) -> Slot {
        let set_idx = self.orders[source].at(position);
        let variant = match self.shares[source].variants {
            1 => 0,
            n => {
                let drawn = Rng::new(self.seed ^ source as u64, "variant", position).next_u64();
                // 0 stays the plain cut.
                1 + if n == 0 { drawn >> 1 } else { drawn % n }
            }
        };
        Slot { source, set_idx, variant, position }
    }
}

/// One of `sources`, each as likely as its weight says; draws nothing where there is no choice.
fn weighted(rng: &mut Rng, sources: &[usize], weight: impl Fn(usize) -> f64) -> usize {
    let total: f64 = sources.iter().map(|&source| weight(source)).sum();
    let mut left = if sources.len() == 1 { 0.0 } else { rng.uniform() * total };
    let reached = |&&source: &&usize| {
        left -= weight(source);
        left < 0.0
    };
    // Rounding may leave a crumb behind the last one; a source of weight 0 is not taken for it.
    let last = || sources.iter().rev().find(|&&source| weight(source) > 0.0).unwrap_or(&sources[0]);
    *sources.iter().find(reached).unwrap_or_else(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(n_sets: usize, weight: f64, set_sizes: &[usize]) -> Share {
        Share { n_sets, weight, set_sizes: set_sizes.to_vec(), variants: 1, runs: Runs::default() }
    }

    fn loader(n_sets: usize) -> Loader {
        Loader::new(3, 12, vec![share(n_sets, 1.0, &[2, 3, 4])]).unwrap()
    }

    fn mixed() -> Loader {
        let single = Share { variants: 0, ..share(1000, 1.0, &[1]) };
        let few = Share { variants: 3, ..share(40, 2.0, &[2, 4]) };
        Loader::new(3, 12, vec![share(500, 1.0, &[2, 3, 4]), single, few, share(5, 0.0, &[2])]).unwrap()
    }

    #[test]
    fn a_plan_is_a_function_of_the_step() {
        for loader in [|| loader(50), mixed] {
            let mut forward = loader();
            let plans: Vec<_> = (0..40).map(|step| forward.plan(step)).collect();
            for step in [39, 0, 17, 18] {
                assert_eq!(loader().plan(step), plans[step as usize]);
                assert_eq!(forward.plan(step), plans[step as usize]);
            }
        }
    }

    #[test]
    fn every_set_comes_once_an_epoch() {
        for (loader, sizes) in [(loader as fn(usize) -> Loader, [30, 0]), (|_| mixed(), [500, 40])] {
            let mut loader = loader(30);
            let slots: Vec<Slot> = (0..1500).flat_map(|step| loader.plan(step).slots).collect();
            for (source, n_sets) in [(0, sizes[0]), (2, sizes[1])].into_iter().filter(|(_, n_sets)| *n_sets > 0) {
                let own: Vec<&Slot> = slots.iter().filter(|slot| slot.source == source).collect();
                assert!(own.len() >= 2 * n_sets);
                assert!(own.iter().enumerate().all(|(position, slot)| slot.position == position as u64));
                for epoch in own.chunks_exact(n_sets) {
                    let mut sorted: Vec<usize> = epoch.iter().map(|slot| slot.set_idx).collect();
                    sorted.sort_unstable();
                    assert_eq!(sorted, Vec::from_iter(0..n_sets));
                }
            }
        }
    }

    #[test]
    fn all_set_sizes_come_up_and_fill_the_step() {
        let mut loader = loader(1000);
        let shapes: Vec<_> = (0..60).map(|step| loader.plan(step).shape).collect();
        assert!(shapes.iter().all(|shape| shape.total() == 12));
        assert!([2, 3, 4].iter().all(|n| shapes.iter().any(|shape| shape.images == *n)));
    }

    #[test]
    fn sources_give_their_shares_of_images_and_mix_within_a_step() {
        let (mut loader, mut images, mut mixed_steps) = (mixed(), [0usize; 4], 0);
        let steps = 20_000;
        for step in 0..steps {
            let BatchPlan { shape, slots } = loader.plan(step);
            let sizes: [&[usize]; 4] = [&[2, 3, 4], &[1], &[2, 4], &[]];
            assert!(slots.iter().all(|slot| sizes[slot.source].contains(&shape.images)));
            mixed_steps += usize::from(slots.iter().any(|slot| slot.source != slots[0].source));
            slots.iter().for_each(|slot| images[slot.source] += shape.images);
        }
        for (images, share) in images.into_iter().zip([0.25, 0.25, 0.5, 0.0]) {
            // Steps are independent; the sets of one are not, so five deviations of a share of `steps` draws.
            let tolerance = 5.0 * (0.25 / steps as f64).sqrt();
            let found = images as f64 / (12 * steps) as f64;
            assert!((found - share).abs() <= tolerance, "{found} is not {share} ± {tolerance}");
        }
        assert!(mixed_steps > 3000, "{mixed_steps}");
    }

    #[test]
    fn variants_are_as_many_as_asked_for() {
        let mut loader = mixed();
        let slots: Vec<Slot> = (0..300).flat_map(|step| loader.plan(step).slots).collect();
        let variants = |source: usize| {
            let mut all: Vec<u64> =
                slots.iter().filter(|slot| slot.source == source).map(|slot| slot.variant).collect();
            let n_slots = all.len();
            all.sort_unstable();
            all.dedup();
            (all, n_slots)
        };
        assert_eq!((variants(0).0, variants(2).0), (vec![0], vec![1, 2, 3]));
        let (all, n_slots) = variants(1);
        assert_eq!(all.len(), n_slots);
    }

    #[test]
    fn the_parts_of_all_ranks_are_the_step() {
        let mut loader = mixed();
        for step in 0..50 {
            let whole = loader.plan(step);
            for n_ranks in [1, 2, 3, 5] {
                let parts: Vec<BatchPlan> = (0..n_ranks).map(|rank| whole.part(rank, n_ranks)).collect();
                assert!(parts.iter().all(|part| part.shape.sets == part.slots.len()));
                let largest = parts.iter().map(|part| part.slots.len()).max().unwrap();
                assert!(parts.iter().all(|part| part.slots.len() + 1 >= largest));
                assert_eq!(parts.into_iter().flat_map(|part| part.slots).collect::<Vec<_>>(), whole.slots);
            }
        }
    }

    #[test]
    fn impossible_mixtures_are_refused() {
        let refusal = |shares| Loader::new(0, 12, shares).err().unwrap().to_string();
        assert!(refusal(vec![share(4, 1.0, &[5])]).contains("not a multiple of the set size 5"));
        assert!(refusal(vec![share(4, 0.0, &[2])]).contains("the weights are all 0"));
        assert!(refusal(vec![share(4, 1.0, &[])]).contains("joint.set_sizes: is empty"));
        assert!(refusal(vec![share(0, 1.0, &[2])]).contains("holds no sets"));
    }
}

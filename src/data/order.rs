//! The order in which the sets of a source are dealt: each epoch another one, told by (seed, source, position) alone.

use crate::rng::Rng;

/// How a source lies on the disk, for an order that reads it nearly in sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// Sets of each shard, in order; together all sets of the source. Empty: nothing is known.
    pub lengths: Vec<usize>,
    /// Shards whose sets are shuffled together; 0: all.
    pub window: usize,
}

/// The order of one source.
#[derive(Clone)]
pub struct EpochOrder {
    seed: u64,
    purpose: String,
    n_sets: usize,
    runs: Runs,
    /// The epoch asked for last, and its order. 32 bits a set: a hundred million sets take 400 MB.
    known: Option<(u64, Vec<u32>)>,
}

impl EpochOrder {
    /// Of source number `source`.
    pub fn new(seed: u64, source: usize, n_sets: usize, runs: Runs) -> Self {
        // Nothing is added to the first source's, so that runs of one source keep the order they have always had.
        let purpose = if source == 0 { "epoch order".into() } else { format!("epoch order of source {source}") };
        Self { seed, purpose, n_sets, runs, known: None }
    }

    /// The set at `position`, counted over all epochs.
    pub fn at(&mut self, position: u64) -> usize {
        let (epoch, place) = (position / self.n_sets as u64, (position % self.n_sets as u64) as usize);
        match &self.known {
            Some((known, order)) if *known == epoch => order[place] as usize,
            _ => {
                let order = self.order(epoch);
                self.known.insert((epoch, order)).1[place] as usize
            }
        }
    }

    fn order(&self, epoch: u64) -> Vec<u32> {
        let mut rng = Rng::new(self.seed, &self.purpose, epoch);
        let Runs { lengths, window } = &self.runs;
        if *window == 0 || lengths.len() <= *window {
            let mut order: Vec<u32> = (0..self.n_sets as u32).collect();
            rng.shuffle(&mut order);
            return order;
        }
        let mut first = 0;
        let mut shards: Vec<std::ops::Range<u32>> = Vec::with_capacity(lengths.len());
        for &length in lengths {
            shards.push(first..first + length as u32);
            first += length as u32;
        }
        rng.shuffle(&mut shards);
        let mut order = Vec::with_capacity(self.n_sets);
        for window in shards.chunks(*window) {
            let start = order.len();
            window.iter().for_each(|shard| order.extend(shard.clone()));
            rng.shuffle(&mut order[start..]);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_of_shards_is_read_through_before_the_next() {
        let lengths = vec![10, 30, 5, 20, 35];
        let shard_of = |set: usize| match set {
            0..10 => 0,
            10..40 => 1,
            40..45 => 2,
            45..65 => 3,
            _ => 4,
        };
        let mut order = EpochOrder::new(1, 0, 100, Runs { lengths: lengths.clone(), window: 2 });
        let mut epochs = vec![];
        for epoch in 0..3 {
            let sets: Vec<usize> = (0..100).map(|place| order.at(epoch * 100 + place)).collect();
            let mut shards: Vec<usize> = vec![];
            sets.iter().for_each(|&set| {
                if !shards.contains(&shard_of(set)) {
                    shards.push(shard_of(set));
                }
            });
            let first_window = lengths[shards[0]] + lengths[shards[1]];
            assert!(sets[..first_window].iter().all(|&set| shards[..2].contains(&shard_of(set))));
            let mixed = sets[..first_window].windows(2).filter(|pair| shard_of(pair[0]) != shard_of(pair[1])).count();
            assert!(mixed > 1, "the shards of a window are not shuffled together");
            let mut sorted = sets.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, Vec::from_iter(0..100));
            epochs.push(sets);
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
    }

    #[test]
    fn sources_of_one_seed_have_orders_of_their_own() {
        let first = |source| {
            let mut order = EpochOrder::new(1, source, 1000, Runs::default());
            (0..20).map(|position| order.at(position)).collect::<Vec<_>>()
        };
        assert_eq!(first(0), first(0));
        assert_ne!(first(0), first(1));
    }
}

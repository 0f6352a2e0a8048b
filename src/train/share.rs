//! Parts of a step's batch. What is drawn for a set depends on the step and on its place in the batch, never on the part
//! that it is computed in, so any number of parts, on any number of processes, is the same batch.

use std::ops::Range;

use anyhow::Result;
use candle_core::Tensor;

use crate::ops;
use crate::rng::Rng;

/// Part `index` of `count` nearly equal ones; its parts again are shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// From 0.
    pub index: usize,
    /// At least 1.
    pub count: usize,
}

impl Share {
    /// The whole batch.
    pub const WHOLE: Self = Self { index: 0, count: 1 };

    /// Part `index` of `count` of this share.
    pub fn part(self, index: usize, count: usize) -> Self {
        Self { index: self.index * count + index, count: self.count * count }
    }

    /// Its items of `0..items`, one after the other; none where there are fewer items than shares.
    pub fn range(self, items: usize) -> Range<usize> {
        let start = |index: usize| items * index / self.count;
        start(self.index)..start(self.index + 1)
    }

    /// How much of `0..items` it holds, from 0 to 1.
    pub fn weight(self, items: usize) -> f64 {
        self.range(items).len() as f64 / items as f64
    }

    /// The mean over this share's items as its part of the mean over all `0..items`.
    pub fn weighted(self, mean: Tensor, items: usize) -> Result<Tensor> {
        // Not by 1: the whole batch keeps its bits.
        Ok(if self.count == 1 { mean } else { ops::affine(&mean, self.weight(items), 0.0)? })
    }
}

/// The random numbers of set `position` (from 0) of the batch of `step`, for `purpose`.
pub fn set_rng(seed: u64, purpose: &str, step: u64, position: usize) -> Rng {
    /// A step holds fewer sets.
    const MAX_SETS: u64 = 1 << 24;
    Rng::new(seed, purpose, step * MAX_SETS + position as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_tile_the_batch_in_order_and_so_do_their_parts() {
        for (items, count) in [(16, 4), (7, 3), (2, 4), (0, 2)] {
            let all: Vec<usize> = (0..count).flat_map(|index| Share { index, count }.range(items)).collect();
            assert_eq!(all, Vec::from_iter(0..items));
        }
        let half = Share { index: 1, count: 2 };
        let parts: Vec<usize> = (0..3).flat_map(|index| half.part(index, 3).range(12)).collect();
        assert_eq!(parts, Vec::from_iter(half.range(12)));
        assert_eq!(half.range(12), 6..12);
    }

    #[test]
    fn weights_of_uneven_shares_add_up_to_one() {
        let weights: Vec<f64> = (0..3).map(|index| Share { index, count: 3 }.weight(7)).collect();
        assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-15 && weights[0] < weights[2], "{weights:?}");
    }
}

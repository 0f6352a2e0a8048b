//! Gradients and weights of many ranks. Every parameter has an owner, so that all own nearly as many numbers. Gradients are
//! added up by their owner, in the order of ranks and in f64, and given back to all: the sum has the same bits on every rank,
//! and with another number of ranks it differs by the rounding of the parts alone. With sharded state the owner alone keeps a
//! parameter's moments and average and makes its update, and gives the new weights to all (ZeRO stage 1, Rajbhandari et al.
//! 2020).

use std::rc::Rc;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor, Var};

use crate::ranks::Ranks;

/// Numbers that are under way at a time, of all ranks together.
const MAX_PIECE: usize = 1 << 24;

/// The ranks at work on one list of parameters.
pub struct Team {
    ranks: Rc<Ranks>,
    is_sharded: bool,
    /// Of each parameter.
    owners: Vec<usize>,
    lengths: Vec<usize>,
    /// The parameters of each rank, in their order.
    owned: Vec<Vec<usize>>,
}

impl Team {
    /// For parameters of these lengths. `is_sharded`: the moments of a parameter are with its owner alone.
    pub fn new(ranks: &Rc<Ranks>, lengths: Vec<usize>, is_sharded: bool) -> Self {
        let owners = owners(&lengths, ranks.count());
        let owned = (0..ranks.count()).map(|rank| (0..lengths.len()).filter(|&idx| owners[idx] == rank).collect());
        Self {
            ranks: ranks.clone(),
            is_sharded: is_sharded && ranks.count() > 1,
            owned: owned.collect(),
            owners,
            lengths,
        }
    }

    /// The ranks themselves.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Whether there are others.
    pub fn has_others(&self) -> bool {
        self.ranks.count() > 1
    }

    /// Whether the moments of parameter `idx` are here.
    pub fn keeps(&self, idx: usize) -> bool {
        !self.is_sharded || self.owners[idx] == self.ranks.rank()
    }

    /// Whether they are nowhere else.
    pub fn is_sharded(&self) -> bool {
        self.is_sharded
    }

    /// The gradients of the whole batch from those of this rank's share, and their global norm. None for parameters whose
    /// moments are not here.
    pub fn added_up(&self, gradients: Vec<Tensor>) -> Result<(Vec<Option<Tensor>>, f64)> {
        let like: Vec<_> =
            gradients.iter().map(|gradient| (gradient.shape().clone(), gradient.device().clone())).collect();
        let mut all = gradients.into_iter().map(|gradient| flat(&gradient)).collect::<Result<Vec<_>>>()?;
        let own = self.ranks.rank();
        self.in_pieces(|lengths, places| {
            let mut sent = Vec::with_capacity(lengths.iter().sum());
            places.iter().flatten().for_each(|(idx, range)| sent.extend_from_slice(&all[*idx][range.clone()]));
            let received = self.ranks.exchange(&sent, lengths);
            let total = totals(&received, lengths[own], self.ranks.count());
            match self.is_sharded {
                true => put(&mut all, &places[own], &total),
                false => {
                    let gathered = self.ranks.gather(&total, lengths);
                    put(&mut all, &places.concat(), &gathered);
                }
            }
        });
        let squares = |idx: usize| -> f64 { all[idx].iter().map(|&value| f64::from(value).powi(2)).sum() };
        let norm = match self.is_sharded {
            true => self.ranks.sum(self.owned[own].iter().map(|&idx| squares(idx)).sum()),
            false => (0..all.len()).map(squares).sum(),
        };
        let kept = |(idx, (values, (shape, device)))| -> Result<Option<Tensor>> {
            let tensor = || Tensor::from_vec(values, shape, &Device::Cpu)?.to_device(&device);
            Ok(self.keeps(idx).then(tensor).transpose()?)
        };
        let kept = all.into_iter().zip(like).enumerate().map(kept).collect::<Result<Vec<_>>>()?;
        Ok((kept, norm.sqrt()))
    }

    /// Gives the weights that the owners have updated to all.
    pub fn share_weights(&self, parameters: &[&Var]) -> Result<()> {
        let mut all = parameters.iter().map(|parameter| flat(parameter)).collect::<Result<Vec<_>>>()?;
        let own = self.ranks.rank();
        self.in_pieces(|lengths, places| {
            let mut sent = Vec::with_capacity(lengths[own]);
            places[own].iter().for_each(|(idx, range)| sent.extend_from_slice(&all[*idx][range.clone()]));
            let gathered = self.ranks.gather(&sent, lengths);
            put(&mut all, &places.concat(), &gathered);
        });
        for (idx, (parameter, values)) in parameters.iter().zip(all).enumerate() {
            if self.owners[idx] != own {
                parameter
                    .set(&Tensor::from_vec(values, parameter.dims(), &Device::Cpu)?.to_device(parameter.device())?)?;
            }
        }
        Ok(())
    }

    /// A tensor like `parameter` that only the owner of parameter `idx` has (`own` is there), for all; on the host.
    pub fn owners_tensor(&self, idx: usize, parameter: &Var, own: Option<&Var>) -> Result<Tensor> {
        self.broadcast(self.owners[idx], parameter, own.map(|var| var.as_tensor()))
    }

    /// A tensor like `parameter` that only the first rank has, for all; on the host.
    pub fn first_ranks_tensor(&self, parameter: &Var, own: Option<&Tensor>) -> Result<Tensor> {
        self.broadcast(0, parameter, own)
    }

    fn broadcast(&self, from: usize, parameter: &Var, own: Option<&Tensor>) -> Result<Tensor> {
        let mut values = match own {
            Some(tensor) if self.ranks.rank() == from => flat(tensor)?,
            _ => vec![0.0; parameter.elem_count()],
        };
        values.chunks_mut(MAX_PIECE).for_each(|chunk| self.ranks.broadcast(chunk, from));
        Ok(Tensor::from_vec(values, parameter.dims(), &Device::Cpu)?)
    }

    /// Calls `work(lengths, places)` until all parameters were in turn, everywhere alike: `places[rank]` are parts of the
    /// rank's parameters, `lengths[rank]` numbers in all.
    fn in_pieces(&self, mut work: impl FnMut(&[usize], &[Vec<Place>])) {
        let size = (MAX_PIECE / self.ranks.count()).max(1);
        let mut rest: Vec<Vec<Place>> = self
            .owned
            .iter()
            .map(|owned| owned.iter().map(|&idx| (idx, 0..self.lengths[idx])).rev().collect())
            .collect();
        while rest.iter().any(|places| !places.is_empty()) {
            let places: Vec<Vec<Place>> = rest.iter_mut().map(|rest| cut(rest, size)).collect();
            let length = |places: &Vec<Place>| places.iter().map(|(_, range)| range.len()).sum();
            work(&places.iter().map(length).collect::<Vec<usize>>(), &places);
        }
    }
}

/// Part of a parameter.
type Place = (usize, std::ops::Range<usize>);

/// Takes up to `size` numbers from the end of `rest`, whose places are in reverse order.
fn cut(rest: &mut Vec<Place>, size: usize) -> Vec<Place> {
    let (mut taken, mut left) = (vec![], size);
    while let Some((idx, range)) = rest.pop() {
        if range.len() > left {
            rest.push((idx, range.start + left..range.end));
            taken.push((idx, range.start..range.start + left));
            break;
        }
        left -= range.len();
        taken.push((idx, range));
    }
    taken.retain(|(_, range)| !range.is_empty());
    taken
}

/// The largest first, each to the rank that has the least so far.
fn owners(lengths: &[usize], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&idx| (std::cmp::Reverse(lengths[idx]), idx));
    let (mut owners, mut loads) = (vec![0; lengths.len()], vec![0usize; count]);
    for idx in order {
        let lightest = (0..count).min_by_key(|&rank| loads[rank]).unwrap_or(0);
        owners[idx] = lightest;
        loads[lightest] += lengths[idx];
    }
    owners
}

/// The sums of `count` rows of `width`, in the order of rows.
fn totals(rows: &[f32], width: usize, count: usize) -> Vec<f32> {
    let total = |column: usize| (0..count).map(|row| f64::from(rows[row * width + column])).sum::<f64>() as f32;
    (0..width).map(total).collect()
}

fn put(all: &mut [Vec<f32>], places: &[Place], values: &[f32]) {
    let mut start = 0;
    for (idx, range) in places {
        all[*idx][range.clone()].copy_from_slice(&values[start..start + range.len()]);
        start += range.len();
    }
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    ensure!(tensor.dtype() == DType::F32, "weights and gradients of many ranks are f32, not {:?}", tensor.dtype());
    Ok(tensor.detach().flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_have_nearly_as_much_each_and_are_always_the_same() {
        let lengths = [9, 1, 1, 4, 5, 7, 1];
        let owners = owners(&lengths, 3);
        let load =
            |rank: usize| (0..lengths.len()).filter(|&idx| owners[idx] == rank).map(|idx| lengths[idx]).sum::<usize>();
        assert_eq!([load(0), load(1), load(2)].iter().sum::<usize>(), 28);
        assert!((0..3).all(|rank| (9..=10).contains(&load(rank))), "{owners:?}");
        assert_eq!(super::owners(&[3], 4), [0]);
    }

    #[test]
    fn pieces_cover_everything_once_and_in_order() {
        let mut rest: Vec<Place> = vec![(4, 0..3), (1, 0..0), (0, 0..7)];
        let pieces: Vec<Vec<Place>> = std::iter::from_fn(|| (!rest.is_empty()).then(|| cut(&mut rest, 4))).collect();
        assert_eq!(pieces, [vec![(0, 0..4)], vec![(0, 4..7), (4, 0..1)], vec![(4, 1..3)]]);
    }

    #[test]
    fn sums_are_those_of_exact_arithmetic_rounded_once() {
        // In f32 the ones would be lost one by one.
        let rows = [1e8, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0f32];
        assert_eq!(totals(&rows, 1, 9), [1e8 + 8.0]);
        assert_eq!(totals(&[1.0, 2.0, 10.0, 20.0], 2, 2), [11.0, 22.0]);
    }

    #[test]
    fn one_alone_has_its_own_gradients_and_their_norm() {
        let team = Team::new(&Rc::new(Ranks::alone()), vec![1, 2], true);
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let (gradients, norm) = team.added_up(vec![tensor(&[3.0]), tensor(&[0.0, 4.0])]).unwrap();
        assert_eq!(norm, 5.0);
        assert_eq!(gradients[1].as_ref().unwrap().to_vec1::<f32>().unwrap(), [0.0, 4.0]);
        assert!(team.keeps(0) && team.keeps(1) && !team.is_sharded() && !team.has_others());
    }
}

//! Gradients and weights of many ranks. Every parameter has an owner, so that all own nearly as many numbers. Gradients are
//! added up by their owner, in the order of ranks and in f64, and given back to all: the sum has the same bits on every rank,
//! and with another number of ranks it differs by the rounding of the parts alone. With sharded state the owner alone keeps a
//! parameter's moments and average and makes its update, and gives the new weights to all (ZeRO stage 1, Rajbhandari et al.
//! 2020). What goes from rank to rank, and how, is the wire's affair: the same is done on CPUs and GPUs.

use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};

use crate::ops::global_norm;
use crate::ranks::Ranks;

/// Numbers that are under way at a time, of all ranks together.
const MAX_PIECE: usize = 1 << 24;

/// The ranks at work on one list of parameters.
pub struct Team {
    ranks: Rc<Ranks>,
    /// Where the parameters are.
    device: Device,
    is_sharded: bool,
    /// Of each parameter.
    owners: Vec<usize>,
    lengths: Vec<usize>,
    /// The parameters of each rank, in their order, but for empty ones.
    owned: Vec<Vec<usize>>,
}

impl Team {
    /// For parameters of these lengths on `device`. `is_sharded`: the moments of a parameter are with its owner alone.
    pub fn new(ranks: &Rc<Ranks>, device: &Device, lengths: Vec<usize>, is_sharded: bool) -> Self {
        let owners = owners(&lengths, ranks.count());
        let is_owned = |idx: usize, rank: usize| owners[idx] == rank && lengths[idx] > 0;
        let owned = (0..ranks.count()).map(|rank| (0..lengths.len()).filter(|&idx| is_owned(idx, rank)).collect());
        Self {
            ranks: ranks.clone(),
            device: device.clone(),
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
        let shapes: Vec<_> = gradients.iter().map(|gradient| gradient.shape().clone()).collect();
        // Copies: two parameters may have one gradient, and these are overwritten by the sums.
        let all = gradients
            .into_iter()
            .map(|gradient| Ok(flat(&gradient)?.force_contiguous()?))
            .collect::<Result<Vec<_>>>()?;
        let (own, wire) = (self.ranks.rank(), self.ranks.wire(&self.device));
        self.in_pieces(|lengths, places| {
            let sent = packed(&all, places.iter().flatten())?.context("a piece of nothing")?;
            let received = wire.exchange(&sent, lengths)?;
            let total = received.map(|rows| totals(&rows, self.ranks.count())).transpose()?;
            match (self.is_sharded, total) {
                (true, None) => Ok(()),
                (true, Some(total)) => put(&all, places[own].iter(), &total),
                (false, total) => put(&all, places.iter().flatten(), &wire.gather(total.as_ref(), lengths)?),
            }
        })?;
        // Each by its owner: the same bits on every rank, whatever the threads of each.
        let owned: Vec<Tensor> = self.owned[own].iter().map(|&idx| all[idx].clone()).collect();
        let squares = if owned.is_empty() { 0.0 } else { global_norm(&owned)?.powi(2) };
        let norm = self.ranks.sum(squares).sqrt();
        let kept = |(idx, (values, shape)): (usize, (Tensor, _))| -> Result<Option<Tensor>> {
            Ok(self.keeps(idx).then(|| values.reshape(shape)).transpose()?)
        };
        Ok((all.into_iter().zip(shapes).enumerate().map(kept).collect::<Result<Vec<_>>>()?, norm))
    }

    /// Gives the weights that the owners have updated to all.
    pub fn share_weights(&self, parameters: &[&Var]) -> Result<()> {
        let in_place = |parameter: &&Var| {
            ensure!(parameter.is_contiguous(), "a parameter that is a view cannot be written to");
            flat(parameter)
        };
        let all = parameters.iter().map(in_place).collect::<Result<Vec<_>>>()?;
        let (own, wire) = (self.ranks.rank(), self.ranks.wire(&self.device));
        self.in_pieces(|lengths, places| {
            let gathered = wire.gather(packed(&all, places[own].iter())?.as_ref(), lengths)?;
            let mut start = 0;
            for (rank, (places, &length)) in places.iter().zip(lengths).enumerate() {
                if rank != own && length > 0 {
                    put(&all, places.iter(), &gathered.narrow(0, start, length)?)?;
                }
                start += length;
            }
            Ok(())
        })
    }

    /// A tensor like `parameter` that only the owner of parameter `idx` has (`own` is there), for all.
    pub fn owners_tensor(&self, idx: usize, parameter: &Var, own: Option<&Var>) -> Result<Tensor> {
        let own = own.map(|own| own.as_detached_tensor().to_device(&self.device)).transpose()?;
        self.ranks.wire(&self.device).broadcast(own.as_ref(), parameter.dims(), self.owners[idx])
    }

    /// A tensor like `parameter` that only the first rank has, for all.
    pub fn first_ranks_tensor(&self, parameter: &Var, own: Option<&Tensor>) -> Result<Tensor> {
        self.ranks.wire(&self.device).broadcast(own, parameter.dims(), 0)
    }

    /// Calls `work(lengths, places)` until all parameters were in turn, everywhere alike: `places[rank]` are parts of the
    /// rank's parameters, `lengths[rank]` numbers in all.
    fn in_pieces(&self, mut work: impl FnMut(&[usize], &[Vec<Place>]) -> Result<()>) -> Result<()> {
        let size = (MAX_PIECE / self.ranks.count()).max(1);
        let mut rest: Vec<Vec<Place>> = self
            .owned
            .iter()
            .map(|owned| owned.iter().map(|&idx| (idx, 0..self.lengths[idx])).rev().collect())
            .collect();
        while rest.iter().any(|places| !places.is_empty()) {
            let places: Vec<Vec<Place>> = rest.iter_mut().map(|rest| cut(rest, size)).collect();
            let length = |places: &Vec<Place>| places.iter().map(|(_, range)| range.len()).sum();
            work(&places.iter().map(length).collect::<Vec<usize>>(), &places)?;
        }
        Ok(())
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

/// The sums of `count` rows in their order, each in f64, rounded once.
///
/// # Shapes
/// - \[count · width], f32 → \[width], f32
fn totals(rows: &Tensor, count: usize) -> Result<Tensor> {
    let width = rows.elem_count() / count;
    let row = |idx: usize| rows.narrow(0, idx * width, width)?.to_dtype(DType::F64);
    let total = (1..count).try_fold(row(0)?, |sum, idx| sum + row(idx)?)?;
    Ok(total.to_dtype(DType::F32)?)
}

/// The places' numbers, one behind the other; None where there are none.
fn packed<'a>(all: &[Tensor], places: impl Iterator<Item = &'a Place>) -> Result<Option<Tensor>> {
    let parts = places.map(|(idx, range)| all[*idx].narrow(0, range.start, range.len()));
    let parts = parts.collect::<candle_core::Result<Vec<_>>>()?;
    Ok((!parts.is_empty()).then(|| Tensor::cat(&parts, 0)).transpose()?)
}

/// Overwrites the places by `values`.
fn put<'a>(all: &[Tensor], places: impl Iterator<Item = &'a Place>, values: &Tensor) -> Result<()> {
    let mut start = 0;
    for (idx, range) in places {
        all[*idx].slice_set(&values.narrow(0, start, range.len())?, 0, range.start)?;
        start += range.len();
    }
    Ok(())
}

/// The same numbers in one row; a view where it can be one.
fn flat(tensor: &Tensor) -> Result<Tensor> {
    ensure!(tensor.dtype() == DType::F32, "weights and gradients of many ranks are f32, not {:?}", tensor.dtype());
    Ok(tensor.detach().flatten_all()?)
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
        let total = |rows: &[f32], count| {
            totals(&Tensor::new(rows, &Device::Cpu).unwrap(), count).unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(total(&[1e8, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 9), [1e8 + 8.0]);
        assert_eq!(total(&[1.0, 2.0, 10.0, 20.0], 2), [11.0, 22.0]);
    }

    #[test]
    fn one_alone_has_its_own_gradients_and_their_norm() {
        let team = Team::new(&Rc::new(Ranks::alone()), &Device::Cpu, vec![1, 2], true);
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let (gradients, norm) = team.added_up(vec![tensor(&[3.0]), tensor(&[0.0, 4.0])]).unwrap();
        assert!((norm - 5.0).abs() < 1e-12);
        assert_eq!(gradients[1].as_ref().unwrap().to_vec1::<f32>().unwrap(), [0.0, 4.0]);
        assert!(team.keeps(0) && team.keeps(1) && !team.is_sharded() && !team.has_others());
    }
}

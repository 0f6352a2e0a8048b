//! Group norm, optionally with SiLU fused behind it.
//!
//! The backward pass keeps one mean and one reciprocal deviation a group and recomputes the rest from the input.

mod backward;
mod forward;

use candle_core::{DType, Result, Tensor, bail};

use self::backward::backward;
use self::forward::forward;
use super::cuda;
use super::graft::{for_float, graft, on_cpu, tensor, with_values};
use super::real::Real;

/// What follows a group norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// x·σ(x).
    Silu,
}

/// Normalises each group of channels of each image over all positions, then scales and shifts each channel.
///
/// # Shapes
/// - x `[b, .., c]`, weight and bias `[c]` → x's; `c` divides into `groups`
pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: Groups,
    activation: Activation,
) -> Result<Tensor> {
    let dims = x.dims();
    let c = weight.dims1()?;
    if dims.len() < 2 || dims[dims.len() - 1] != c || c % groups.count != 0 {
        bail!("group_norm: a batch {dims:?} with {c} weights does not divide into {} groups", groups.count);
    }
    if !on_cpu(x) {
        if let Some(y) = cuda::group_norm([x, weight, bias], groups, activation)? {
            return Ok(y);
        }
        return on_device(x, weight, bias, groups, activation);
    }
    let plane = Plane { positions: x.elem_count() / (dims[0] * c), c, groups: groups.count, eps: groups.eps };
    norm([x, weight, bias], plane, activation)
}

/// Number of groups and the ε added to the variance.
#[derive(Clone, Copy, Debug)]
pub struct Groups {
    /// Groups that the channels divide into.
    pub count: usize,
    /// Added to the variance.
    pub eps: f64,
}

/// One normalised unit: `[positions, c]`, in `groups` of channels.
#[derive(Clone, Copy)]
struct Plane {
    positions: usize,
    c: usize,
    groups: usize,
    eps: f64,
}

impl Plane {
    fn len(self) -> usize {
        self.positions * self.c
    }
    /// Values that the loops take at a time: several positions side by side where channels are few, so that vectors fill.
    fn row(self) -> usize {
        let mut row = self.c;
        while 2 * row <= 256 && self.len().is_multiple_of(2 * row) {
            row *= 2;
        }
        row
    }
    /// Planes that a thread takes at least.
    fn grain(self) -> usize {
        4096 / self.len() + 1
    }
    /// Values of a block, whole rows: 128 kB of f32, which stay in a cache from the one pass over them to the next.
    fn block(self) -> usize {
        (32_768 / self.row()).max(1) * self.row()
    }
    fn blocks(self) -> usize {
        self.len().div_ceil(self.block())
    }
}

fn norm([x, weight, bias]: [&Tensor; 3], plane: Plane, activation: Activation) -> Result<Tensor> {
    let x = x.contiguous()?;
    for_float!(x, T => {
        let (values, statistics) = with_values::<T, _>(&x, |x| {
            with_values::<T, _>(weight, |w| with_values::<T, _>(bias, |b| forward(x, w, b, plane, activation)))
        })???;
        graft("group_norm", &[&x, weight, bias], (values, x.shape().clone()), move |inputs, _, gradient| {
            let (dx, dw, db) = with_values::<T, _>(inputs[0], |x| {
                with_values::<T, _>(inputs[1], |w| with_values::<T, _>(inputs[2], |b| {
                    with_values::<T, _>(gradient, |dy| backward((x, w, b), dy, &statistics, plane, activation))
                }))
            })????;
            Ok(vec![
                Some(tensor(dx, inputs[0].shape())),
                Some(tensor(dw, inputs[1].shape())),
                Some(tensor(db, inputs[2].shape())),
            ])
        })
    })
}

/// Adds up the positions that lie side by side in a row; the sums of the c channels come first.
#[inline(always)]
fn fold<T: Real>(values: &mut [T], c: usize) {
    let (sums, rest) = values.split_at_mut(c);
    for other in rest.chunks_exact(c) {
        for i in 0..c {
            sums[i] += other[i];
        }
    }
}

/// Repeats the first c values over the row.
#[inline(always)]
fn spread<T: Real>(values: &mut [T], c: usize) {
    let (first, rest) = values.split_at_mut(c);
    rest.chunks_exact_mut(c).for_each(|other| other.copy_from_slice(first));
}

fn repeated<T: Real>(values: &[T], row: usize) -> Vec<T> {
    values.iter().copied().cycle().take(row).collect()
}

/// Sums a row's `values` over the channels of each group and spreads the result, scaled, back over them.
#[inline(always)]
fn pool_groups<T: Real>(values: &mut [T], plane: Plane, scale: T) {
    fold(values, plane.c);
    for group in values[..plane.c].chunks_exact_mut(plane.c / plane.groups) {
        let mut sum = T::ZERO;
        for v in group.iter() {
            sum += *v;
        }
        group.fill(sum * scale);
    }
    spread(values, plane.c);
}

/// Spreads `[mean, rstd]` of each group over the columns of a row.
#[inline(always)]
fn read_statistics<T: Real>(kept: &[T], plane: Plane, mean: &mut [T], rstd: &mut [T]) {
    let size = plane.c / plane.groups;
    for (group, kept) in kept.chunks_exact(2).enumerate() {
        mean[group * size..][..size].fill(kept[0]);
        rstd[group * size..][..size].fill(kept[1]);
    }
    spread(mean, plane.c);
    spread(rstd, plane.c);
}

fn on_device(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: Groups, activation: Activation) -> Result<Tensor> {
    let c = weight.dims1()?;
    let grouped = x.reshape((x.dim(0)?, (), groups.count, c / groups.count))?.to_dtype(DType::F32)?; // [b, p, g, c/g]
    let mean = grouped.mean_keepdim((1, 3))?;
    let centred = grouped.broadcast_sub(&mean)?;
    let variance = centred.sqr()?.mean_keepdim((1, 3))?;
    let normed = centred.broadcast_div(&(variance + groups.eps)?.sqrt()?)?;
    let normed = normed.reshape(x.shape())?.to_dtype(x.dtype())?;
    let y = normed.broadcast_mul(weight)?.broadcast_add(bias)?;
    match activation {
        Activation::None => Ok(y),
        Activation::Silu => y.silu(),
    }
}

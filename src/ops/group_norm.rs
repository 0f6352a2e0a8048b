//! Group norm, optionally with SiLU fused behind it.
//!
//! Mean and variance are taken in two passes, so that a large common offset does not eat the precision. The backward
//! pass keeps one mean and one reciprocal deviation a group and recomputes the rest from the input.

use candle_core::{DType, Result, Tensor, bail};

use super::activation::{silu_of, silu_slope};
use super::buffer::unwritten;
use super::cuda;
use super::graft::{for_float, graft, on_cpu, tensor, with_values};
use super::linear::sum_of;
use super::parallel;
use super::real::{Real, vectorised};

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

/// Mean and reciprocal deviation of each channel's group, a row each.
#[inline(always)]
fn statistics_of<T: Real>(x: &[T], plane: Plane, mean: &mut [T], rstd: &mut [T]) {
    let count = T::of(1.0 / (plane.positions * (plane.c / plane.groups)) as f64);
    let row_len = plane.row();
    mean.fill(T::ZERO);
    rstd.fill(T::ZERO);
    for row in x.chunks_exact(row_len) {
        for i in 0..row_len {
            mean[i] += row[i];
        }
    }
    pool_groups(mean, plane, count);
    for row in x.chunks_exact(row_len) {
        for i in 0..row_len {
            let d = row[i] - mean[i];
            rstd[i] += d * d;
        }
    }
    pool_groups(rstd, plane, count);
    for v in rstd.iter_mut() {
        *v = T::ONE / (*v + T::of(plane.eps)).sqrt();
    }
}

/// The output, and `[mean, rstd]` of each group of each plane for the backward pass.
fn forward<T: Real>(x: &[T], w: &[T], b: &[T], plane: Plane, activation: Activation) -> (Vec<T>, Vec<T>) {
    let kept_width = plane.groups * 2;
    let mut y = unwritten(x.len());
    let mut kept = unwritten(x.len() / plane.len() * kept_width);
    let kept_at = parallel::Disjoint::new(&mut kept);
    parallel::for_rows(&mut y, plane.len(), plane.grain(), |range, y| {
        let x = &x[range.start * plane.len()..range.end * plane.len()];
        // SAFETY: each plane's statistics are written by the one thread whose range holds it.
        let kept =
            unsafe { std::slice::from_raw_parts_mut(kept_at.at(range.start * kept_width), range.len() * kept_width) };
        forward_planes(y, kept, x, (w, b), plane, activation);
    });
    (y, kept)
}

vectorised! {
    fn forward_planes[T: Real](
        y: &mut [T], kept: &mut [T], x: &[T], affine: (&[T], &[T]), plane: Plane, activation: Activation,
    ) {
        let (c, size) = (plane.row(), plane.c / plane.groups);
        let (w, b) = (repeated(affine.0, c), repeated(affine.1, c));
        let (mut mean, mut rstd) = (vec![T::ZERO; c], vec![T::ZERO; c]);
        let planes = x.chunks_exact(plane.len()).zip(y.chunks_exact_mut(plane.len()));
        for ((x, y), kept) in planes.zip(kept.chunks_exact_mut(plane.groups * 2)) {
            statistics_of(x, plane, &mut mean, &mut rstd);
            for (group, kept) in kept.chunks_exact_mut(2).enumerate() {
                (kept[0], kept[1]) = (mean[group * size], rstd[group * size]);
            }
            // y = x·scale + shift, the two in place of rstd and mean.
            for i in 0..c {
                let scale = rstd[i] * w[i];
                mean[i] = b[i] - mean[i] * scale;
                rstd[i] = scale;
            }
            for (row, y) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)) {
                for i in 0..c {
                    y[i] = row[i] * rstd[i] + mean[i];
                }
            }
            if activation == Activation::Silu {
                y.iter_mut().for_each(|y| *y = silu_of(*y));
            }
        }
    }
}

type Triple<T> = (Vec<T>, Vec<T>, Vec<T>);

/// With x̂ = (x−μ)·r, z = x̂·w+b, g = ∂L/∂z: db = Σg, dw = Σg·x̂, dx = r·(g·w − mean(g·w) − x̂·mean(g·w·x̂)).
fn backward<T: Real>(
    (x, w, b): (&[T], &[T], &[T]),
    dy: &[T],
    statistics: &[T],
    plane: Plane,
    activation: Activation,
) -> Triple<T> {
    let mut dx = unwritten(x.len());
    let dx_at = parallel::Disjoint::new(&mut dx);
    let partial = parallel::map(x.len() / plane.len(), plane.grain(), |range| {
        let values = range.start * plane.len()..range.end * plane.len();
        // SAFETY: these planes of dx belong to this thread alone.
        let dx = unsafe { std::slice::from_raw_parts_mut(dx_at.at(values.start), values.len()) };
        let kept = &statistics[range.start * plane.groups * 2..range.end * plane.groups * 2];
        backward_planes(dx, (&x[values.clone()], &dy[values], kept), (w, b), plane, activation)
    });
    let (dw, db) = partial.into_iter().unzip();
    (dx, sum_of(dw), sum_of(db))
}

vectorised! {
    /// Fills dx and returns dw and db, summed over these planes.
    fn backward_planes[T: Real](
        dx: &mut [T], inputs: (&[T], &[T], &[T]), affine: (&[T], &[T]), plane: Plane, activation: Activation,
    ) -> (Vec<T>, Vec<T>) {
        let (x, dy, kept) = inputs;
        let (c, size) = (plane.row(), plane.c / plane.groups);
        let (w, b) = (repeated(affine.0, c), repeated(affine.1, c));
        let count = T::of(1.0 / (plane.positions * size) as f64);
        let (mut dw, mut db) = (vec![T::ZERO; c], vec![T::ZERO; c]);
        let (mut sum_g, mut sum_gx) = (vec![T::ZERO; c], vec![T::ZERO; c]);
        let (mut mean, mut rstd) = (vec![T::ZERO; c], vec![T::ZERO; c]);
        let planes = x.chunks_exact(plane.len()).zip(dy.chunks_exact(plane.len()));
        let planes = planes.zip(dx.chunks_exact_mut(plane.len())).zip(kept.chunks_exact(plane.groups * 2));
        for (((x, dy), dx), kept) in planes {
            for (group, kept) in kept.chunks_exact(2).enumerate() {
                mean[group * size..][..size].fill(kept[0]);
                rstd[group * size..][..size].fill(kept[1]);
            }
            spread(&mut mean, plane.c);
            spread(&mut rstd, plane.c);
            sum_g.fill(T::ZERO);
            sum_gx.fill(T::ZERO);
            for ((row, dy), dx) in x.chunks_exact(c).zip(dy.chunks_exact(c)).zip(dx.chunks_exact_mut(c)) {
                match activation {
                    Activation::None => dx.copy_from_slice(dy),
                    Activation::Silu => {
                        for i in 0..c {
                            dx[i] = dy[i] * silu_slope((row[i] - mean[i]) * rstd[i] * w[i] + b[i]);
                        }
                    }
                }
                for i in 0..c {
                    sum_g[i] += dx[i];
                    sum_gx[i] += dx[i] * (row[i] - mean[i]) * rstd[i];
                }
            }
            for i in 0..c {
                db[i] += sum_g[i];
                dw[i] += sum_gx[i];
                sum_g[i] *= w[i];
                sum_gx[i] *= w[i];
            }
            pool_groups(&mut sum_g, plane, count);
            pool_groups(&mut sum_gx, plane, count);
            for (row, dx) in x.chunks_exact(c).zip(dx.chunks_exact_mut(c)) {
                for i in 0..c {
                    let normed = (row[i] - mean[i]) * rstd[i];
                    dx[i] = rstd[i] * (dx[i] * w[i] - sum_g[i] - normed * sum_gx[i]);
                }
            }
        }
        for sums in [&mut dw, &mut db] {
            fold(sums, plane.c);
            sums.truncate(plane.c);
        }
        (dw, db)
    }
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

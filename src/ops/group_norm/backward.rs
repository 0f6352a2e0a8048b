//! The gradients of group norm.

use super::{Activation, Plane, fold, pool_groups, read_statistics, repeated};
use crate::ops::activation::silu_slope;
use crate::ops::buffer::unwritten;
use crate::ops::linear::sum_of;
use crate::ops::parallel;
use crate::ops::real::{Real, vectorised};

/// Gradients of the input, the weight and the bias.
pub(super) type Triple<T> = (Vec<T>, Vec<T>, Vec<T>);

/// With x̂ = (x−μ)·r, z = x̂·w+b, g = ∂L/∂z: db = Σg, dw = Σg·x̂, dx = r·(g·w − mean(g·w) − x̂·mean(g·w·x̂)).
pub(super) fn backward<T: Real>(
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
        let (mut block_g, mut block_gx) = (vec![T::ZERO; c], vec![T::ZERO; c]);
        let (mut sum_g, mut sum_gx) = (vec![T::ZERO; c], vec![T::ZERO; c]);
        let (mut mean, mut rstd) = (vec![T::ZERO; c], vec![T::ZERO; c]);
        let planes = x.chunks_exact(plane.len()).zip(dy.chunks_exact(plane.len()));
        let planes = planes.zip(dx.chunks_exact_mut(plane.len())).zip(kept.chunks_exact(plane.groups * 2));
        for (((x, dy), dx), kept) in planes {
            read_statistics(kept, plane, &mut mean, &mut rstd);
            sum_g.fill(T::ZERO);
            sum_gx.fill(T::ZERO);
            let blocks = x.chunks(plane.block()).zip(dy.chunks(plane.block())).zip(dx.chunks_mut(plane.block()));
            for ((x, dy), dx) in blocks {
                block_g.fill(T::ZERO);
                block_gx.fill(T::ZERO);
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
                        block_g[i] += dx[i];
                        block_gx[i] += dx[i] * (row[i] - mean[i]) * rstd[i];
                    }
                }
                for i in 0..c {
                    sum_g[i] += block_g[i];
                    sum_gx[i] += block_gx[i];
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

//! The gradients of group norm. Sums over a picture are taken block by block (see `forward`): of large pictures all threads
//! share the blocks, of small ones each thread takes whole pictures, which stay in its cache between the two passes.

use super::{Activation, Plane, fold, pool_groups, read_statistics, repeated};
use crate::ops::activation::silu_slope;
use crate::ops::buffer::unwritten;
use crate::ops::linear::sums_of;
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
    let width = plane.row();
    let (w, b) = (&repeated(w, width)[..], &repeated(b, width)[..]);
    let work = Work { x, dy, dx: parallel::Disjoint::new(&mut dx), statistics, affine: (w, b), plane, activation };
    let (dw, db) = if plane.blocks() == 1 { work.by_planes() } else { work.by_blocks() };
    let [dw, db] = [dw, db].map(|mut sums| {
        fold(&mut sums, plane.c);
        sums.truncate(plane.c);
        sums
    });
    (dx, dw, db)
}

struct Work<'a, T> {
    x: &'a [T],
    dy: &'a [T],
    dx: parallel::Disjoint<T>,
    statistics: &'a [T],
    /// A row each.
    affine: (&'a [T], &'a [T]),
    plane: Plane,
    activation: Activation,
}

/// What the columns of a row have, a row each.
struct Columns<'a, T> {
    mean: Vec<T>,
    rstd: Vec<T>,
    affine: (&'a [T], &'a [T]),
}

impl<T: Real> Work<'_, T> {
    /// The sums of g·x̂ and of g over all planes, a row each.
    fn by_planes(&self) -> (Vec<T>, Vec<T>) {
        let partial = parallel::map(self.x.len() / self.plane.len(), self.plane.grain(), |planes| {
            sums_of(planes.map(|index| {
                // SAFETY: planes belong to one thread each.
                unsafe {
                    let (sums, columns) = self.slopes(index, 0);
                    self.finish(index, 0, &columns, &self.means(&sums));
                    sums
                }
            }))
        });
        sums_of(partial.into_iter())
    }

    /// The same where all threads share in a plane. The blocks' sums are added in order.
    fn by_blocks(&self) -> (Vec<T>, Vec<T>) {
        let blocks = self.plane.blocks();
        let items = self.x.len() / self.plane.len() * blocks;
        let of_parts = parallel::map(items, 1, |items| {
            // SAFETY: blocks belong to one thread each.
            items.map(|item| unsafe { self.slopes(item / blocks, item % blocks).0 }).collect::<Vec<_>>()
        });
        let of_blocks: Vec<_> = of_parts.into_iter().flatten().collect();
        let of_planes: Vec<_> = of_blocks.chunks_exact(blocks).map(|blocks| sums_of(blocks.iter().cloned())).collect();
        let means: Vec<_> = of_planes.iter().map(|sums| self.means(sums)).collect();
        parallel::map(items, 1, |items| {
            for item in items {
                let index = item / blocks;
                // SAFETY: as above.
                unsafe { self.finish(index, item % blocks, &self.columns(index), &means[index]) };
            }
        });
        sums_of(of_planes.into_iter())
    }

    fn columns(&self, index: usize) -> Columns<'_, T> {
        let (width, kept) = (self.plane.row(), 2 * self.plane.groups);
        let (mut mean, mut rstd) = (vec![T::ZERO; width], vec![T::ZERO; width]);
        read_statistics(&self.statistics[index * kept..][..kept], self.plane, &mut mean, &mut rstd);
        Columns { mean, rstd, affine: self.affine }
    }

    /// x, dy and dx of a block.
    ///
    /// # Safety
    /// No other thread has this block.
    #[allow(clippy::mut_from_ref)] // dx is shared out among threads behind a pointer.
    unsafe fn block(&self, index: usize, block: usize) -> (&[T], &[T], &mut [T]) {
        let first = block * self.plane.block();
        let len = self.plane.block().min(self.plane.len() - first);
        let start = index * self.plane.len() + first;
        // SAFETY: inside dx, which is as long as x; the caller's contract.
        let dx = unsafe { std::slice::from_raw_parts_mut(self.dx.at(start), len) };
        (&self.x[start..][..len], &self.dy[start..][..len], dx)
    }

    /// Puts g where dx will be; the sums of g·x̂ and of g over the block.
    ///
    /// # Safety
    /// As for [`Work::block`].
    unsafe fn slopes(&self, index: usize, block: usize) -> ((Vec<T>, Vec<T>), Columns<'_, T>) {
        let columns = self.columns(index);
        // SAFETY: the caller's contract.
        let (x, dy, dx) = unsafe { self.block(index, block) };
        (block_slopes(dx, (x, dy), &columns, self.activation), columns)
    }

    /// The means of g·w·x̂ and of g·w over each group, from the sums over a plane.
    fn means(&self, (gx, g): &(Vec<T>, Vec<T>)) -> (Vec<T>, Vec<T>) {
        let count = T::of(1.0 / (self.plane.positions * (self.plane.c / self.plane.groups)) as f64);
        let mean = |sums: &[T]| {
            let mut means: Vec<T> = sums.iter().zip(self.affine.0).map(|(sum, w)| *sum * *w).collect();
            pool_groups(&mut means, self.plane, count);
            means
        };
        (mean(gx), mean(g))
    }

    /// Makes of g dx.
    ///
    /// # Safety
    /// As for [`Work::block`].
    unsafe fn finish(&self, index: usize, block: usize, columns: &Columns<T>, means: &(Vec<T>, Vec<T>)) {
        // SAFETY: the caller's contract.
        let (x, _, dx) = unsafe { self.block(index, block) };
        finish_block(dx, x, columns, (&means.0, &means.1));
    }
}

vectorised! {
    fn block_slopes[T: Real](
        dx: &mut [T], inputs: (&[T], &[T]), columns: &Columns<T>, activation: Activation,
    ) -> (Vec<T>, Vec<T>) {
        let (x, dy) = inputs;
        let c = columns.mean.len();
        let (mean, rstd, (w, b)) = (&columns.mean[..c], &columns.rstd[..c], columns.affine);
        let (w, b) = (&w[..c], &b[..c]);
        let (mut gx, mut g) = (vec![T::ZERO; c], vec![T::ZERO; c]);
        for ((row, dy), dx) in x.chunks_exact(c).zip(dy.chunks_exact(c)).zip(dx.chunks_exact_mut(c)) {
            match activation {
                Activation::None => dx.copy_from_slice(dy),
                Activation::Silu => {
                    for i in 0..c {
                        dx[i] = dy[i] * silu_slope::<T, FUSED>((row[i] - mean[i]) * rstd[i] * w[i] + b[i]);
                    }
                }
            }
            for i in 0..c {
                g[i] += dx[i];
                gx[i] += dx[i] * (row[i] - mean[i]) * rstd[i];
            }
        }
        (gx, g)
    }
}

vectorised! {
    fn finish_block[T: Real](dx: &mut [T], x: &[T], columns: &Columns<T>, means: (&[T], &[T])) {
        let c = columns.mean.len();
        let (mean, rstd, w) = (&columns.mean[..c], &columns.rstd[..c], &columns.affine.0[..c]);
        let (gx, g) = (&means.0[..c], &means.1[..c]);
        for (row, dx) in x.chunks_exact(c).zip(dx.chunks_exact_mut(c)) {
            for i in 0..c {
                let normed = (row[i] - mean[i]) * rstd[i];
                dx[i] = rstd[i] * (dx[i] * w[i] - g[i] - normed * gx[i]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::forward::forward;
    use super::*;
    use crate::rng::Rng;

    /// By the formula, value by value.
    fn directly(x: &[f64], w: &[f64], dy: &[f64], statistics: &[f64], plane: Plane) -> Triple<f64> {
        let size = plane.c / plane.groups;
        let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; plane.c], vec![0.0; plane.c]);
        for (index, kept) in statistics.chunks_exact(2).enumerate() {
            let (start, first) = (index / plane.groups * plane.len(), index % plane.groups * size);
            let places =
                || (0..plane.positions).flat_map(|p| (first..first + size).map(move |c| (start + p * plane.c + c, c)));
            let normed = |at: usize| (x[at] - kept[0]) * kept[1];
            let count = (plane.positions * size) as f64;
            let mean = places().map(|(at, c)| dy[at] * w[c]).sum::<f64>() / count;
            let mean_of_normed = places().map(|(at, c)| dy[at] * w[c] * normed(at)).sum::<f64>() / count;
            for (at, c) in places() {
                db[c] += dy[at];
                dw[c] += dy[at] * normed(at);
                dx[at] = kept[1] * (dy[at] * w[c] - mean - normed(at) * mean_of_normed);
            }
        }
        (dx, dw, db)
    }

    /// Pictures of one block, of many, and of a last one that is not whole.
    #[test]
    fn gradients_of_large_pictures_are_the_formulas_in_f32_and_f64() {
        for (positions, c, groups) in [(60, 32, 8), (33_000, 32, 32), (5_003, 48, 8), (300, 320, 8)] {
            let plane = Plane { positions, c, groups, eps: 1e-5 };
            let mut rng = Rng::new(4, "group norm test", positions as u64);
            let mut draw = |count: usize| -> Vec<f32> { (0..count).map(|_| 0.5 + rng.normal() as f32).collect() };
            let (x, w, dy) = (draw(2 * plane.len()), draw(c), draw(2 * plane.len()));
            let widened = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
            let (wide_x, wide_w, wide_dy) = (widened(&x), widened(&w), widened(&dy));
            let (zeros, activation) = (vec![0.0; c], Activation::None);
            let statistics = forward(&wide_x, &wide_w, &zeros, plane, activation).1;
            let exact = directly(&wide_x, &wide_w, &wide_dy, &statistics, plane);
            let wide = backward((&wide_x, &wide_w, &zeros), &wide_dy, &statistics, plane, activation);
            let narrow_statistics: Vec<f32> = statistics.iter().map(|v| *v as f32).collect();
            let narrow = backward((&x, &w, &vec![0.0; c]), &dy, &narrow_statistics, plane, activation);
            let error = |found: &[f64], exact: &[f64]| {
                let largest = exact.iter().fold(0f64, |most, v| most.max(v.abs()));
                found.iter().zip(exact).map(|(v, exact)| (v - exact).abs()).fold(0.0, f64::max) / largest
            };
            for (name, wide, narrow, exact) in [
                ("dx", &wide.0, &narrow.0, &exact.0),
                ("dw", &wide.1, &narrow.1, &exact.1),
                ("db", &wide.2, &narrow.2, &exact.2),
            ] {
                let errors = (error(wide, exact), error(&widened(narrow), exact));
                assert!(errors.0 < 1e-12 && errors.1 < 2e-6, "{name}, {positions} positions of {c}: {errors:?}");
            }
        }
    }
}

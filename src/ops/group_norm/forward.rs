//! Mean and variance are taken in two passes, so that a large common offset does not eat the precision; of large pictures
//! block by block, so that sums of a million values do not either, and all threads share in one picture.

use super::{Activation, Plane, pool_groups, read_statistics, repeated};
use crate::ops::activation::silu_of;
use crate::ops::buffer::unwritten;
use crate::ops::parallel;
use crate::ops::real::{Real, vectorised};

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
pub(super) fn forward<T: Real>(x: &[T], w: &[T], b: &[T], plane: Plane, activation: Activation) -> (Vec<T>, Vec<T>) {
    if plane.blocks() > 1 {
        return forward_by_blocks(x, w, b, plane, activation);
    }
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

/// The same where planes are large. The blocks are the plane's, whatever the number of planes and threads, and so are the bits.
fn forward_by_blocks<T: Real>(x: &[T], w: &[T], b: &[T], plane: Plane, activation: Activation) -> (Vec<T>, Vec<T>) {
    let (width, blocks) = (plane.row(), plane.blocks());
    let values_of = |item: usize| {
        let (start, first) = (item / blocks * plane.len(), item % blocks * plane.block());
        start + first..start + plane.len().min(first + plane.block())
    };
    let items = x.len() / plane.len() * blocks;
    let mut moments: Vec<T> = unwritten(items * 2 * width); // [items, mean and squares, row]
    parallel::for_rows(&mut moments, 2 * width, 1, |items, moments| {
        for (item, moments) in items.zip(moments.chunks_exact_mut(2 * width)) {
            column_moments(moments, &x[values_of(item)]);
        }
    });
    let (w, b) = (repeated(w, width), repeated(b, width));
    let (mut kept, mut factors) = (Vec::new(), Vec::new()); // [planes, groups, 2], [planes, (scale, shift), row]
    for moments in moments.chunks_exact(blocks * 2 * width) {
        let statistics = merged(moments, plane);
        let (mut mean, mut rstd) = (unwritten(width), unwritten(width));
        read_statistics(&statistics, plane, &mut mean, &mut rstd);
        scale_and_shift((&mut rstd, &mut mean), (&w, &b));
        kept.extend(statistics);
        factors.extend(rstd.into_iter().chain(mean));
    }
    let mut y = unwritten(x.len());
    let y_at = parallel::Disjoint::new(&mut y);
    parallel::map(items, 1, |items| {
        for item in items {
            let values = values_of(item);
            // SAFETY: the blocks of different items do not overlap, and end where x and y do.
            let y = unsafe { std::slice::from_raw_parts_mut(y_at.at(values.start), values.len()) };
            affine(y, &x[values], &factors[item / blocks * 2 * width..][..2 * width], activation);
        }
    });
    (y, kept)
}

vectorised! {
    /// Of each column of some rows: its mean, and the sum of the squares of its values' distances from it, a row each.
    fn column_moments[T: Real](moments: &mut [T], x: &[T]) {
        let width = moments.len() / 2;
        let (mean, squares) = moments.split_at_mut(width);
        mean.fill(T::ZERO);
        squares.fill(T::ZERO);
        for row in x.chunks_exact(width) {
            for i in 0..width {
                mean[i] += row[i];
            }
        }
        let per_row = T::of(width as f64 / x.len() as f64);
        mean.iter_mut().for_each(|mean| *mean *= per_row);
        for row in x.chunks_exact(width) {
            for i in 0..width {
                let d = row[i] - mean[i];
                squares[i] += d * d;
            }
        }
    }
}

/// `[mean, rstd]` of each group of a plane from its blocks' columns: with n values of mean m and squares q in each, the mean is
/// Σn·m/N and the variance Σ(q + n·(m − mean)²)/N (Chan, Golub and LeVeque 1979).
fn merged<T: Real>(moments: &[T], plane: Plane) -> Vec<T> {
    let (width, size) = (plane.row(), plane.c / plane.groups);
    let count = 1.0 / (plane.positions * size) as f64;
    let rows = plane.len() / width;
    let whole = plane.block() / width;
    let blocks = moments.chunks_exact(2 * width).enumerate();
    let blocks = blocks.map(|(i, block)| (whole.min(rows - i * whole) as f64, block.split_at(width)));
    let mut mean = vec![0.0; width];
    for (n, (means, _)) in blocks.clone() {
        mean.iter_mut().zip(means).for_each(|(sum, m)| *sum += n * m.to_f64());
    }
    pool_groups(&mut mean, plane, count);
    let mut variance = vec![0.0; width];
    for (n, (means, squares)) in blocks {
        for i in 0..width {
            let d = means[i].to_f64() - mean[i];
            variance[i] += squares[i].to_f64() + n * d * d;
        }
    }
    pool_groups(&mut variance, plane, count);
    let of_group = |channel: usize| [T::of(mean[channel]), T::of(1.0 / (variance[channel] + plane.eps).sqrt())];
    (0..plane.c).step_by(size).flat_map(of_group).collect()
}

/// Makes of 1/σ and μ what x is multiplied by and what is added then: w/σ and b − μ·w/σ.
#[inline(always)]
fn scale_and_shift<T: Real>((rstd, mean): (&mut [T], &mut [T]), (w, b): (&[T], &[T])) {
    for i in 0..w.len() {
        let scale = rstd[i] * w[i];
        mean[i] = b[i] - mean[i] * scale;
        rstd[i] = scale;
    }
}

vectorised! {
    /// x·scale + shift by columns, both in `factors`, and what follows.
    fn affine[T: Real](y: &mut [T], x: &[T], factors: &[T], activation: Activation) {
        affine_rows::<T, FUSED>(y, x, factors.split_at(factors.len() / 2), activation);
    }
}

#[inline(always)]
fn affine_rows<T: Real, const FUSED: bool>(y: &mut [T], x: &[T], (scale, shift): (&[T], &[T]), activation: Activation) {
    let width = scale.len();
    for (row, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
        for i in 0..width {
            y[i] = row[i] * scale[i] + shift[i];
        }
    }
    if activation == Activation::Silu {
        y.iter_mut().for_each(|y| *y = silu_of::<T, FUSED>(*y));
    }
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
            scale_and_shift((&mut rstd, &mut mean), (&w, &b));
            affine_rows::<T, FUSED>(y, x, (&rstd, &mean), activation);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// Values far from zero that vary little, in pictures of one block and of many, and of a last one that is not whole.
    #[test]
    fn sums_over_large_pictures_keep_the_precision_and_every_picture_its_bits() {
        for (positions, c, groups) in [(60, 32, 8), (33_000, 32, 32), (5_003, 48, 8), (4_096, 320, 8)] {
            let plane = Plane { positions, c, groups, eps: 1e-5 };
            let mut rng = Rng::new(3, "group norm test", positions as u64);
            let x: Vec<f32> = (0..3 * plane.len()).map(|_| 3.0 + 0.01 * rng.normal() as f32).collect();
            let wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let (y, kept) = forward(&x, &vec![1.0; c], &vec![0.5; c], plane, Activation::None);
            let (exact, _) = forward(&wide, &vec![1.0; c], &vec![0.5; c], plane, Activation::None);
            let error = y.iter().zip(&exact).map(|(y, exact)| (f64::from(*y) - exact).abs()).fold(0.0, f64::max);
            // A mean's own rounding is 1e-7·3/0.01, three times that the shift's.
            assert!(error < 1.2e-4, "{positions} positions of {c}: {error:e}");
            let (alone, kept_alone) = forward(&x[..plane.len()], &vec![1.0; c], &vec![0.5; c], plane, Activation::None);
            assert!(alone == y[..plane.len()] && kept_alone == kept[..2 * groups], "{positions} positions of {c}");
        }
    }
}

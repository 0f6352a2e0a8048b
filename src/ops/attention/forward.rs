//! The output, keys block by block: what a query has added up is scaled down when a later block holds a larger score
//! (Milakov and Gimelshein 2018, as in FlashAttention).

use super::Sizes;
use super::kernel::{KEYS, Tile, exp_or_zero};
use crate::ops::buffer::{Aligned, unwritten};
use crate::ops::lanes::LANES;
use crate::ops::parallel;
use crate::ops::product::{Matrix, Start, lane_product};
use crate::ops::real::{Real, vectorised};

/// Values that the tiles hold at most which read a block of keys one after the other, while it is in the cache: a quarter of a
/// megabyte in the second-level one. The more of them, the fewer times all keys come from memory.
const GROUP_VALUES: usize = 65_536;

/// The output and the logarithm of each query's denominator, `[b, heads, l]`.
pub fn forward_heads<T: Real>([q, k, v]: [&[T]; 3], bias: Option<&[T]>, sizes: Sizes) -> (Vec<T>, Vec<T>) {
    let Sizes { b, l, s, heads, d, .. } = sizes;
    let (mut out, mut denominators) = (unwritten(q.len()), unwritten(b * heads * l));
    let (out_at, denominators_at) = (parallel::Disjoint::new(&mut out), parallel::Disjoint::new(&mut denominators));
    let tiles = sizes.tiles();
    let widest = tiles[tiles.len() - 1].lanes;
    let groups: Vec<&[Tile]> = tiles.chunks((GROUP_VALUES / (2 * d * widest)).clamp(2, 16)).collect();
    parallel::map(b * heads * groups.len(), 1, |range| {
        let mut scores = Aligned::unwritten(KEYS * widest);
        for item in range {
            let (at, group) = ((item / groups.len() / heads, item / groups.len() % heads), groups[item % groups.len()]);
            let mut queries: Vec<_> = group.iter().map(|tile| Queries::new(q, at, *tile, sizes)).collect();
            let seen = if sizes.is_causal { group.iter().map(|tile| tile.first + tile.count).max() } else { None };
            for first in (0..seen.unwrap_or(s)).step_by(KEYS) {
                let keys = first..s.min(first + KEYS);
                for queries in &mut queries {
                    let scores = &mut scores[..keys.len() * queries.tile.lanes];
                    sizes.scores((k, bias), at, (queries.tile, &queries.turned), keys.clone(), scores);
                    soften(scores, &mut queries.top, &mut queries.sums, &mut queries.out);
                    let (product, values) =
                        ((d, queries.tile.lanes, keys.len()), sizes.keys(v, at, first).transposed());
                    // SAFETY: v has these keys of d values, scores a row for each, out d rows.
                    unsafe {
                        let (lanes, out) = (queries.tile.lanes, &mut queries.out);
                        let target = (Matrix::rows_mut(out, lanes), Start::Held);
                        lane_product(product, values, Matrix::rows(scores, lanes), target)
                    }
                }
            }
            for Queries { tile, top, sums, out, .. } in &mut queries {
                let of_head = (at.0 * heads + at.1) * l + tile.first;
                for lane in 0..tile.count {
                    // SAFETY: the queries of this group belong to this thread alone.
                    unsafe { *denominators_at.at(of_head + lane) = top[lane] + sums[lane].ln() };
                }
                divide(out, sums);
                // SAFETY: as above.
                unsafe { sizes.turn_back(out, *tile, out_at.at(sizes.row(l, at, tile.first)), T::ONE) };
            }
        }
    });
    (out, denominators)
}

/// What the queries of a tile have added up so far.
struct Queries<T> {
    tile: Tile,
    /// Scaled, `[d, lanes]`.
    turned: Aligned<T>,
    /// The largest score.
    top: Vec<T>,
    /// Σ exp(score − top)
    sums: Vec<T>,
    /// Σ exp(score − top)·v, `[d, lanes]`.
    out: Aligned<T>,
}

impl<T: Real> Queries<T> {
    fn new(q: &[T], at: (usize, usize), tile: Tile, sizes: Sizes) -> Self {
        Self {
            turned: sizes.turned(q, at, tile, sizes.scale()),
            // Below every score, and finite, so that a block of which no key is seen leaves no NaN.
            top: vec![T::of(-3e38); tile.lanes],
            sums: vec![T::ZERO; tile.lanes],
            out: Aligned::zeros(sizes.d * tile.lanes),
            tile,
        }
    }
}

vectorised! {
    /// Divides each column.
    fn divide[T: Real](out: &mut [T], sums: &[T]) {
        for row in out.chunks_exact_mut(sums.len()) {
            for (row, sums) in row.chunks_exact_mut(LANES).zip(sums.chunks_exact(LANES)) {
                for lane in 0..LANES {
                    let quotient = row[lane] / sums[lane];
                    row[lane] = quotient;
                }
            }
        }
    }
}

vectorised! {
    /// Makes of scores exp(score − top), with the new `top`, and scales what was added up with the old one.
    fn soften[T: Real](scores: &mut [T], top: &mut [T], sums: &mut [T], out: &mut [T]) {
        let lanes = top.len();
        for first in (0..lanes).step_by(LANES) {
            let old: [T; LANES] = std::array::from_fn(|lane| top[first + lane]);
            let mut new = old;
            for row in scores.chunks_exact(lanes) {
                let row = &row[first..first + LANES];
                for lane in 0..LANES {
                    new[lane] = row[lane].greater(new[lane]);
                }
            }
            let mut sum = [T::ZERO; LANES];
            for row in scores.chunks_exact_mut(lanes) {
                let row = &mut row[first..first + LANES];
                for lane in 0..LANES {
                    let e = exp_or_zero::<T, FUSED>(row[lane] - new[lane]);
                    row[lane] = e;
                    sum[lane] += e;
                }
            }
            let factor: [T; LANES] = std::array::from_fn(|lane| exp_or_zero::<T, FUSED>(old[lane] - new[lane]));
            for lane in 0..LANES {
                top[first + lane] = new[lane];
                sums[first + lane] = sums[first + lane] * factor[lane] + sum[lane];
            }
            if factor != [T::ONE; LANES] {
                for row in out.chunks_exact_mut(lanes) {
                    let row = &mut row[first..first + LANES];
                    for lane in 0..LANES {
                        row[lane] *= factor[lane];
                    }
                }
            }
        }
    }
}

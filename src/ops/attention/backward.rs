//! The gradients, block of keys by block of keys: the probabilities are computed again from the denominators that the forward
//! pass kept. With P the probabilities: dv = Pᵀ·dy, dP = dy·vᵀ, dS = P∘(dP − rowsum(dy∘o)), dq = dS·k/√d, dk = dSᵀ·q/√d.

use super::Sizes;
use super::kernel::{KEYS, Tile, exp_or_zero};
use crate::ops::buffer::{Aligned, unwritten};
use crate::ops::lanes::LANES;
use crate::ops::linear::sum_of;
use crate::ops::parallel;
use crate::ops::product::{Matrix, Start, lane_product};
use crate::ops::real::{Real, vectorised};

/// dq, dk, dv; a head's keys belong to one thread, or shared out to some where there are too few heads for all threads.
pub fn backward_heads<T: Real>(
    [q, k, v, o, dy]: [&[T]; 5],
    denominators: &[T],
    bias: Option<&[T]>,
    sizes: Sizes,
) -> [Vec<T>; 3] {
    let Sizes { b, l, s, heads, d, .. } = sizes;
    let blocks = s.div_ceil(KEYS);
    let shares = shares(b * heads, parallel::parts(usize::MAX, 1)).min(blocks);
    let [mut dk, mut dv] = [k, v].map(|x| unwritten(x.len()));
    let mut dq: Vec<_> = (0..shares).map(|_| unwritten(q.len())).collect();
    let [dk_at, dv_at] = [&mut dk, &mut dv].map(|g| parallel::Disjoint::new(g));
    let dq_at: Vec<_> = dq.iter_mut().map(|g| parallel::Disjoint::new(g)).collect();
    let tiles = sizes.tiles();
    parallel::map(b * heads * shares, 1, |range| {
        let padded = d.next_multiple_of(LANES);
        let widest = tiles[tiles.len() - 1].lanes;
        let (mut p, mut ds) = (Aligned::unwritten(KEYS * widest), Aligned::unwritten(KEYS * widest));
        let (mut dk_block, mut dv_block) = (Aligned::unwritten(KEYS * padded), Aligned::unwritten(KEYS * padded));
        for item in range {
            let (head, share) = (item / shares, item % shares);
            let at = (head / heads, head % heads);
            let denominators = &denominators[head * l..][..l];
            let queries = |tile: &Tile| Queries::new([q, o, dy], denominators, at, *tile, sizes);
            let mut queries: Vec<_> = tiles.iter().map(queries).collect();
            for block in parallel::range(blocks, shares, share) {
                let first = block * KEYS;
                let keys = first..s.min(first + KEYS);
                let [dk_block, dv_block] = [&mut dk_block, &mut dv_block].map(|g| &mut g[..keys.len() * padded]);
                dk_block.fill(T::ZERO);
                dv_block.fill(T::ZERO);
                for queries in &mut queries {
                    let tile = queries.tile;
                    if sizes.is_causal && tile.first + tile.count <= first {
                        continue;
                    }
                    let [p, ds] = [&mut p, &mut ds].map(|x| &mut x[..keys.len() * tile.lanes]);
                    sizes.scores((k, bias), at, (tile, &queries.turned), keys.clone(), p);
                    let lanes = tile.lanes;
                    let by_query = (keys.len(), lanes, d);
                    let by_key = (keys.len(), padded, lanes);
                    // SAFETY: k and v have these keys of d values; p and ds a row of `lanes` for each, the blocks one of
                    // `padded`, what is turned d rows of `lanes`, the others a row of `padded` for each lane.
                    unsafe {
                        let (turned, of_ds) = (Matrix::rows(&queries.dy_turned, lanes), Matrix::rows_mut(ds, lanes));
                        lane_product(by_query, sizes.keys(v, at, first), turned, (of_ds, Start::Zero));
                        slopes(p, ds, &queries.denominators, &queries.dots);
                        let [p_rows, ds_rows] = [&*p, &*ds].map(|x| Matrix::rows(x, lanes));
                        let [dy, q] = [&queries.dy, &queries.q].map(|x| Matrix::rows(x, padded));
                        let [dk, dv] =
                            [&mut *dk_block, &mut *dv_block].map(|x| (Matrix::rows_mut(x, padded), Start::Held));
                        lane_product(by_key, p_rows, dy, dv);
                        lane_product(by_key, ds_rows, q, dk);
                        let (by_width, k) = ((d, lanes, keys.len()), sizes.keys(k, at, first).transposed());
                        let dq = (Matrix::rows_mut(&mut queries.dq_turned, lanes), Start::Held);
                        lane_product(by_width, k, ds_rows, dq);
                    }
                }
                for (i, key) in keys.enumerate() {
                    for (block, target) in [(&*dk_block, &dk_at), (&*dv_block, &dv_at)] {
                        // SAFETY: these keys of the head are written by this thread alone.
                        let row = unsafe { std::slice::from_raw_parts_mut(target.at(sizes.row(s, at, key)), d) };
                        row.copy_from_slice(&block[i * padded..][..d]);
                    }
                }
            }
            for Queries { tile, dq_turned, .. } in &queries {
                let start = dq_at[share].at(sizes.row(l, at, tile.first));
                // SAFETY: this share of the head's queries is written by this thread alone.
                unsafe { sizes.turn_back(dq_turned, *tile, start, sizes.scale()) };
            }
        }
    });
    [sum_of(dq), dk, dv]
}

/// Into how many shares the keys of each of so many heads go, that all threads have nearly the same to do. Each costs a pass
/// over the queries and its own sum of their gradients.
fn shares(heads: usize, threads: usize) -> usize {
    let most = if heads < 4 * threads { 4 } else { 1 };
    let are_even = |shares: &usize| (heads * shares).is_multiple_of(threads);
    (1..=most).find(are_even).unwrap_or(most)
}

/// A tile of queries in both directions: a column each, `[d, lanes]`, and a row each, `[lanes, d and zeros behind it]`.
struct Queries<T> {
    tile: Tile,
    /// Scaled.
    turned: Aligned<T>,
    dy_turned: Aligned<T>,
    dq_turned: Aligned<T>,
    /// Scaled.
    q: Aligned<T>,
    dy: Aligned<T>,
    denominators: Vec<T>,
    /// Σ o·dy
    dots: Vec<T>,
}

impl<T: Real> Queries<T> {
    fn new([q, o, dy]: [&[T]; 3], denominators: &[T], at: (usize, usize), tile: Tile, sizes: Sizes) -> Self {
        let d = sizes.d;
        let padded = d.next_multiple_of(LANES);
        fn row<T>(values: &[T], sizes: Sizes, at: (usize, usize), query: usize) -> &[T] {
            &values[sizes.row(sizes.l, at, query)..][..sizes.d]
        }
        let rows = |values: &[T], scale: T| {
            let mut rows = Aligned::zeros(tile.lanes * padded);
            for (lane, to) in rows.chunks_exact_mut(padded).take(tile.count).enumerate() {
                to.iter_mut()
                    .zip(row(values, sizes, at, tile.first + lane))
                    .for_each(|(to, value)| *to = *value * scale);
            }
            rows
        };
        let mut queries = Self {
            turned: sizes.turned(q, at, tile, sizes.scale()),
            dy_turned: sizes.turned(dy, at, tile, T::ONE),
            dq_turned: Aligned::zeros(d * tile.lanes),
            q: rows(q, sizes.scale()),
            dy: rows(dy, T::ONE),
            denominators: vec![T::ZERO; tile.lanes],
            dots: vec![T::ZERO; tile.lanes],
            tile,
        };
        for lane in 0..tile.count {
            let query = tile.first + lane;
            let (o, dy) = (row(o, sizes, at, query), row(dy, sizes, at, query));
            queries.denominators[lane] = denominators[query];
            queries.dots[lane] = o.iter().zip(dy).map(|(o, dy)| *o * *dy).sum();
        }
        queries
    }
}

vectorised! {
    /// From scores and dP: P, and dS = P∘(dP − dot).
    fn slopes[T: Real](p: &mut [T], ds: &mut [T], denominators: &[T], dots: &[T]) {
        let lanes = denominators.len();
        for (p, ds) in p.chunks_exact_mut(lanes).zip(ds.chunks_exact_mut(lanes)) {
            let of_queries = denominators.chunks_exact(LANES).zip(dots.chunks_exact(LANES));
            let registers = p.chunks_exact_mut(LANES).zip(ds.chunks_exact_mut(LANES)).zip(of_queries);
            for ((p, ds), (denominators, dots)) in registers {
                for lane in 0..LANES {
                    p[lane] = exp_or_zero::<T, FUSED>(p[lane] - denominators[lane]);
                    ds[lane] = p[lane] * (ds[lane] - dots[lane]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_threads_have_heads_or_shares_of_them() {
        for (heads, threads, expected) in [(8, 2, 1), (8, 16, 2), (12, 16, 4), (5, 2, 2), (1, 16, 4), (300, 16, 1)] {
            assert_eq!(shares(heads, threads), expected, "{heads} heads, {threads} threads");
        }
    }
}

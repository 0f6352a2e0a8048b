//! The gradients, block of keys by block of keys: the probabilities are computed again from the denominators that the forward
//! pass kept. With P the probabilities: dv = Pᵀ·dy, dP = dy·vᵀ, dS = P∘(dP − rowsum(dy∘o)), dq = dS·k/√d, dk = dSᵀ·q/√d.

use super::Sizes;
use super::kernel::{KEYS, Tile, exp_or_zero};
use crate::ops::buffer::{Aligned, unwritten};
use crate::ops::lanes::LANES;
use crate::ops::parallel;
use crate::ops::product::{Matrix, Start, lane_product};
use crate::ops::real::{Real, vectorised};

/// dq, dk, dv; each head belongs to one thread.
pub fn backward_heads<T: Real>(
    [q, k, v, o, dy]: [&[T]; 5],
    denominators: &[T],
    bias: Option<&[T]>,
    sizes: Sizes,
) -> [Vec<T>; 3] {
    let Sizes { b, l, s, heads, d, .. } = sizes;
    let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| unwritten(x.len()));
    let [dq_at, dk_at, dv_at] = [&mut dq, &mut dk, &mut dv].map(|g| parallel::Disjoint::new(g));
    let tiles = sizes.tiles();
    parallel::map(b * heads, 1, |range| {
        let padded = d.next_multiple_of(LANES);
        let widest = tiles[tiles.len() - 1].lanes;
        let (mut p, mut ds) = (Aligned::unwritten(KEYS * widest), Aligned::unwritten(KEYS * widest));
        let (mut dk_block, mut dv_block) = (Aligned::unwritten(KEYS * padded), Aligned::unwritten(KEYS * padded));
        for item in range {
            let at = (item / heads, item % heads);
            let denominators = &denominators[item * l..][..l];
            let queries = |tile: &Tile| Queries::new([q, o, dy], denominators, at, *tile, sizes);
            let mut queries: Vec<_> = tiles.iter().map(queries).collect();
            for first in (0..s).step_by(KEYS) {
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
                        // SAFETY: this head's keys are written by this thread alone.
                        let row = unsafe { std::slice::from_raw_parts_mut(target.at(sizes.row(s, at, key)), d) };
                        row.copy_from_slice(&block[i * padded..][..d]);
                    }
                }
            }
            for Queries { tile, dq_turned, .. } in &queries {
                let start = dq_at.at(sizes.row(l, at, tile.first));
                // SAFETY: this head's queries are written by this thread alone.
                unsafe { sizes.turn_back(dq_turned, *tile, start, sizes.scale()) };
            }
        }
    });
    [dq, dk, dv]
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

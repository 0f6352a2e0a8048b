//! The gradients, from scores computed again block by block.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::memory::unwritten_lines;
use super::super::pack::{Side, Sum, store_row, transposed};
use super::super::unit::{Registers, Tiles};
use super::super::{SIDE, Tile};
use super::{Along, KEYS, PITCH, Packed, ROWS, exp, multiply_into, outputs, steps};
use crate::ops::attention::Sizes;
use crate::ops::buffer::unwritten;
use crate::ops::parallel::{self, Disjoint};

/// `kept` are the logarithms of the denominators, beside the scores' bias.
pub fn backward_heads<const PLANES: usize>(
    inputs: [&[f32]; 5],
    (kept, bias): (&[f32], Option<&[f32]>),
    sizes: Sizes,
) -> [Vec<f32>; 3] {
    let [q, k, ..] = inputs;
    let mut gradients = [unwritten(q.len()), unwritten(k.len()), unwritten(k.len())];
    let places = gradients.each_mut().map(|gradient| Disjoint::new(gradient));
    parallel::map(sizes.b * sizes.heads, 1, |heads| {
        for at in heads {
            // SAFETY: the unit is there; this head's gradients are this thread's.
            unsafe { backward_head::<PLANES>(inputs, (&kept[at * sizes.l..][..sizes.l], bias), sizes, at, &places) };
        }
    });
    gradients
}

/// With P the probabilities: dv = Pᵀ·dy, dP = dy·vᵀ, dS = P∘(dP − rowsum(dy∘o))/√d, dq = dS·k, dk = dSᵀ·q.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn backward_head<const PLANES: usize>(
    [q, k, v, o, dy]: [&[f32]; 5],
    (kept, bias): (&[f32], Option<&[f32]>),
    sizes: Sizes,
    at: usize,
    [dq_at, dk_at, dv_at]: &[Disjoint<f32>; 3],
) {
    let (l, s, d) = (sizes.l, sizes.s, sizes.d);
    let (sum, columns) = (Sum::of(d), sizes.columns());
    let width = columns * SIDE;
    let rows = l.div_ceil(SIDE);
    let along_queries = Sum::in_tiles(l);
    // SAFETY (all blocks): the unit is there, factors lie inside the caller's slices, tiles inside their buffers.
    let pack = |values: &[f32], (rows, range), along, side, sum, scale| unsafe {
        Packed::new::<PLANES>(sizes.factor(values, (rows, at), range, along, side), sum, scale)
    };
    let q_left = pack(q, (l, 0..l), Along::Width, Side::Left, sum, sizes.scale());
    let dy_left = pack(dy, (l, 0..l), Along::Width, Side::Left, sum, 1.0);
    let q_right = pack(q, (l, 0..l), Along::Rows, Side::Right, along_queries, sizes.scale());
    let dy_right = pack(dy, (l, 0..l), Along::Rows, Side::Right, along_queries, 1.0);
    let dots: Vec<f32> = (0..l)
        .map(|query| {
            let row = sizes.start((l, at), query);
            o[row..][..d].iter().zip(&dy[row..][..d]).map(|(o, dy)| o * dy).sum()
        })
        .collect();
    let mut dq = vec![0f32; rows * SIDE * width];
    let mut p = unwritten(ROWS * SIDE * PITCH);
    let mut ds = unwritten(ROWS * SIDE * PITCH);
    let mut ds_tiles = unwritten_lines::<Tile>(ROWS * KEYS / 32 * PLANES);
    let [mut p_turned, mut ds_turned] = [(); 2].map(|()| unwritten_lines::<Tile>(KEYS / SIDE * PLANES));
    let (width_steps, one_step) = (steps::<PLANES>(sum.blocks), steps::<PLANES>(1));
    for first in (0..s).step_by(KEYS) {
        let keys = first..s.min(first + KEYS);
        let along_keys = Sum::in_tiles(keys.len());
        let padded = along_keys.blocks * 32;
        let k_right = pack(k, (s, keys.clone()), Along::Width, Side::Right, sum, 1.0);
        let v_right = pack(v, (s, keys.clone()), Along::Width, Side::Right, sum, 1.0);
        let k_along = pack(k, (s, keys.clone()), Along::Rows, Side::Right, along_keys, sizes.scale());
        let key_steps = steps::<PLANES>(along_keys.blocks);
        let [mut dk, mut dv] = [(); 2].map(|()| vec![0f32; padded * width]);
        for row in (0..rows).step_by(ROWS) {
            let height = ROWS.min(rows - row);
            unsafe {
                multiply_into::<PLANES>(sum.pairs, &width_steps, height, (&q_left, row), &k_right, (&mut p, PITCH));
                multiply_into::<PLANES>(sum.pairs, &width_steps, height, (&dy_left, row), &v_right, (&mut ds, PITCH));
                for r in 0..ROWS * SIDE {
                    let query = row * SIDE + r;
                    let (p, ds) = (&mut p[r * PITCH..][..padded], &mut ds[r * PITCH..][..padded]);
                    if let Some(bias) = bias.filter(|_| query < l) {
                        let own = sizes.bias_of(bias, (at, query), &keys);
                        p.iter_mut().zip(own).for_each(|(score, bias)| *score += bias);
                    }
                    let statistics = (query < l).then(|| (kept[query], dots[query]));
                    let tiles = (&mut ds_tiles[r / SIDE * along_keys.blocks * PLANES..], r % SIDE);
                    slopes_row::<PLANES>(p, ds, keys.len(), statistics, tiles);
                }
                turn::<PLANES>(&p, padded, &mut p_turned);
                turn::<PLANES>(&ds, padded, &mut ds_turned);
                let registers = Registers::new(SIDE);
                let start = |r: usize| ds_tiles.as_ptr().wrapping_add(r * along_keys.blocks * PLANES);
                let ds_left = Tiles::whole([start(0), start(1)]);
                for column in (0..columns).step_by(2) {
                    let wide = 2.min(columns - column);
                    let out = outputs(dq[row * SIDE * width + column * SIDE..].as_mut_ptr(), width);
                    let factors = (ds_left, k_along.pair::<PLANES>(column, 0));
                    registers.multiply_some::<PLANES>((height, wide), &key_steps, factors, (out, true));
                    for (turned, right, sums) in [(&p_turned, &dy_right, &mut dv), (&ds_turned, &q_right, &mut dk)] {
                        let right = right.pair::<PLANES>(column, row / 2);
                        for key in (0..padded / SIDE).step_by(2) {
                            let out = outputs(sums[key * SIDE * width + column * SIDE..].as_mut_ptr(), width);
                            let start = |key: usize| turned.as_ptr().wrapping_add(key * PLANES);
                            let left = Tiles::whole([start(key), start(key + 1)]);
                            registers.multiply_some::<PLANES>((2, wide), &one_step, (left, right), (out, true));
                        }
                    }
                }
            }
        }
        for (sums, to) in [(&dk, dk_at), (&dv, dv_at)] {
            // SAFETY: this head's rows are the caller's to write.
            unsafe { hand_out(sums, width, keys.clone(), |key| to.at(sizes.start((s, at), key)), d) };
        }
    }
    // SAFETY: as above.
    unsafe { hand_out(&dq, width, 0..l, |query| dq_at.at(sizes.start((l, at), query)), d) };
}

/// Writes the first `d` of each `width` sums to where their row lies.
unsafe fn hand_out(sums: &[f32], width: usize, rows: Range<usize>, to: impl Fn(usize) -> *mut f32, d: usize) {
    for (sums, row) in sums.chunks_exact(width).zip(rows) {
        // SAFETY: the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(to(row), d) }.copy_from_slice(&sums[..d]);
    }
}

/// From the scores and dP of a query: P and dS·√d in place, 0 beyond the last key and for no query, and dS into its tiles.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn slopes_row<const PLANES: usize>(
    p: &mut [f32],
    ds: &mut [f32],
    keys: usize,
    statistics: Option<(f32, f32)>,
    (tiles, row): (&mut [Tile], usize),
) {
    let Some((denominator, dot)) = statistics else {
        p.fill(0.0);
        ds.fill(0.0);
        return;
    };
    p[keys..].fill(f32::NEG_INFINITY);
    ds[keys..].fill(0.0);
    let (denominator, dot) = (_mm512_set1_ps(denominator), _mm512_set1_ps(dot));
    for (block, tiles) in (0..p.len()).step_by(32).zip(tiles.chunks_exact_mut(PLANES)) {
        let mut slopes = [_mm512_setzero_ps(); 2];
        for (half, slope) in slopes.iter_mut().enumerate() {
            let at = block + half * SIDE;
            debug_assert!(at + SIDE <= p.len() && at + SIDE <= ds.len());
            // SAFETY: inside the rows.
            unsafe {
                let probability = exp(_mm512_sub_ps(_mm512_loadu_ps(p.as_ptr().add(at)), denominator));
                *slope = _mm512_mul_ps(probability, _mm512_sub_ps(_mm512_loadu_ps(ds.as_ptr().add(at)), dot));
                _mm512_storeu_ps(p.as_mut_ptr().add(at), probability);
                _mm512_storeu_ps(ds.as_mut_ptr().add(at), *slope);
            }
        }
        // SAFETY: a tile has 16 rows.
        unsafe { store_row::<PLANES>(slopes[0], slopes[1], tiles, row) };
    }
}

/// 32 rows of `keys` values as a left factor along the rows, `[key tile][plane]`.
#[target_feature(enable = "avx512f")]
unsafe fn turn<const PLANES: usize>(values: &[f32], keys: usize, tiles: &mut [Tile]) {
    for (key, tiles) in (0..keys).step_by(SIDE).zip(tiles.chunks_exact_mut(PLANES)) {
        let half = |first: usize| {
            let mut rows = [_mm512_setzero_ps(); SIDE];
            for (i, row) in rows.iter_mut().enumerate() {
                // SAFETY: 32 rows of PITCH values, of which `keys` are in use.
                *row = unsafe { _mm512_loadu_ps(values.as_ptr().add((first + i) * PITCH + key)) };
            }
            transposed(rows)
        };
        let (low, high) = (half(0), half(SIDE));
        for row in 0..SIDE {
            // SAFETY: a tile has 16 rows.
            unsafe { store_row::<PLANES>(low[row], high[row], tiles, row) };
        }
    }
}

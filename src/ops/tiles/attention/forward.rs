//! Sums of values weighted by a softmax that is brought up to date block by block.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::memory::unwritten_lines;
use super::super::pack::{Side, Sum, store_row};
use super::super::unit::{Registers, Tiles};
use super::super::{SIDE, Tile};
use super::{Along, KEYS, PITCH, Packed, ROWS, exp, multiply_into, outputs, steps};
use crate::ops::attention::Sizes;
use crate::ops::buffer::unwritten;
use crate::ops::parallel::{self, Disjoint};

pub fn forward_heads<const PLANES: usize>(
    inputs: [&[f32]; 3],
    bias: Option<&[f32]>,
    sizes: Sizes,
) -> (Vec<f32>, Vec<f32>) {
    let Sizes { b, l, heads, .. } = sizes;
    let (mut out, mut denominators) = (unwritten(inputs[0].len()), unwritten(b * heads * l));
    let (out_at, denominators_at) = (Disjoint::new(&mut out), Disjoint::new(&mut denominators));
    // A head is packed once for all its queries; where there are fewer heads than threads, threads share one.
    let shares = parallel::parts(usize::MAX, 1).div_ceil(b * heads).min(l.div_ceil(ROWS * SIDE));
    parallel::map(b * heads * shares, 1, |items| {
        for item in items {
            let (at, share) = (item / shares, item % shares);
            let own = parallel::range(l.div_ceil(SIDE), shares, share);
            let queries = own.start * SIDE..l.min(own.end * SIDE);
            // SAFETY: the unit is there; these queries of this head are this item's alone.
            unsafe {
                let denominators = denominators_at.at(at * l + queries.start);
                let kept = std::slice::from_raw_parts_mut(denominators, queries.len());
                forward_head::<PLANES>((inputs, bias), sizes, (at, queries), (&out_at, kept));
            }
        }
    });
    (out, denominators)
}

#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn forward_head<const PLANES: usize>(
    ([q, k, v], bias): ([&[f32]; 3], Option<&[f32]>),
    sizes: Sizes,
    (at, queries): (usize, Range<usize>),
    (out, kept): (&Disjoint<f32>, &mut [f32]),
) {
    let (l, s, d) = (sizes.l, sizes.s, sizes.d);
    let (sum, columns) = (Sum::of(d), sizes.columns());
    let width = columns * SIDE;
    let rows = queries.len().div_ceil(SIDE);
    // SAFETY (all blocks): the unit is there, factors lie inside the caller's slices, tiles inside their buffers.
    let left = sizes.factor(q, (l, at), queries.clone(), Along::Width, Side::Left);
    let left = unsafe { Packed::new::<PLANES>(left, sum, sizes.scale()) };
    let mut sums = vec![0f32; rows * SIDE * width];
    let mut greatest = vec![f32::NEG_INFINITY; rows * SIDE];
    let mut totals = vec![0f32; rows * SIDE];
    let mut scores = unwritten(ROWS * SIDE * PITCH);
    let mut p = unwritten_lines::<Tile>(ROWS * KEYS / 32 * PLANES);
    let width_steps = steps::<PLANES>(sum.blocks);
    for first in (0..s).step_by(KEYS) {
        let keys = first..s.min(first + KEYS);
        let along_keys = Sum::in_tiles(keys.len());
        let (right, values) = unsafe {
            let right = sizes.factor(k, (s, at), keys.clone(), Along::Width, Side::Right);
            let values = sizes.factor(v, (s, at), keys.clone(), Along::Rows, Side::Right);
            (Packed::new::<PLANES>(right, sum, 1.0), Packed::new::<PLANES>(values, along_keys, 1.0))
        };
        let key_steps = steps::<PLANES>(along_keys.blocks);
        for row in (0..rows).step_by(ROWS) {
            let height = ROWS.min(rows - row);
            unsafe {
                multiply_into::<PLANES>(sum.pairs, &width_steps, height, (&left, row), &right, (&mut scores, PITCH));
                for r in 0..height * SIDE {
                    let query = row * SIDE + r;
                    let scores = &mut scores[r * PITCH..][..PITCH];
                    if let Some(bias) = bias {
                        let own = sizes.bias_of(bias, (at, (queries.start + query).min(l - 1)), &keys);
                        scores.iter_mut().zip(own).for_each(|(score, bias)| *score += bias);
                    }
                    let tiles = &mut p[r / SIDE * along_keys.blocks * PLANES..];
                    let state = (&mut greatest[query], &mut totals[query]);
                    let shrink = softmax_row::<PLANES>(scores, keys.len(), state, (tiles, r % SIDE));
                    scale(&mut sums[query * width..][..width], shrink);
                }
                let registers = Registers::new(SIDE);
                let start = |r: usize| p.as_ptr().wrapping_add(r * along_keys.blocks * PLANES);
                let p = Tiles::whole([start(0), start(1)]);
                for column in (0..columns).step_by(2) {
                    let out = outputs(sums[row * SIDE * width + column * SIDE..].as_mut_ptr(), width);
                    let (size, factors) = ((height, 2.min(columns - column)), (p, values.pair::<PLANES>(column, 0)));
                    registers.multiply_some::<PLANES>(size, &key_steps, factors, (out, true));
                }
            }
        }
    }
    for (i, (query, kept)) in queries.zip(kept).enumerate() {
        *kept = greatest[i] + totals[i].ln();
        let row = &mut sums[i * width..][..d];
        // SAFETY: this query's output is the caller's to write.
        let out = unsafe { std::slice::from_raw_parts_mut(out.at(sizes.start((l, at), query)), d) };
        out.iter_mut().zip(row).for_each(|(out, sum)| *out = *sum / totals[i]);
    }
}

/// Writes exp(score − greatest so far) of a row into its tiles; returns what earlier sums of this row shrink by.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn softmax_row<const PLANES: usize>(
    scores: &mut [f32],
    keys: usize,
    (greatest, total): (&mut f32, &mut f32),
    (tiles, row): (&mut [Tile], usize),
) -> f32 {
    // Whole blocks of 32; what lies beyond the last key counts as −∞.
    let padded = keys.next_multiple_of(32);
    scores[keys..padded].fill(f32::NEG_INFINITY);
    let load = |i: usize| {
        debug_assert!(i + SIDE <= scores.len());
        // SAFETY: inside the row.
        unsafe { _mm512_loadu_ps(scores.as_ptr().add(i)) }
    };
    let mut max = load(0);
    for i in (SIDE..padded).step_by(SIDE) {
        max = _mm512_max_ps(max, load(i));
    }
    let new = greatest.max(_mm512_reduce_max_ps(max));
    let shrink = if new == *greatest { 1.0 } else { (*greatest - new).exp() };
    // Without a key seen so far, −∞ − −∞ would be NaN.
    let offset = _mm512_set1_ps(if new == f32::NEG_INFINITY { 0.0 } else { new });
    let mut sum = _mm512_setzero_ps();
    for (i, block) in (0..padded).step_by(32).zip(tiles.chunks_exact_mut(PLANES)) {
        let (low, high) = (exp(_mm512_sub_ps(load(i), offset)), exp(_mm512_sub_ps(load(i + SIDE), offset)));
        sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
        // SAFETY: a tile has 16 rows.
        unsafe { store_row::<PLANES>(low, high, block, row) };
    }
    *greatest = new;
    *total = *total * shrink + _mm512_reduce_add_ps(sum);
    shrink
}

#[target_feature(enable = "avx512f")]
#[inline]
fn scale(values: &mut [f32], factor: f32) {
    if factor != 1.0 {
        values.iter_mut().for_each(|v| *v *= factor);
    }
}

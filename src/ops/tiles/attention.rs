//! Attention on the tile unit, in blocks of queries and keys that stay in the second-level cache (FlashAttention 2, Dao
//! 2023): scores never leave it, and probabilities go into the next product's tiles as they are computed.

use std::arch::x86_64::*;
use std::ops::Range;

use super::memory::{from_single, single, unwritten_lines};
use super::pack::{Factor, Side, Sum, paired, rounded, transposed};
use super::unit::{Registers, Step, Tiles, available};
use super::{SIDE, Tile, for_planes};
use crate::ops::buffer::unwritten;
use crate::ops::parallel::{self, Disjoint};
use crate::ops::precision::{Precision, matmul_precision};
use crate::ops::real::Real;

/// Keys in a block.
const KEYS: usize = 512;
/// Rows of tiles in a block of queries: one pair along the sum of the weights' and keys' gradients.
const ROWS: usize = 2;
/// Values from one row of scores to the next: a line more than the keys, or the rows would share a few sets of the cache.
const PITCH: usize = KEYS + 16;

/// Sizes of an attention; heads lie side by side in rows of `heads·d`.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub b: usize,
    /// Queries.
    pub l: usize,
    /// Keys.
    pub s: usize,
    pub heads: usize,
    pub d: usize,
}

impl Sizes {
    fn suits<T: Real>(self) -> bool {
        self.d >= 8 && self.l >= SIDE && self.s >= SIDE && T::DTYPE == candle_core::DType::F32 && available()
    }
    /// Rows of a head of a set as a factor: along the width of the head, or along the rows.
    fn factor(
        self,
        values: &[f32],
        (rows, at): (usize, usize),
        range: Range<usize>,
        along: Along,
        side: Side,
    ) -> Factor {
        let (set, head) = (at / self.heads, at % self.heads);
        let width = self.heads * self.d;
        let start = &raw const values[(set * rows + range.start) * width + head * self.d];
        match along {
            Along::Width => Factor { start, across: width, along: 1, count: range.len(), side },
            Along::Rows => Factor { start, across: 1, along: width, count: self.d, side },
        }
    }
    fn start(self, (rows, at): (usize, usize), row: usize) -> usize {
        ((at / self.heads) * rows + row) * self.heads * self.d + at % self.heads * self.d
    }
    fn scale(self) -> f32 {
        1.0 / (self.d as f32).sqrt()
    }
    /// Tiles across the width of a head.
    fn columns(self) -> usize {
        self.d.div_ceil(SIDE)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Along {
    Width,
    Rows,
}

/// Whole tiles of a packed factor, `[row or column of tiles][block][plane]`.
struct Packed {
    tiles: Vec<Tile>,
    own: usize,
}

impl Packed {
    /// # Safety
    /// The unit is there, and the factor lies inside its allocation.
    unsafe fn new<const PLANES: usize>(factor: Factor, sum: Sum, scale: f32) -> Self {
        let rows = factor.count.div_ceil(SIDE);
        let own = sum.blocks * PLANES;
        // Zeros: rows of a left factor beyond its last are not packed.
        let mut tiles = unwritten_lines::<Tile>(rows * own);
        if factor.side == Side::Left && !factor.count.is_multiple_of(SIDE) {
            tiles[(rows - 1) * own..].fill(super::EMPTY);
        }
        // SAFETY: the caller's contract.
        unsafe { factor.pack::<PLANES>(sum, scale, (0..rows, 0..sum.blocks), &mut tiles) };
        Self { tiles, own }
    }

    /// The tiles of two rows or columns from `first` on, from block `block` on.
    fn pair<const PLANES: usize>(&self, first: usize, block: usize) -> Tiles {
        let start = |row: usize| self.tiles.as_ptr().wrapping_add(row * self.own + block * PLANES);
        Tiles::whole([start(first), start(first + 1)])
    }

    fn rows(&self) -> usize {
        self.tiles.len() / self.own
    }
}

fn steps<const PLANES: usize>(blocks: usize) -> Vec<Step> {
    (0..blocks).map(|block| block * PLANES * size_of::<Tile>()).map(|offset| (offset, offset)).collect()
}

/// Output tiles from `start` on, `pitch` values a row.
fn outputs(start: *mut f32, pitch: usize) -> [(*mut u8, usize); 4] {
    [0, 1, 2, 3].map(|i| (start.wrapping_add(i / 2 * SIDE * pitch + i % 2 * SIDE).cast(), pitch * size_of::<f32>()))
}

/// The output and the logarithm of each query's denominator, `[b, heads, l]`; None where this does not suit.
pub fn forward<T: Real>(q: &[T], k: &[T], v: &[T], sizes: Sizes) -> Option<(Vec<T>, Vec<T>)> {
    sizes.suits::<T>().then(|| {
        let (q, k, v) = (single(q), single(k), single(v));
        let (out, denominators) = for_planes!(matmul_precision(), forward_heads(q, k, v, sizes));
        (from_single(out), from_single(denominators))
    })
}

fn forward_heads<const PLANES: usize>(q: &[f32], k: &[f32], v: &[f32], sizes: Sizes) -> (Vec<f32>, Vec<f32>) {
    let Sizes { b, l, heads, .. } = sizes;
    let (mut out, mut denominators) = (unwritten(q.len()), unwritten(b * heads * l));
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
                forward_head::<PLANES>((q, k, v), sizes, (at, queries), (&out_at, kept));
            }
        }
    });
    (out, denominators)
}

#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn forward_head<const PLANES: usize>(
    (q, k, v): (&[f32], &[f32], &[f32]),
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
        let along_keys = Sum { k: keys.len(), pairs: SIDE, blocks: keys.len().div_ceil(32) };
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

/// Rows `row..` of a left factor times all of a right one into a buffer of `pitch` values a row.
unsafe fn multiply_into<const PLANES: usize>(
    pairs: usize,
    steps: &[Step],
    height: usize,
    (left, row): (&Packed, usize),
    right: &Packed,
    (buffer, pitch): (&mut [f32], usize),
) {
    // SAFETY: the caller's contract.
    let registers = unsafe { Registers::new(pairs) };
    let left = left.pair::<PLANES>(row, 0);
    for column in (0..right.rows()).step_by(2) {
        let out = outputs(buffer[column * SIDE..].as_mut_ptr(), pitch);
        let size = (height, 2.min(right.rows() - column));
        // SAFETY: as above.
        unsafe {
            registers.multiply_some::<PLANES>(size, steps, (left, right.pair::<PLANES>(column, 0)), (out, false))
        };
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
    let offset = _mm512_set1_ps(new);
    let mut sum = _mm512_setzero_ps();
    for (i, block) in (0..padded).step_by(32).zip(tiles.chunks_exact_mut(PLANES)) {
        let (low, high) = (exp(_mm512_sub_ps(load(i), offset)), exp(_mm512_sub_ps(load(i + SIDE), offset)));
        sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
        // SAFETY: a tile has 16 rows.
        unsafe { store_split::<PLANES>(low, high, block, row) };
    }
    *greatest = new;
    *total = *total * shrink + _mm512_reduce_add_ps(sum);
    shrink
}

/// The planes of a row of a tile.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store_split<const PLANES: usize>(mut low: __m512, mut high: __m512, tiles: &mut [Tile], row: usize) {
    for tile in tiles.iter_mut().take(PLANES) {
        let (l, h) = (rounded(low), rounded(high));
        // SAFETY: a tile has 16 rows of 64 bytes, and begins at a multiple of 64.
        unsafe { _mm512_store_si512(tile.0.as_mut_ptr().add(row * SIDE).cast(), paired(l, h)) };
        low = _mm512_sub_ps(low, _mm512_castsi512_ps(l));
        high = _mm512_sub_ps(high, _mm512_castsi512_ps(h));
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn scale(values: &mut [f32], factor: f32) {
    if factor != 1.0 {
        values.iter_mut().for_each(|v| *v *= factor);
    }
}

/// exp of values that are at most about 88, 0 for −∞: 2ⁿ·exp(r), |r| ≤ ln2/2, by the Taylor polynomial of degree 7.
#[target_feature(enable = "avx512f")]
#[inline]
fn exp(x: __m512) -> __m512 {
    let n = _mm512_roundscale_ps::<0>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
    // ln 2 in two pieces. −∞ would give NaN here; the lower bound keeps it out, far below what is not rounded to 0.
    let n = _mm512_max_ps(n, _mm512_set1_ps(-200.0));
    let x = _mm512_max_ps(x, _mm512_set1_ps(-140.0));
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693_359_4), x);
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.121_944_4e-4), r);
    let mut p = _mm512_set1_ps(1.984_127e-4);
    for c in [1.388_889e-3, 8.333_334e-3, 4.166_666_7e-2, 1.666_666_7e-1, 0.5, 1.0, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

/// dq, dk, dv from q, k, v, o, dy and what [`forward`] kept; None where this does not suit.
pub fn backward<T: Real>(inputs: [&[T]; 5], kept: &[T], sizes: Sizes) -> Option<[Vec<T>; 3]> {
    sizes.suits::<T>().then(|| {
        let gradients = for_planes!(matmul_precision(), backward_heads(inputs.map(single), single(kept), sizes));
        gradients.map(from_single)
    })
}

fn backward_heads<const PLANES: usize>(inputs: [&[f32]; 5], kept: &[f32], sizes: Sizes) -> [Vec<f32>; 3] {
    let [q, k, ..] = inputs;
    let mut gradients = [unwritten(q.len()), unwritten(k.len()), unwritten(k.len())];
    let places = gradients.each_mut().map(|gradient| Disjoint::new(gradient));
    parallel::map(sizes.b * sizes.heads, 1, |heads| {
        for at in heads {
            // SAFETY: the unit is there; this head's gradients are this thread's.
            unsafe { backward_head::<PLANES>(inputs, &kept[at * sizes.l..][..sizes.l], sizes, at, &places) };
        }
    });
    gradients
}

/// With P the probabilities: dv = Pᵀ·dy, dP = dy·vᵀ, dS = P∘(dP − rowsum(dy∘o))/√d, dq = dS·k, dk = dSᵀ·q.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn backward_head<const PLANES: usize>(
    [q, k, v, o, dy]: [&[f32]; 5],
    kept: &[f32],
    sizes: Sizes,
    at: usize,
    [dq_at, dk_at, dv_at]: &[Disjoint<f32>; 3],
) {
    let (l, s, d) = (sizes.l, sizes.s, sizes.d);
    let (sum, columns) = (Sum::of(d), sizes.columns());
    let width = columns * SIDE;
    let rows = l.div_ceil(SIDE);
    let along_queries = Sum { k: l, pairs: SIDE, blocks: l.div_ceil(32) };
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
        let along_keys = Sum { k: keys.len(), pairs: SIDE, blocks: keys.len().div_ceil(32) };
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
        for (i, key) in keys.enumerate() {
            for (sums, to) in [(&dk, dk_at), (&dv, dv_at)] {
                // SAFETY: this head's rows are the caller's to write.
                let to = unsafe { std::slice::from_raw_parts_mut(to.at(sizes.start((s, at), key)), d) };
                to.copy_from_slice(&sums[i * width..][..d]);
            }
        }
    }
    for (query, sums) in dq.chunks_exact(width).enumerate().take(l) {
        // SAFETY: as above.
        let to = unsafe { std::slice::from_raw_parts_mut(dq_at.at(sizes.start((l, at), query)), d) };
        to.copy_from_slice(&sums[..d]);
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
        unsafe { store_split::<PLANES>(slopes[0], slopes[1], tiles, row) };
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
            unsafe { store_split::<PLANES>(low[row], high[row], tiles, row) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// Output and gradients in f64, one query and one head at a time.
    fn by_definition(inputs: [&[f32]; 4], sizes: Sizes) -> [Vec<f64>; 4] {
        let [q, k, v, dy] = inputs.map(|values| values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
        let mut result = [&q, &q, &k, &v].map(|like| vec![0f64; like.len()]); // o, dq, dk, dv
        let (width, scale) = (sizes.heads * sizes.d, 1.0 / (sizes.d as f64).sqrt());
        for (set, head, query) in (0..sizes.b * sizes.heads * sizes.l)
            .map(|i| (i / (sizes.heads * sizes.l), i / sizes.l % sizes.heads, i % sizes.l))
        {
            let row = (set * sizes.l + query) * width + head * sizes.d;
            let key_row = |key: usize| (set * sizes.s + key) * width + head * sizes.d;
            let dot =
                |a: &[f64], at: usize, b: &[f64], bt: usize| (0..sizes.d).map(|i| a[at + i] * b[bt + i]).sum::<f64>();
            let scores: Vec<f64> = (0..sizes.s).map(|key| dot(&q, row, &k, key_row(key)) * scale).collect();
            let max = scores.iter().fold(f64::MIN, |max, v| max.max(*v));
            let total: f64 = scores.iter().map(|v| (v - max).exp()).sum();
            let p: Vec<f64> = scores.iter().map(|v| (v - max).exp() / total).collect();
            for (key, p) in p.iter().enumerate() {
                for i in 0..sizes.d {
                    result[0][row + i] += p * v[key_row(key) + i];
                }
            }
            let slope = dot(&result[0], row, &dy, row);
            for (key, p) in p.iter().enumerate() {
                let ds = p * (dot(&dy, row, &v, key_row(key)) - slope) * scale;
                for i in 0..sizes.d {
                    result[1][row + i] += ds * k[key_row(key) + i];
                    result[2][key_row(key) + i] += ds * q[row + i];
                    result[3][key_row(key) + i] += p * dy[row + i];
                }
            }
        }
        result
    }

    #[test]
    fn attention_and_its_gradients_follow_the_definition() {
        if !available() {
            return; // Every other test runs the portable attention.
        }
        for (b, l, s, heads, d) in
            [(1, 64, 64, 2, 32), (2, 50, 77, 2, 40), (1, 17, 1100, 1, 8), (3, 96, 96, 1, 160), (1, 33, 20, 4, 13)]
        {
            let sizes = Sizes { b, l, s, heads, d };
            let mut rng = Rng::new(9, "attention on tiles", (l * s * d) as u64);
            let mut draw =
                |rows: usize| (0..b * rows * heads * d).map(|_| 2.0 * rng.normal() as f32).collect::<Vec<_>>();
            let (q, k, v, dy) = (draw(l), draw(s), draw(s), draw(l));
            let expected = by_definition([&q, &k, &v, &dy], sizes);
            let (o, kept) = forward(&q, &k, &v, sizes).unwrap();
            let [dq, dk, dv] = backward([&q, &k, &v, &o, &dy], &kept, sizes).unwrap();
            for (name, (found, expected)) in ["o", "dq", "dk", "dv"].iter().zip([o, dq, dk, dv].iter().zip(&expected)) {
                let largest = expected.iter().fold(0f64, |max, v| max.max(v.abs()));
                let error = found.iter().zip(expected).fold(0f64, |max, (a, b)| max.max((f64::from(*a) - b).abs()));
                assert!(error < 3e-6 * largest, "{name} of {b}x{l}x{s}, {heads} heads of {d}: {:e}", error / largest);
            }
        }
    }
}

//! Attention on the tile unit, in blocks of queries and keys that stay in the second-level cache (FlashAttention 2, Dao
//! 2023): scores never leave it, and probabilities go into the next product's tiles as they are computed.

mod backward;
mod forward;

use std::arch::x86_64::*;
use std::ops::Range;

use self::backward::backward_heads;
use self::forward::forward_heads;
use super::memory::{from_single, single, unwritten_lines};
use super::pack::{Factor, Side, Sum, paired, rounded};
use super::unit::{Registers, Step, Tiles, available};
use super::{SIDE, Tile, for_planes};
use crate::ops::precision::{Precision, matmul_precision};
use crate::ops::real::Real;

/// Keys in a block.
const KEYS: usize = 512;
/// Rows of tiles in a block of queries: one pair along the sum of the weights' and keys' gradients.
const ROWS: usize = 2;
/// Values from one row of scores to the next: a line more than the keys, or the rows would share a few sets of the cache.
const PITCH: usize = KEYS + 16;

/// The output and the logarithm of each query's denominator, `[b, heads, l]`; None where this does not suit.
pub fn forward<T: Real>(q: &[T], k: &[T], v: &[T], sizes: Sizes) -> Option<(Vec<T>, Vec<T>)> {
    sizes.suits::<T>().then(|| {
        let (q, k, v) = (single(q), single(k), single(v));
        let (out, denominators) = for_planes!(matmul_precision(), forward_heads(q, k, v, sizes));
        (from_single(out), from_single(denominators))
    })
}

/// dq, dk, dv from q, k, v, o, dy and what [`forward`] kept; None where this does not suit.
pub fn backward<T: Real>(inputs: [&[T]; 5], kept: &[T], sizes: Sizes) -> Option<[Vec<T>; 3]> {
    sizes.suits::<T>().then(|| {
        let gradients = for_planes!(matmul_precision(), backward_heads(inputs.map(single), single(kept), sizes));
        gradients.map(from_single)
    })
}

/// Sizes of an attention; heads lie side by side in rows of `heads·d`.
#[derive(Clone, Copy, Debug)]
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
        // With fewer keys (a prompt's), packing costs more than the unit gains.
        self.d >= 8 && self.l >= SIDE && self.s >= 128 && T::DTYPE == candle_core::DType::F32 && available()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    type Backward = fn([&[f32]; 5], &[f32], Sizes) -> [Vec<f32>; 3];

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
        for (b, l, s, heads, d) in [
            (1, 64, 64, 2, 32),
            (2, 50, 77, 2, 40),
            (1, 17, 1100, 1, 8),
            (3, 96, 96, 1, 160),
            (1, 33, 20, 4, 13),
            (8, 192, 192, 4, 32),
        ] {
            let sizes = Sizes { b, l, s, heads, d };
            let mut rng = Rng::new(9, "attention on tiles", (l * s * d) as u64);
            let mut draw =
                |rows: usize| (0..b * rows * heads * d).map(|_| 2.0 * rng.normal() as f32).collect::<Vec<_>>();
            let (q, k, v, dy) = (draw(l), draw(s), draw(s), draw(l));
            let expected = by_definition([&q, &k, &v, &dy], sizes);
            let check = |(o, kept): (Vec<f32>, Vec<f32>), backward: Backward, bound: f64| {
                let [dq, dk, dv] = backward([&q, &k, &v, &o, &dy], &kept, sizes);
                for (name, (found, expected)) in
                    ["o", "dq", "dk", "dv"].iter().zip([o, dq, dk, dv].iter().zip(&expected))
                {
                    let largest = expected.iter().fold(0f64, |max, v| max.max(v.abs()));
                    let error = found.iter().zip(expected).fold(0f64, |max, (a, b)| max.max((f64::from(*a) - b).abs()));
                    assert!(error < bound * largest, "{name} of {sizes:?}: {:e}", error / largest);
                }
            };
            check(forward_heads::<3>(&q, &k, &v, sizes), backward_heads::<3>, 3e-6);
            check(forward_heads::<2>(&q, &k, &v, sizes), backward_heads::<2>, 3e-4);
            check(forward_heads::<1>(&q, &k, &v, sizes), backward_heads::<1>, 5e-2);
        }
    }
}

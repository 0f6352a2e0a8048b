//! Attention on the tile unit, in blocks of queries and keys that stay in the second-level cache (FlashAttention 2, Dao
//! 2023): scores never leave it, and probabilities go into the next product's tiles as they are computed.

mod backward;
mod forward;

use std::arch::x86_64::*;
use std::ops::Range;

use candle_core::DType;

use self::backward::backward_heads;
use self::forward::forward_heads;
use super::memory::{from_single, single, unwritten_lines};
use super::pack::{Factor, Side, Sum};
use super::unit::{Registers, Step, Tiles, available};
use super::{SIDE, Tile, for_planes};
use crate::ops::attention::Sizes;
use crate::ops::precision::{Precision, matmul_precision};
use crate::ops::real::{EXP_TAYLOR, LN_2_PIECES, Real};

/// Keys in a block.
const KEYS: usize = 512;
/// Rows of tiles in a block of queries: one pair along the sum of the weights' and keys' gradients.
const ROWS: usize = 2;
/// Values from one row of scores to the next: a line more than the keys, or the rows would share a few sets of the cache.
const PITCH: usize = KEYS + 16;

/// The output and the logarithm of each query's denominator, `[b, heads, l]`; None where this does not suit.
pub fn forward<T: Real>(q: &[T], k: &[T], v: &[T], bias: Option<&[T]>, sizes: Sizes) -> Option<(Vec<T>, Vec<T>)> {
    sizes.suits::<T>().then(|| {
        let (inputs, bias) = ([q, k, v].map(single), bias.map(single));
        let (out, denominators) = for_planes!(matmul_precision(), forward_heads(inputs, bias, sizes));
        (from_single(out), from_single(denominators))
    })
}

/// dq, dk, dv from q, k, v, o, dy and what [`forward`] kept; None where this does not suit.
pub fn backward<T: Real>(inputs: [&[T]; 5], kept: &[T], bias: Option<&[T]>, sizes: Sizes) -> Option<[Vec<T>; 3]> {
    sizes.suits::<T>().then(|| {
        let (inputs, kept, bias) = (inputs.map(single), single(kept), bias.map(single));
        let gradients = for_planes!(matmul_precision(), backward_heads(inputs, (kept, bias), sizes));
        gradients.map(from_single)
    })
}

impl Sizes {
    fn suits<T: Real>(self) -> bool {
        // With fewer keys (a prompt's), packing costs more than the unit gains.
        let is_large = self.d >= 8 && self.l >= SIDE && self.s >= 128;
        is_large && !self.is_causal && T::DTYPE == DType::F32 && available()
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
        let start = &raw const values[self.start((rows, at), range.start)];
        match along {
            Along::Width => Factor { start, across: self.width(), along: 1, count: range.len(), side },
            Along::Rows => Factor { start, across: 1, along: self.width(), count: self.d, side },
        }
    }
    /// Where a row of a head of a set (`at`, counted over both) begins in `[b, rows, heads·d]`.
    fn start(self, (rows, at): (usize, usize), row: usize) -> usize {
        ((at / self.heads) * rows + row) * self.width() + at % self.heads * self.d
    }
    /// What is added to the scores of a query of `at` and these keys.
    fn bias_of<'a>(self, bias: &'a [f32], (at, query): (usize, usize), keys: &Range<usize>) -> &'a [f32] {
        &bias[self.bias_row(bias.len(), (at / self.heads, query)) * self.s..][keys.clone()]
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

/// exp of values that are at most about 88, 0 for −∞: 2ⁿ·exp(r), |r| ≤ ln2/2, by the Taylor polynomial.
#[target_feature(enable = "avx512f")]
#[inline]
fn exp(x: __m512) -> __m512 {
    let n = _mm512_roundscale_ps::<0>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
    // −∞ would give NaN here; the lower bound keeps it out, far below what is not rounded to 0.
    let n = _mm512_max_ps(n, _mm512_set1_ps(-200.0));
    let x = _mm512_max_ps(x, _mm512_set1_ps(-140.0));
    let [first, rest] = LN_2_PIECES.map(|piece| _mm512_set1_ps(piece));
    let r = _mm512_fnmadd_ps(n, rest, _mm512_fnmadd_ps(n, first, x));
    let mut p = _mm512_setzero_ps();
    for c in EXP_TAYLOR {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    type Backward = fn([&[f32]; 5], (&[f32], Option<&[f32]>), Sizes) -> [Vec<f32>; 3];

    /// Output and gradients in f64, one query and one head at a time.
    fn by_definition(inputs: [&[f32]; 4], bias: Option<&[f32]>, sizes: Sizes) -> [Vec<f64>; 4] {
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
            let mut scores: Vec<f64> = (0..sizes.s).map(|key| dot(&q, row, &k, key_row(key)) * scale).collect();
            if let Some(bias) = bias {
                let own = &bias[sizes.bias_row(bias.len(), (set, query)) * sizes.s..];
                scores.iter_mut().zip(own).for_each(|(score, bias)| *score += f64::from(*bias));
            }
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
        // Groups of a bias, 0: none. The first 600 keys are hidden from the first of two groups.
        for (b, l, s, heads, d, groups) in [
            (1, 64, 64, 2, 32, 0),
            (2, 50, 77, 2, 40, 0),
            (2, 50, 77, 2, 40, 5),
            (1, 17, 1100, 1, 8, 0),
            (2, 34, 1100, 2, 8, 2),
            (3, 96, 96, 1, 160, 0),
            (1, 33, 20, 4, 13, 1),
            (8, 192, 192, 4, 32, 0),
        ] {
            let sizes = Sizes { b, l, s, heads, d, is_causal: false };
            let mut rng = Rng::new(9, "attention on tiles", (l * s * d) as u64);
            let mut draw =
                |rows: usize| (0..b * rows * heads * d).map(|_| 2.0 * rng.normal() as f32).collect::<Vec<_>>();
            let (q, k, v, dy) = (draw(l), draw(s), draw(s), draw(l));
            let bias: Option<Vec<f32>> = (groups > 0).then(|| {
                let hidden = |i: usize| (i / s).is_multiple_of(groups) && i % s < 600 && s > 600;
                let value = |i| if hidden(i) { f32::NEG_INFINITY } else { rng.normal() as f32 };
                (0..b * groups * s).map(value).collect()
            });
            let bias = bias.as_deref();
            let expected = by_definition([&q, &k, &v, &dy], bias, sizes);
            let check = |(o, kept): (Vec<f32>, Vec<f32>), backward: Backward, bound: f64| {
                let [dq, dk, dv] = backward([&q, &k, &v, &o, &dy], (&kept, bias), sizes);
                for (name, (found, expected)) in
                    ["o", "dq", "dk", "dv"].iter().zip([o, dq, dk, dv].iter().zip(&expected))
                {
                    let largest = expected.iter().fold(0f64, |max, v| max.max(v.abs()));
                    let error = found.iter().zip(expected).fold(0f64, |max, (a, b)| max.max((f64::from(*a) - b).abs()));
                    assert!(error < bound * largest, "{name} of {sizes:?}: {:e}", error / largest);
                }
            };
            check(forward_heads::<3>([&q, &k, &v], bias, sizes), backward_heads::<3>, 3e-6);
            check(forward_heads::<2>([&q, &k, &v], bias, sizes), backward_heads::<2>, 3e-4);
            check(forward_heads::<1>([&q, &k, &v], bias, sizes), backward_heads::<1>, 5e-2);
        }
    }
}

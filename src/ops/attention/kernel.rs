//! Attention on the CPU: on the tile unit where that suits, else by queries that stand side by side in vector registers.
//!
//! A tile is up to 48 queries, a column each. Scores of a block of keys are `[keys, queries]`: keys and values are read where
//! they lie, an element at a time, and the softmax of a query goes down its lane, so that no row is ever summed across a register.
//! Every head width and any number of keys fill the registers alike.

use std::ops::Range;

use super::Sizes;
use super::backward::backward_heads;
use super::forward::forward_heads;
use crate::ops::buffer::Aligned;
use crate::ops::lanes::LANES;
use crate::ops::parallel;
use crate::ops::product::{Matrix, Start, lane_product};
use crate::ops::real::Real;
use crate::ops::tiles;
use crate::ops::transpose::transpose;

/// Keys in a block, whose scores for a tile stay in the first-level cache.
pub const KEYS: usize = 128;
/// Registers that the queries of a tile fill at most.
const WIDEST: usize = 3;

/// The output and the logarithm of each query's denominator, `[b, heads, l]`.
pub fn forward<T: Real>(q: &[T], k: &[T], v: &[T], bias: Option<&[T]>, sizes: Sizes) -> (Vec<T>, Vec<T>) {
    tiles::attention::forward(q, k, v, bias, sizes).unwrap_or_else(|| forward_heads([q, k, v], bias, sizes))
}

/// dq, dk, dv from q, k, v, the output, its gradient and the denominators' logarithms.
pub fn backward<T: Real>(inputs: [&[T]; 5], denominators: &[T], bias: Option<&[T]>, sizes: Sizes) -> [Vec<T>; 3] {
    tiles::attention::backward(inputs, denominators, bias, sizes)
        .unwrap_or_else(|| backward_heads(inputs, denominators, bias, sizes))
}

/// Queries that stand side by side.
#[derive(Clone, Copy)]
pub struct Tile {
    pub first: usize,
    pub count: usize,
    /// Lanes: the queries and what is empty behind them.
    pub lanes: usize,
}

impl Sizes {
    /// All queries, in tiles of nearly one width, of which the last is the widest.
    pub fn tiles(self) -> Vec<Tile> {
        let registers = self.l.div_ceil(LANES);
        let tiles = registers.div_ceil(WIDEST);
        let tile = |index| {
            let range = parallel::range(registers, tiles, index);
            let first = range.start * LANES;
            Tile { first, count: self.l.min(range.end * LANES) - first, lanes: range.len() * LANES }
        };
        (0..tiles).map(tile).collect()
    }

    /// Where a row of a head starts in `[b, rows, heads·d]`.
    pub fn row(self, rows: usize, (set, head): (usize, usize), row: usize) -> usize {
        (set * rows + row) * self.width() + head * self.d
    }

    /// A head of keys or values from row `row` on, as a left factor.
    pub fn keys<T>(self, values: &[T], at: (usize, usize), row: usize) -> Matrix<*const T> {
        Matrix { start: &raw const values[self.row(self.s, at, row)], row_stride: self.width(), column_stride: 1 }
    }

    /// The head's queries of a tile, a column each: `[d, lanes]`, times `scale`.
    pub fn turned<T: Real>(self, values: &[T], at: (usize, usize), tile: Tile, scale: T) -> Aligned<T> {
        let mut columns = Aligned::zeros(self.d * tile.lanes);
        let from = (&raw const values[self.row(self.l, at, tile.first)], self.width());
        // SAFETY: values holds the rows of these queries, and columns one for each.
        unsafe { transpose((tile.count, self.d), from, (columns.as_mut_ptr(), tile.lanes), scale) };
        columns
    }

    /// The way back, to the rows of the tile's queries that begin at `to`.
    ///
    /// # Safety
    /// The rows lie inside their allocation and belong to this thread.
    pub unsafe fn turn_back<T: Real>(self, columns: &[T], tile: Tile, to: *mut T, scale: T) {
        assert!(columns.len() == self.d * tile.lanes);
        let from = (columns.as_ptr(), tile.lanes);
        // SAFETY: the caller's contract, and columns has d rows of this many lanes.
        unsafe { transpose((self.d, tile.count), from, (to, self.width()), scale) };
    }

    /// Scores of a block of keys, a row each: q·kᵀ/√d + bias, −∞ where a key is not seen.
    ///
    /// - turned queries, already scaled, `[d, lanes]` → `[keys, lanes]`
    pub fn scores<T: Real>(
        self,
        (k, bias): (&[T], Option<&[T]>),
        at: (usize, usize),
        (tile, queries): (Tile, &[T]),
        keys: Range<usize>,
        scores: &mut [T],
    ) {
        let sizes = (keys.len(), tile.lanes, self.d);
        debug_assert!(scores.len() == sizes.0 * sizes.1 && queries.len() == sizes.1 * sizes.2);
        // SAFETY: k has these keys of d values; queries and scores are as large as asserted.
        unsafe {
            let target = (Matrix::rows_mut(scores, tile.lanes), Start::Zero);
            lane_product(sizes, self.keys(k, at, keys.start), Matrix::rows(queries, tile.lanes), target)
        }
        if self.is_causal {
            for (key, scores) in keys.clone().zip(scores.chunks_exact_mut(tile.lanes)) {
                scores[..key.saturating_sub(tile.first).min(tile.lanes)].fill(T::of(f64::NEG_INFINITY));
            }
        }
        if let Some(bias) = bias {
            let row_of = |lane: usize| self.bias_row(bias.len(), (at.0, tile.first + lane.min(tile.count - 1)));
            let (first, last) = (row_of(0), row_of(tile.count - 1));
            for (key, scores) in keys.zip(scores.chunks_exact_mut(tile.lanes)) {
                if first == last {
                    let bias = bias[first * self.s + key];
                    scores.iter_mut().for_each(|score| *score += bias);
                } else {
                    let lanes = scores.iter_mut().enumerate();
                    lanes.for_each(|(lane, score)| *score += bias[row_of(lane) * self.s + key]);
                }
            }
        }
    }
}

/// exp(x), but 0 where that is next to nothing beside 1, as for a masked key: scaled and multiplied on, values that small leave
/// the range of normal numbers, and products of the others take a hundred times as long.
#[inline(always)]
pub fn exp_or_zero<T: Real, const FUSED: bool>(x: T) -> T {
    if x < T::of(-60.0) { T::ZERO } else { x.exp_by::<FUSED>() }
}

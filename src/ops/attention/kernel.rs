//! Attention on the CPU: on the tile unit where that suits, else a product, a softmax and a product for each tile of
//! queries.

use super::Sizes;
use crate::ops::buffer::unwritten;
use crate::ops::parallel;
use crate::ops::real::{Matrix, Real, Start, matmul, vectorised};
use crate::ops::tiles;

impl Sizes {
    /// Queries in a tile: scores of about 512 kB in f32.
    fn tile(self) -> usize {
        (131_072 / self.s).clamp(16, 256).min(self.l)
    }
    /// The matrix of `head` of `set` from row `row` on, in `[b, rows, heads·d]`.
    fn head<T>(self, values: &[T], rows: usize, (set, head): (usize, usize), row: usize) -> Matrix<*const T> {
        let start = (set * rows + row) * self.width() + head * self.d;
        Matrix { start: &values[start], row_stride: self.width(), column_stride: 1 }
    }
    fn head_at<T>(
        self,
        values: &parallel::Disjoint<T>,
        rows: usize,
        (set, head): (usize, usize),
        row: usize,
    ) -> Matrix<*mut T> {
        let start = (set * rows + row) * self.width() + head * self.d;
        Matrix { start: values.at(start), row_stride: self.width(), column_stride: 1 }
    }

    /// Scores of the `rows` queries from `first` on: q·kᵀ/√d + bias into `[rows, s]`, masked keys at −∞.
    fn scores<T: Real>(
        self,
        (q, k, bias): (&[T], &[T], Option<&[T]>),
        at: (usize, usize),
        (first, rows): (usize, usize),
        scores: &mut [T],
    ) {
        let (a, b) = (self.head(q, self.l, at, first), self.head(k, self.s, at, 0).transposed());
        let target = (Matrix::rows_mut(scores, self.s), Start::Zero);
        // SAFETY: `head` starts inside q and k with rows, s rows of d values behind it; scores holds rows·s.
        unsafe { matmul((rows, self.s, self.d), self.scale(), a, b, target) }
        for (row, scores) in scores.chunks_exact_mut(self.s).enumerate() {
            if self.is_causal {
                scores[first + row + 1..].fill(T::of(f64::NEG_INFINITY));
            }
            if let Some(bias) = bias {
                let row = self.bias_row(bias.len(), (at.0, first + row));
                scores.iter_mut().zip(&bias[row * self.s..]).for_each(|(score, bias)| *score += *bias);
            }
        }
    }
}

/// The output and the logarithm of each query's denominator, `[b, heads, l]`.
pub fn forward<T: Real>(q: &[T], k: &[T], v: &[T], bias: Option<&[T]>, sizes: Sizes) -> (Vec<T>, Vec<T>) {
    if let Some(result) = tiles::attention::forward(q, k, v, bias, sizes) {
        return result;
    }
    let Sizes { b, l, s, heads, d, .. } = sizes;
    let mut out = unwritten(q.len());
    let mut denominators = unwritten(b * heads * l);
    let (out_at, denominators_at) = (parallel::Disjoint::new(&mut out), parallel::Disjoint::new(&mut denominators));
    let tile = sizes.tile();
    let tiles = l.div_ceil(tile);
    parallel::map(b * heads * tiles, 1, |range| {
        let mut scores = unwritten(tile * s);
        for item in range {
            let (set, head, first) = (item / (tiles * heads), item / tiles % heads, item % tiles * tile);
            let rows = tile.min(l - first);
            let scores = &mut scores[..rows * s];
            sizes.scores((q, k, bias), (set, head), (first, rows), scores);
            // SAFETY: these queries of (set, head) are this item's alone.
            let kept =
                unsafe { std::slice::from_raw_parts_mut(denominators_at.at((set * heads + head) * l + first), rows) };
            softmax_rows(scores, kept);
            let (p, v) = (Matrix::rows(scores, s), sizes.head(v, s, (set, head), 0));
            let target = (sizes.head_at(&out_at, l, (set, head), first), Start::Zero);
            // SAFETY: rows × d of this item's head in out are written by this thread alone.
            unsafe { matmul((rows, d, s), T::ONE, p, v, target) }
        }
    });
    (out, denominators)
}

vectorised! {
    /// Softmax of each row in place, and the logarithm of its denominator.
    fn softmax_rows[T: Real](scores: &mut [T], denominators: &mut [T]) {
        let s = scores.len() / denominators.len();
        for (scores, denominator) in scores.chunks_exact_mut(s).zip(denominators) {
            *denominator = softmax(scores);
        }
    }
}

/// exp(x), but 0 where that is next to nothing beside 1, as for a masked key: scaled and multiplied on, values that small leave
/// the range of normal numbers, and products of the others take a hundred times as long.
#[inline(always)]
fn exp_or_zero<T: Real>(x: T) -> T {
    if x < T::of(-60.0) { T::ZERO } else { x.exp() }
}

/// Softmax in place; returns max + ln Σ exp(score − max).
#[inline(always)]
fn softmax<T: Real>(scores: &mut [T]) -> T {
    let mut lanes = [scores[0]; 16];
    let mut chunks = scores.chunks_exact(16);
    for chunk in &mut chunks {
        for i in 0..16 {
            lanes[i] = lanes[i].greater(chunk[i]);
        }
    }
    let max = lanes.iter().chain(chunks.remainder()).fold(scores[0], |max, v| max.greater(*v));
    let mut lanes = [T::ZERO; 16];
    let mut chunks = scores.chunks_exact_mut(16);
    for chunk in &mut chunks {
        for i in 0..16 {
            let e = exp_or_zero(chunk[i] - max);
            chunk[i] = e;
            lanes[i] += e;
        }
    }
    let mut sum = T::ZERO;
    for v in chunks.into_remainder() {
        *v = exp_or_zero(*v - max);
        sum += *v;
    }
    for lane in lanes {
        sum += lane;
    }
    let scale = T::ONE / sum;
    scores.iter_mut().for_each(|v| *v *= scale);
    max + sum.ln()
}

vectorised! {
    /// From scores and dP of one query: P, and dS = P∘(dP − dot).
    fn score_slopes[T: Real](p: &mut [T], ds: &mut [T], denominator: T, dot: T) {
        for (p, ds) in p.iter_mut().zip(ds) {
            *p = exp_or_zero(*p - denominator);
            *ds = *p * (*ds - dot);
        }
    }
}

/// dq, dk, dv. With P the probabilities: dv = Pᵀ·dy, dP = dy·vᵀ, dS = P∘(dP − rowsum(dy∘o)), dq = dS·k/√d, dk = dSᵀ·q/√d.
pub fn backward<T: Real>(
    [q, k, v, o, dy]: [&[T]; 5],
    denominators: &[T],
    bias: Option<&[T]>,
    sizes: Sizes,
) -> [Vec<T>; 3] {
    if let Some(result) = tiles::attention::backward([q, k, v, o, dy], denominators, bias, sizes) {
        return result;
    }
    let Sizes { b, l, s, heads, d, .. } = sizes;
    let (mut dq, mut dk, mut dv) = (unwritten(q.len()), vec![T::ZERO; k.len()], vec![T::ZERO; v.len()]);
    let [dq_at, dk_at, dv_at] = [&mut dq, &mut dk, &mut dv].map(|g| parallel::Disjoint::new(g));
    let tile = sizes.tile();
    parallel::map(b * heads, 1, |range| {
        let (mut p, mut ds) = (unwritten(tile * s), unwritten(tile * s));
        for item in range {
            let at = (item / heads, item % heads);
            for first in (0..l).step_by(tile) {
                let rows = tile.min(l - first);
                let (p, ds) = (&mut p[..rows * s], &mut ds[..rows * s]);
                sizes.scores((q, k, bias), at, (first, rows), p);
                let (dy_tile, v_head) = (sizes.head(dy, l, at, first), sizes.head(v, s, at, 0));
                let target = (Matrix::rows_mut(ds, s), Start::Zero);
                // SAFETY: heads start inside dy and v with rows, s rows behind them; ds holds rows·s.
                unsafe { matmul((rows, s, d), T::ONE, dy_tile, v_head.transposed(), target) }
                for row in 0..rows {
                    let query = (at.0 * l + first + row) * sizes.width() + at.1 * d;
                    let dot = o[query..][..d].iter().zip(&dy[query..][..d]).map(|(o, dy)| *o * *dy).sum();
                    let denominator = denominators[item * l + first + row];
                    let row = row * s..(row + 1) * s;
                    score_slopes(&mut p[row.clone()], &mut ds[row], denominator, dot);
                }
                let scale = sizes.scale();
                let (p, ds) = (Matrix::rows(p, s), Matrix::rows(ds, s));
                let (q_tile, k_head) = (sizes.head(q, l, at, first), sizes.head(k, s, at, 0));
                // SAFETY: this head's rows of dq, dk, dv are written by this thread alone; sizes as above.
                unsafe {
                    let dq = (sizes.head_at(&dq_at, l, at, first), Start::Zero);
                    matmul((rows, d, s), scale, ds, k_head, dq);
                    let dk = (sizes.head_at(&dk_at, s, at, 0), Start::Held);
                    matmul((s, d, rows), scale, ds.transposed(), q_tile, dk);
                    let dv = (sizes.head_at(&dv_at, s, at, 0), Start::Held);
                    matmul((s, d, rows), T::ONE, p.transposed(), dy_tile, dv);
                }
            }
        }
    });
    [dq, dk, dv]
}

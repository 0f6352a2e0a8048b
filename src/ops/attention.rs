//! Multi-head attention: softmax(q·kᵀ/√d)·v, in tiles of queries.
//!
//! The forward pass keeps one number a query (the logarithm of the softmax's denominator); the backward pass recomputes
//! each tile's probabilities from it, so that no [l, s] matrix is ever kept (FlashAttention's bookkeeping, Dao et al.
//! 2022, with whole rows of keys in a tile).

use candle_core::{D, DType, Device, Result, Tensor, bail};

use super::buffer::unwritten;
use super::graft::{for_float, graft, graft_tensor, on_cpu, tensor, with_values};
use super::parallel;
use super::real::{Matrix, Output, Real, matmul, vectorised};
use super::tiles::{self, attention::Sizes};

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All of them.
    None,
    /// Query i sees keys 0..=i (CLIP's text encoder).
    Causal,
}

/// Attention of every head; the heads lie side by side in the last dimension.
///
/// # Shapes
/// - q `[b, l, heads·d]`, k and v `[b, s, heads·d]` → `[b, l, heads·d]`
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    let (b, l, width) = q.dims3()?;
    let s = k.dim(1)?;
    if [b, l, s, width, heads].contains(&0) {
        bail!("attention: q {:?}, k {:?} with {heads} heads leave nothing to attend to", q.dims(), k.dims());
    }
    if width % heads != 0 || k.dims() != [b, s, width] || v.dims() != k.dims() || (mask == Mask::Causal && l != s) {
        bail!("attention: q {:?}, k {:?}, v {:?} with {heads} heads do not fit", q.dims(), k.dims(), v.dims());
    }
    let shape = Attention { b, l, s, heads, d: width / heads, mask };
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    if !on_cpu(&q) {
        return on_device(&q, &k, &v, shape);
    }
    for_float!(q, T => {
        let (values, denominators) = with_values::<T, _>(&q, |q| with_values::<T, _>(&k, |k| {
            with_values::<T, _>(&v, |v| forward(q, k, v, shape))
        }))???;
        graft("attention", &[&q, &k, &v], (values, (b, l, width)), move |inputs, result, gradient| {
            let gradients = with_values::<T, _>(inputs[0], |q| with_values::<T, _>(inputs[1], |k| {
                with_values::<T, _>(inputs[2], |v| with_values::<T, _>(result, |o| {
                    with_values::<T, _>(gradient, |dy| backward([q, k, v, o, dy], &denominators, shape))
                }))
            }))?????;
            Ok(gradients.into_iter().zip(inputs).map(|(g, input)| Some(tensor(g, input.shape()))).collect())
        })
    })
}

#[derive(Clone, Copy)]
struct Attention {
    b: usize,
    l: usize,
    s: usize,
    heads: usize,
    d: usize,
    mask: Mask,
}

impl Attention {
    /// What the tile unit needs to know; it has no masks.
    fn on_tiles(self) -> Option<Sizes> {
        let Self { b, l, s, heads, d, mask } = self;
        (mask == Mask::None).then_some(Sizes { b, l, s, heads, d })
    }
    fn width(self) -> usize {
        self.heads * self.d
    }
    /// Queries in a tile: scores of about 512 kB in f32.
    fn tile(self) -> usize {
        (131_072 / self.s).clamp(16, 256).min(self.l)
    }
    fn scale<T: Real>(self) -> T {
        T::of(1.0 / (self.d as f64).sqrt())
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

    /// Scores of the `rows` queries from `first` on: q·kᵀ/√d into `[rows, s]`, masked keys at −∞.
    fn scores<T: Real>(self, q: &[T], k: &[T], at: (usize, usize), (first, rows): (usize, usize), scores: &mut [T]) {
        let (a, b) = (self.head(q, self.l, at, first), self.head(k, self.s, at, 0).transposed());
        let target = (Matrix::rows_mut(scores, self.s), Output::Replace);
        // SAFETY: `head` starts inside q and k with rows, s rows of d values behind it; scores holds rows·s.
        unsafe { matmul((rows, self.s, self.d), self.scale(), a, b, target) }
        if self.mask == Mask::Causal {
            for (row, scores) in scores.chunks_exact_mut(self.s).enumerate() {
                scores[first + row + 1..].fill(T::of(f64::NEG_INFINITY));
            }
        }
    }
}

/// The output and the logarithm of each query's denominator, `[b, heads, l]`.
fn forward<T: Real>(q: &[T], k: &[T], v: &[T], shape: Attention) -> (Vec<T>, Vec<T>) {
    if let Some(result) = shape.on_tiles().and_then(|sizes| tiles::attention::forward(q, k, v, sizes)) {
        return result;
    }
    let Attention { b, l, s, heads, d, .. } = shape;
    let mut out = unwritten(q.len());
    let mut denominators = unwritten(b * heads * l);
    let (out_at, denominators_at) = (parallel::Disjoint::new(&mut out), parallel::Disjoint::new(&mut denominators));
    let tile = shape.tile();
    let tiles = l.div_ceil(tile);
    parallel::map(b * heads * tiles, 1, |range| {
        let mut scores = unwritten(tile * s);
        for item in range {
            let (set, head, first) = (item / (tiles * heads), item / tiles % heads, item % tiles * tile);
            let rows = tile.min(l - first);
            let scores = &mut scores[..rows * s];
            shape.scores(q, k, (set, head), (first, rows), scores);
            // SAFETY: these queries of (set, head) are this item's alone.
            let kept =
                unsafe { std::slice::from_raw_parts_mut(denominators_at.at((set * heads + head) * l + first), rows) };
            softmax_rows(scores, kept);
            let (p, v) = (Matrix::rows(scores, s), shape.head(v, s, (set, head), 0));
            let target = (shape.head_at(&out_at, l, (set, head), first), Output::Replace);
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
            let e = (chunk[i] - max).exp();
            chunk[i] = e;
            lanes[i] += e;
        }
    }
    let mut sum = T::ZERO;
    for v in chunks.into_remainder() {
        *v = (*v - max).exp();
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
            *p = (*p - denominator).exp();
            *ds = *p * (*ds - dot);
        }
    }
}

/// dq, dk, dv. With P the probabilities: dv = Pᵀ·dy, dP = dy·vᵀ, dS = P∘(dP − rowsum(dy∘o)), dq = dS·k/√d, dk = dSᵀ·q/√d.
fn backward<T: Real>([q, k, v, o, dy]: [&[T]; 5], denominators: &[T], shape: Attention) -> [Vec<T>; 3] {
    let inputs = [q, k, v, o, dy];
    if let Some(result) = shape.on_tiles().and_then(|sizes| tiles::attention::backward(inputs, denominators, sizes)) {
        return result;
    }
    let Attention { b, l, s, heads, d, .. } = shape;
    let (mut dq, mut dk, mut dv) = (unwritten(q.len()), vec![T::ZERO; k.len()], vec![T::ZERO; v.len()]);
    let [dq_at, dk_at, dv_at] = [&mut dq, &mut dk, &mut dv].map(|g| parallel::Disjoint::new(g));
    let tile = shape.tile();
    parallel::map(b * heads, 1, |range| {
        let (mut p, mut ds) = (unwritten(tile * s), unwritten(tile * s));
        for item in range {
            let at = (item / heads, item % heads);
            for first in (0..l).step_by(tile) {
                let rows = tile.min(l - first);
                let (p, ds) = (&mut p[..rows * s], &mut ds[..rows * s]);
                shape.scores(q, k, at, (first, rows), p);
                let (dy_tile, v_head) = (shape.head(dy, l, at, first), shape.head(v, s, at, 0));
                let target = (Matrix::rows_mut(ds, s), Output::Replace);
                // SAFETY: heads start inside dy and v with rows, s rows behind them; ds holds rows·s.
                unsafe { matmul((rows, s, d), T::ONE, dy_tile, v_head.transposed(), target) }
                for row in 0..rows {
                    let query = (at.0 * l + first + row) * shape.width() + at.1 * d;
                    let dot = o[query..][..d].iter().zip(&dy[query..][..d]).map(|(o, dy)| *o * *dy).sum();
                    let denominator = denominators[item * l + first + row];
                    let row = row * s..(row + 1) * s;
                    score_slopes(&mut p[row.clone()], &mut ds[row], denominator, dot);
                }
                let scale = shape.scale();
                let (p, ds) = (Matrix::rows(p, s), Matrix::rows(ds, s));
                let (q_tile, k_head) = (shape.head(q, l, at, first), shape.head(k, s, at, 0));
                // SAFETY: this head's rows of dq, dk, dv are written by this thread alone; sizes as above.
                unsafe {
                    let dq = (shape.head_at(&dq_at, l, at, first), Output::Replace);
                    matmul((rows, d, s), scale, ds, k_head, dq);
                    let dk = (shape.head_at(&dk_at, s, at, 0), Output::Add);
                    matmul((s, d, rows), scale, ds.transposed(), q_tile, dk);
                    let dv = (shape.head_at(&dv_at, s, at, 0), Output::Add);
                    matmul((s, d, rows), T::ONE, p.transposed(), dy_tile, dv);
                }
            }
        }
    });
    [dq, dk, dv]
}

/// The same bookkeeping in tensor operations, for devices without a kernel of ours.
fn on_device(q: &Tensor, k: &Tensor, v: &Tensor, shape: Attention) -> Result<Tensor> {
    let split = move |x: &Tensor, rows: usize| {
        x.detach().reshape((shape.b, rows, shape.heads, shape.d))?.transpose(1, 2)?.contiguous() // [b, heads, rows, d]
    };
    let heads = move |x: &[&Tensor]| -> Result<[Tensor; 3]> {
        Ok([split(x[0], shape.l)?, split(x[1], shape.s)?, split(x[2], shape.s)?])
    };
    let [q_heads, k_heads, v_heads] = heads(&[q, k, v])?;
    let mut tiles = Vec::new();
    for (first, rows) in device_tiles(shape) {
        let p = device_probabilities(&q_heads.narrow(2, first, rows)?, &k_heads, first, shape)?;
        tiles.push(p.matmul(&v_heads)?); // [b, heads, rows, d]
    }
    let out = merged(&Tensor::cat(&tiles, 2)?, shape.l, shape)?;
    graft_tensor("attention", &[q, k, v], &out, move |inputs, result, gradient| {
        let [q, k, v] = heads(inputs)?;
        let (o, dy) = (split(result, shape.l)?, split(gradient, shape.l)?);
        let scale = shape.scale::<f64>();
        let (mut dq, mut dk, mut dv) = (Vec::new(), k.zeros_like()?, v.zeros_like()?);
        for (first, rows) in device_tiles(shape) {
            let [q, o, dy] = [q.narrow(2, first, rows)?, o.narrow(2, first, rows)?, dy.narrow(2, first, rows)?];
            let p = device_probabilities(&q, &k, first, shape)?;
            let dot = (o * &dy)?.sum_keepdim(D::Minus1)?;
            let ds = (&p * dy.matmul(&v.t()?)?.broadcast_sub(&dot)?)?;
            dq.push((ds.matmul(&k)? * scale)?);
            dk = (dk + (ds.t()?.matmul(&q.contiguous()?)? * scale)?)?;
            dv = (dv + p.t()?.matmul(&dy.contiguous()?)?)?;
        }
        let dq = merged(&Tensor::cat(&dq, 2)?, shape.l, shape)?;
        Ok(vec![Some(dq), Some(merged(&dk, shape.s, shape)?), Some(merged(&dv, shape.s, shape)?)])
    })
}

/// (first query, number) of tiles whose scores over the whole batch stay near 256 MB in f32.
fn device_tiles(shape: Attention) -> impl Iterator<Item = (usize, usize)> {
    let tile = ((64 << 20) / (shape.b * shape.heads * shape.s)).clamp(16, 4096).min(shape.l);
    (0..shape.l).step_by(tile).map(move |first| (first, tile.min(shape.l - first)))
}

fn device_probabilities(q: &Tensor, k: &Tensor, first: usize, shape: Attention) -> Result<Tensor> {
    let scores = (q.contiguous()?.matmul(&k.t()?)? * shape.scale::<f64>())?.to_dtype(DType::F32)?;
    let scores = match shape.mask {
        Mask::None => scores,
        Mask::Causal => {
            let rows = q.dim(2)?;
            let hidden = (0..rows * shape.s)
                .map(|i| if i % shape.s > first + i / shape.s { f32::NEG_INFINITY } else { 0.0 })
                .collect();
            let hidden = Tensor::from_vec::<_, f32>(hidden, (rows, shape.s), &Device::Cpu)?;
            scores.broadcast_add(&hidden.to_device(q.device())?)?
        }
    };
    candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(q.dtype())
}

/// `[b, heads, rows, d]` → `[b, rows, heads·d]`.
fn merged(x: &Tensor, rows: usize, shape: Attention) -> Result<Tensor> {
    x.transpose(1, 2)?.contiguous()?.reshape((shape.b, rows, shape.width()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_no_heads_no_queries_and_no_keys() {
        // These divided by zero.
        let zeros = |rows: usize| Tensor::zeros((1, rows, 4), DType::F32, &Device::Cpu).unwrap();
        for (queries, keys, heads) in [(3, 3, 0), (0, 3, 2), (3, 0, 2)] {
            let (q, kv) = (zeros(queries), zeros(keys));
            let error = attention(&q, &kv, &kv, heads, Mask::None).unwrap_err().to_string();
            assert!(error.contains("nothing to attend to"), "{error}");
        }
    }
}

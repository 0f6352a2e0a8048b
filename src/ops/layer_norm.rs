//! Layer norm: every row of the last dimension by itself.

use candle_core::{D, DType, Result, Tensor, bail};

use super::buffer::unwritten;
use super::cuda;
use super::graft::{for_float, graft, on_cpu, tensor, with_values};
use super::lanes::LANES;
use super::linear::{ROWS_OF_A_SUM, sums_of};
use super::parallel;
use super::real::{Real, vectorised};

/// Normalises each row of the last dimension, then scales and shifts it.
///
/// # Shapes
/// - x `[.., c]`, weight and bias `[c]` → x's
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let c = weight.dims1()?;
    if x.dims().last() != Some(&c) {
        bail!("layer_norm: {c} weights do not fit {:?}", x.dims());
    }
    if !on_cpu(x) {
        if let Some(y) = cuda::layer_norm([x, weight, bias], eps)? {
            return Ok(y);
        }
        return on_device(x, weight, bias, eps);
    }
    let x = x.contiguous()?;
    for_float!(x, T => {
        let (values, statistics) = with_values::<T, _>(&x, |x| {
            with_values::<T, _>(weight, |w| with_values::<T, _>(bias, |b| forward(x, w, b, eps)))
        })???;
        graft("layer_norm", &[&x, weight, bias], (values, x.shape().clone()), move |inputs, _, gradient| {
            let (dx, dw, db) = with_values::<T, _>(inputs[0], |x| {
                with_values::<T, _>(inputs[1], |w| {
                    with_values::<T, _>(gradient, |dy| backward(x, w, dy, &statistics))
                })
            })???;
            let gradients = [dx, dw, db].into_iter().zip(inputs);
            Ok(gradients.map(|(gradient, input)| Some(tensor(gradient, input.shape()))).collect())
        })
    })
}

/// Rows that a thread takes at least.
fn grain(c: usize) -> usize {
    4096 / c + 1
}

/// The output, and mean and reciprocal deviation of each row for the backward pass.
fn forward<T: Real>(x: &[T], w: &[T], b: &[T], eps: f64) -> (Vec<T>, Vec<T>) {
    let c = w.len();
    let (mut y, mut kept) = (unwritten(x.len()), unwritten(x.len() / c * 2));
    let kept_at = parallel::Disjoint::new(&mut kept);
    parallel::for_rows(&mut y, c, grain(c), |rows, y| {
        // SAFETY: each row's statistics are written by the one thread whose range holds it.
        let kept = unsafe { std::slice::from_raw_parts_mut(kept_at.at(rows.start * 2), rows.len() * 2) };
        forward_rows(y, kept, &x[rows.start * c..rows.end * c], (w, b), T::of(eps));
    });
    (y, kept)
}

/// Sums side by side: two registers of AVX-512, so that an addition need not wait for the last.
const SUMS: usize = 2 * LANES;

/// Σ f(the rows' values at a place) over all places. The rows are cut into arrays first: an index that has to be checked keeps a
/// loop from being vectorised.
#[inline(always)]
fn sum<T: Real, const N: usize>(rows: [&[T]; N], f: impl Fn([T; N]) -> T) -> T {
    let mut sums = [T::ZERO; SUMS];
    let (n, whole) = (rows[0].len(), rows[0].len() / SUMS * SUMS);
    for first in (0..whole).step_by(SUMS) {
        let rows = rows.map(|row| <&[T; SUMS]>::try_from(&row[first..first + SUMS]).expect("as long as said"));
        for lane in 0..SUMS {
            sums[lane] += f(rows.map(|row| row[lane]));
        }
    }
    // By halves, for the same reason.
    for width in [16, 8, 4, 2, 1] {
        for lane in 0..width {
            let other = sums[lane + width];
            sums[lane] += other;
        }
    }
    (whole..n).fold(sums[0], |total, i| total + f(rows.map(|row| row[i])))
}

vectorised! {
    fn forward_rows[T: Real](y: &mut [T], kept: &mut [T], x: &[T], affine: (&[T], &[T]), eps: T) {
        let c = affine.0.len();
        let (w, b) = (&affine.0[..c], &affine.1[..c]);
        let per_value = T::of(1.0 / c as f64);
        for ((x, y), kept) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).zip(kept.chunks_exact_mut(2)) {
            let mean = sum([x], |[x]| x) * per_value;
            let variance = sum([x], |[x]| (x - mean) * (x - mean)) * per_value;
            let rstd = T::ONE / (variance + eps).sqrt();
            for i in 0..c {
                y[i] = (x[i] - mean) * rstd * w[i] + b[i];
            }
            (kept[0], kept[1]) = (mean, rstd);
        }
    }
}

type Triple<T> = (Vec<T>, Vec<T>, Vec<T>);

/// With x̂ = (x−μ)·r and g = dy·w: db = Σdy, dw = Σdy·x̂, dx = r·(g − mean(g) − x̂·mean(g·x̂)).
fn backward<T: Real>(x: &[T], w: &[T], dy: &[T], statistics: &[T]) -> Triple<T> {
    let c = w.len();
    let mut dx = unwritten(x.len());
    let dx_at = parallel::Disjoint::new(&mut dx);
    let partial = parallel::map(x.len() / c, grain(c), |rows| {
        let values = rows.start * c..rows.end * c;
        // SAFETY: these rows of dx belong to this thread alone.
        let dx = unsafe { std::slice::from_raw_parts_mut(dx_at.at(values.start), values.len()) };
        let inputs = (&x[values.clone()], &dy[values], &statistics[rows.start * 2..rows.end * 2]);
        let blocks = dx.chunks_mut(ROWS_OF_A_SUM * c).zip(inputs.0.chunks(ROWS_OF_A_SUM * c));
        let blocks = blocks.zip(inputs.1.chunks(ROWS_OF_A_SUM * c)).zip(inputs.2.chunks(ROWS_OF_A_SUM * 2));
        sums_of(blocks.map(|(((dx, x), dy), kept)| backward_rows(dx, (x, dy, kept), w)))
    });
    let (dw, db) = sums_of(partial.into_iter());
    (dx, dw, db)
}

vectorised! {
    /// Fills dx and returns dw and db, summed over these rows.
    fn backward_rows[T: Real](dx: &mut [T], inputs: (&[T], &[T], &[T]), w: &[T]) -> (Vec<T>, Vec<T>) {
        let (x, dy, kept) = inputs;
        let c = w.len();
        let w = &w[..c];
        let per_value = T::of(1.0 / c as f64);
        let (mut dw, mut db) = (vec![T::ZERO; c], vec![T::ZERO; c]);
        let rows = x.chunks_exact(c).zip(dy.chunks_exact(c)).zip(dx.chunks_exact_mut(c));
        for (((x, dy), dx), kept) in rows.zip(kept.chunks_exact(2)) {
            let (mean, rstd) = (kept[0], kept[1]);
            let mean_g = sum([dy, w], |[dy, w]| dy * w) * per_value;
            let mean_gx = sum([dy, w, x], |[dy, w, x]| dy * w * (x - mean)) * rstd * per_value;
            let (dw, db) = (&mut dw[..c], &mut db[..c]);
            for i in 0..c {
                let normed = (x[i] - mean) * rstd;
                dw[i] += dy[i] * normed;
                db[i] += dy[i];
                dx[i] = rstd * (dy[i] * w[i] - mean_g - normed * mean_gx);
            }
        }
        (dw, db)
    }
}

fn on_device(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(variance + eps)?.sqrt()?)?.to_dtype(x.dtype())?;
    normed.broadcast_mul(weight)?.broadcast_add(bias)
}

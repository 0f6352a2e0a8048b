//! Activations: SiLU, exact GELU, CLIP's quick GELU, and the gated GEGLU of the transformer blocks.

use candle_core::{D, Result, Tensor, bail};

use super::buffer::unwritten;
use super::cuda;
use super::elementwise::{GRAIN, map};
use super::graft::{for_float, graft, on_cpu, tensor, with_values};
use super::parallel;
use super::real::{Real, vectorised};

/// x·σ(x).
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if !on_cpu(x) {
        return x.silu();
    }
    for_float!(x, T => map::<T>("silu", x, silu_of::<T, false>, silu_slope::<T, false>))
}

/// x·Φ(x) with the exact normal distribution (erf), as diffusers' GEGLU and PyTorch's default.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if !on_cpu(x) {
        return x.gelu_erf();
    }
    for_float!(x, T => map::<T>("gelu", x, gelu_of::<T, false>, gelu_slope::<T, false>))
}

/// x·σ(1.702·x): the approximation that CLIP was trained with.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    if !on_cpu(x) {
        return x * candle_nn::ops::sigmoid(&(x * 1.702)?)?;
    }
    for_float!(x, T => map::<T>("quick_gelu", x, quick_gelu_of::<T, false>, quick_gelu_slope::<T, false>))
}

#[inline(always)]
pub fn sigmoid<T: Real, const FUSED: bool>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp_by::<FUSED>())
}

#[inline(always)]
pub fn silu_of<T: Real, const FUSED: bool>(x: T) -> T {
    x * sigmoid::<T, FUSED>(x)
}

#[inline(always)]
pub fn silu_slope<T: Real, const FUSED: bool>(x: T) -> T {
    let s = sigmoid::<T, FUSED>(x);
    s * (T::ONE + x * (T::ONE - s))
}

#[inline(always)]
fn normal_cdf<T: Real, const FUSED: bool>(x: T) -> T {
    T::of(0.5) * (T::ONE + (x * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf_by::<FUSED>())
}

#[inline(always)]
fn gelu_of<T: Real, const FUSED: bool>(x: T) -> T {
    x * normal_cdf::<T, FUSED>(x)
}

/// Φ(x) + x·φ(x).
#[inline(always)]
fn gelu_slope<T: Real, const FUSED: bool>(x: T) -> T {
    const INV_SQRT_2PI: f64 = 0.398_942_280_401_432_7;
    normal_cdf::<T, FUSED>(x) + x * T::of(INV_SQRT_2PI) * (T::of(-0.5) * x * x).exp_by::<FUSED>()
}

#[inline(always)]
fn quick_gelu_of<T: Real, const FUSED: bool>(x: T) -> T {
    x * sigmoid::<T, FUSED>(T::of(1.702) * x)
}

#[inline(always)]
fn quick_gelu_slope<T: Real, const FUSED: bool>(x: T) -> T {
    let s = sigmoid::<T, FUSED>(T::of(1.702) * x);
    s * (T::ONE + T::of(1.702) * x * (T::ONE - s))
}

/// value·gelu(gate), where value is the first and gate the second half of the last dimension (diffusers' `GEGLU`).
///
/// # Shapes
/// - x `[.., 2d]` → `[.., d]`
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let dims = x.dims();
    let width = dims.last().copied().unwrap_or(0);
    if width == 0 || width % 2 != 0 {
        bail!("geglu: the last dimension of {dims:?} does not divide into two halves");
    }
    let d = width / 2;
    if !on_cpu(x) {
        if let Some(y) = cuda::geglu(x, d)? {
            return Ok(y);
        }
        let value = x.narrow(D::Minus1, 0, d)?;
        return value.contiguous()? * x.narrow(D::Minus1, d, d)?.contiguous()?.gelu_erf()?;
    }
    let mut shape = dims.to_vec();
    shape[dims.len() - 1] = d;
    let x = x.contiguous()?;
    for_float!(x, T => {
        let values = with_values::<T, _>(&x, |x| geglu_forward(x, d))?;
        graft("geglu", &[&x], (values, shape), move |inputs, _, gradient| {
            let dx = with_values::<T, _>(inputs[0], |x| with_values::<T, _>(gradient, |dy| geglu_backward(x, dy, d)))??;
            Ok(vec![Some(tensor(dx, inputs[0].shape()))])
        })
    })
}

fn geglu_forward<T: Real>(x: &[T], d: usize) -> Vec<T> {
    let mut y = unwritten(x.len() / 2);
    parallel::for_rows(&mut y, d, GRAIN / d + 1, |rows, y| {
        geglu_rows(y, &x[rows.start * 2 * d..rows.end * 2 * d], d);
    });
    y
}

fn geglu_backward<T: Real>(x: &[T], dy: &[T], d: usize) -> Vec<T> {
    let mut dx = unwritten(x.len());
    parallel::for_rows(&mut dx, 2 * d, GRAIN / d + 1, |rows, dx| {
        geglu_slopes(dx, &x[rows.start * 2 * d..rows.end * 2 * d], &dy[rows.start * d..rows.end * d], d);
    });
    dx
}

vectorised! {
    fn geglu_rows[T: Real](y: &mut [T], x: &[T], d: usize) {
        for (x, y) in x.chunks_exact(2 * d).zip(y.chunks_exact_mut(d)) {
            let (value, gate) = x.split_at(d);
            for i in 0..d {
                y[i] = value[i] * gelu_of::<T, FUSED>(gate[i]);
            }
        }
    }
}

vectorised! {
    fn geglu_slopes[T: Real](dx: &mut [T], x: &[T], dy: &[T], d: usize) {
        for ((dx, x), dy) in dx.chunks_exact_mut(2 * d).zip(x.chunks_exact(2 * d)).zip(dy.chunks_exact(d)) {
            let (value, gate) = x.split_at(d);
            let (d_value, d_gate) = dx.split_at_mut(d);
            for i in 0..d {
                d_value[i] = dy[i] * gelu_of::<T, FUSED>(gate[i]);
                d_gate[i] = dy[i] * value[i] * gelu_slope::<T, FUSED>(gate[i]);
            }
        }
    }
}

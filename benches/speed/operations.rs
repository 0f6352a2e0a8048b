//! Runs of single operations on random inputs.

use std::hint::black_box;

use anyhow::{Result, bail};
use candle_core::{Result as CandleResult, Tensor, Var};
use jedi::ops::{self, Activation, AdamW, Conv2d, Groups, Mask, Moments, Parameter};
use jedi::rng::Rng;

use super::case::{Pass, Work};
use super::place;

/// Does a work once and returns the seconds of its timed part.
pub type Run = Box<dyn FnMut() -> Result<f64>>;

/// Operations made in memory; networks are `networks.rs`'s.
pub fn prepare(work: &Work) -> Result<Run> {
    match *work {
        Work::Conv { images, size, inputs, outputs, kernel, stride, pass } => {
            let conv = Conv2d { stride, pad: [kernel / 2; 4] };
            let fan_in = inputs * kernel * kernel;
            let shapes = [vec![images, size, size, inputs], vec![outputs, inputs, kernel, kernel], vec![outputs]];
            let tensors = [normal(0, &shapes[0], 1)?, normal(1, &shapes[1], fan_in)?, normal(2, &shapes[2], 1)?];
            differentiable(pass, tensors, move |[x, w, b]| ops::conv2d(x, w, Some(b), conv))
        }
        Work::Attention { batch, queries, keys, heads, width, pass } => {
            let (q, k) = ([batch, queries, heads * width], [batch, keys, heads * width]);
            let tensors = [normal(0, &q, 1)?, normal(1, &k, 1)?, normal(2, &k, 1)?];
            differentiable(pass, tensors, move |[q, k, v]| ops::attention(q, k, v, heads, Mask::None))
        }
        Work::GroupNorm { images, size, channels, groups, silu, pass } => {
            let groups = Groups { count: groups, eps: 1e-5 };
            let activation = if silu { Activation::Silu } else { Activation::None };
            let shape = [images, size, size, channels];
            let tensors = [normal(0, &shape, 1)?, normal(1, &[channels], 1)?, normal(2, &[channels], 1)?];
            differentiable(pass, tensors, move |[x, w, b]| ops::group_norm(x, w, b, groups, activation))
        }
        Work::LayerNorm { rows, width, pass } => {
            let tensors = [normal(0, &[rows, width], 1)?, normal(1, &[width], 1)?, normal(2, &[width], 1)?];
            differentiable(pass, tensors, |[x, w, b]| ops::layer_norm(x, w, b, 1e-5))
        }
        Work::Geglu { rows, width, pass } => {
            differentiable(pass, [normal(0, &[rows, 2 * width], 1)?], |[x]| ops::geglu(x))
        }
        Work::Linear { rows, inputs, outputs, pass } => {
            let weight = normal(1, &[outputs, inputs], inputs)?;
            let tensors = [normal(0, &[rows, inputs], 1)?, weight, normal(2, &[outputs], 1)?];
            differentiable(pass, tensors, |[x, w, b]| ops::linear(x, w, Some(b)))
        }
        Work::Upsample { images, size, channels, pass } => {
            differentiable(pass, [normal(0, &[images, size, size, channels], 1)?], |[x]| ops::upsample2x(x))
        }
        Work::Add { length } => {
            let tensors = [normal(0, &[length], 1)?, normal(1, &[length], 1)?];
            differentiable(Pass::Forward, tensors, |[a, b]| ops::add(a, b))
        }
        Work::Concatenate { pixels, left, right } => {
            let tensors = [normal(0, &[pixels, left], 1)?, normal(1, &[pixels, right], 1)?];
            differentiable(Pass::Forward, tensors, |[a, b]| ops::concat(a, b))
        }
        Work::Adamw { tensors, length } => adamw(tensors, length),
        _ => bail!("{work:?}: not a single operation"),
    }
}

/// Standard normal over √fan_in, so that what comes out is of unit size.
fn normal(index: u64, shape: &[usize], fan_in: usize) -> CandleResult<Tensor> {
    place::there(&drawn(index, shape, fan_in)?)
}

/// The same in f32 on the host.
fn drawn(index: u64, shape: &[usize], fan_in: usize) -> CandleResult<Tensor> {
    Rng::new(0, "bench", index).normal_tensor(shape)? / (fan_in as f64).sqrt()
}

/// Times `f`, its gradients, or both. Gradients start from ones.
fn differentiable<const N: usize>(
    pass: Pass,
    inputs: [Tensor; N],
    f: impl Fn([&Tensor; N]) -> CandleResult<Tensor> + 'static,
) -> Result<Run> {
    if pass == Pass::Forward {
        return Ok(Box::new(move || {
            let started = place::now()?;
            let output = f(inputs.each_ref())?;
            let seconds = place::since(started)?;
            black_box(output);
            Ok(seconds)
        }));
    }
    let mut vars = Vec::with_capacity(N);
    for input in &inputs {
        vars.push(Var::from_tensor(input)?);
    }
    let Ok(vars) = <[Var; N]>::try_from(vars) else { bail!("{N} inputs expected") };
    Ok(Box::new(move || {
        let started = place::now()?;
        let output = f(vars.each_ref().map(Var::as_tensor))?;
        let forward = place::since(started)?;
        let gradients = ops::backward(output)?;
        let both = place::since(started)?;
        // A gradient that was not computed would make the figure a lie.
        for var in &vars {
            let Some(gradient) = gradients.get(var) else { bail!("an input got no gradient") };
            black_box(gradient);
        }
        Ok(if pass == Pass::Both { both } else { both - forward })
    }))
}

/// Parameters in f32 with all that an update changes.
pub struct Updates {
    slots: Vec<(Var, Moments)>,
    step: u64,
}

impl Updates {
    /// Moments of zero, averages at the parameters.
    pub fn of(parameters: Vec<Var>) -> Result<Self> {
        let slot = |parameter: Var| -> Result<(Var, Moments)> {
            let zeros = || Var::zeros(parameter.shape(), parameter.dtype(), parameter.device());
            // Of the variable itself it would be no copy.
            let average = Var::from_tensor(&parameter.as_detached_tensor())?;
            let moments = Moments { first: zeros()?, second: zeros()?, ema: Some(average) };
            Ok((parameter, moments))
        };
        Ok(Self { slots: parameters.into_iter().map(slot).collect::<Result<_>>()?, step: 0 })
    }

    /// The global norm for clipping, then the updates. Gradients in the parameters' order.
    pub fn make(&mut self, gradients: &[Tensor]) -> Result<()> {
        self.step += 1;
        let norm = ops::global_norm(gradients)?;
        let adamw = AdamW {
            lr: 1e-4,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.01,
            step: self.step,
            gradient_scale: (1.0 / (norm + 1e-6)).min(1.0),
            ema_decay: 0.999,
        };
        let all = self.slots.iter().zip(gradients);
        let all = all.map(|((values, moments), gradient)| Parameter { values, gradient, moments });
        Ok(adamw.update(&all.collect::<Vec<_>>())?)
    }
}

fn adamw(tensors: usize, length: usize) -> Result<Run> {
    let values = |index: usize| drawn(index as u64, &[length], 1)?.to_device(&place::runtime().device);
    let parameters = (0..tensors).map(|index| Var::from_tensor(&values(index)?)).collect::<CandleResult<_>>()?;
    let gradients = (tensors..2 * tensors).map(values).collect::<CandleResult<Vec<Tensor>>>()?;
    let mut updates = Updates::of(parameters)?;
    Ok(Box::new(move || {
        let started = place::now()?;
        updates.make(&gradients)?;
        Ok(place::since(started)?)
    }))
}

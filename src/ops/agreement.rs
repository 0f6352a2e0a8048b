//! The operations on another device against the CPU's: the first thing to ask of a GPU, before its speed.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::{
    Activation, Conv2d, Groups, Mask, attention, backward_from, conv2d, geglu, global_norm, group_norm, layer_norm,
    linear,
};
use super::{AdamW, Moments, Parameter};
use crate::rng::Rng;

/// How far an operation is from the CPU's, its output and all gradients together.
#[derive(Clone, Debug)]
pub struct Agreement {
    /// The operation and its sizes.
    pub operation: String,
    /// Number format on the device; the CPU computes in f32 from the same values.
    pub dtype: DType,
    /// The largest gap, of the largest magnitude in the tensor that has it.
    pub gap: f32,
    /// What rounding explains.
    pub allowed: f32,
}

impl Agreement {
    /// Whether rounding explains the gap; never for what is not a number.
    pub fn holds(&self) -> bool {
        self.gap <= self.allowed
    }
}

/// What rounding explains. f32 adds in another order, and a GPU's f32 convolution may go by way of a transform; f16 and bf16
/// round inputs, outputs and what lies between at 2⁻¹¹ and 2⁻⁸ of each value.
fn allowed(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 1e-4,
        DType::F16 => 4e-3,
        _ => 2e-2,
    }
}

type Operation = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// A name, the shapes of the inputs, and what to do with them.
type Case = (String, Vec<Vec<usize>>, Operation);

/// The operations of the Stable Diffusion family at its sizes.
fn cases() -> Result<Vec<Case>> {
    let mut cases: Vec<Case> = Vec::new();
    let heads = 4;
    for d in [32, 40, 64, 80, 128, 160] {
        for (kind, l, s) in [("self", 256, 256), ("cross", 250, 77)] {
            let shapes = [l, s, s].map(|rows| vec![2, rows, heads * d]).to_vec();
            let operation = move |x: &[Tensor]| attention(&x[0], &x[1], &x[2], heads, Mask::None);
            cases.push((format!("attention, {kind}, width {d}"), shapes, Box::new(operation)));
        }
    }
    // A set of three images, some of whose pixels are hidden from some images.
    let (images, l, d) = (3, 3 * 100, 40);
    let bias = |i: usize| if i % 7 == 3 { f32::NEG_INFINITY } else { (i as f32).sin() };
    let bias = Tensor::from_vec((0..2 * images * l).map(bias).collect(), (2, images, l), &Device::Cpu)?;
    let biased = move |x: &[Tensor]| attention(&x[0], &x[1], &x[2], heads, Mask::Biased(&bias));
    cases.push(("attention, weights and masks".into(), vec![vec![2, l, heads * d]; 3], Box::new(biased)));
    let causal = move |x: &[Tensor]| attention(&x[0], &x[1], &x[2], heads, Mask::Causal);
    cases.push(("attention, causal".into(), vec![vec![2, 77, heads * 64]; 3], Box::new(causal)));
    for activation in [Activation::None, Activation::Silu] {
        for (side, c) in [(32, 320), (8, 1280)] {
            let groups = Groups { count: 32, eps: 1e-5 };
            let operation = move |x: &[Tensor]| group_norm(&x[0], &x[1], &x[2], groups, activation);
            let shapes = vec![vec![2, side, side, c], vec![c], vec![c]];
            cases.push((format!("group norm, {activation:?}, {side}² × {c}"), shapes, Box::new(operation)));
        }
    }
    let norm = |x: &[Tensor]| layer_norm(&x[0], &x[1], &x[2], 1e-5);
    cases.push(("layer norm".into(), vec![vec![2, 300, 320], vec![320], vec![320]], Box::new(norm)));
    cases.push(("GEGLU".into(), vec![vec![2, 300, 2560]], Box::new(|x| geglu(&x[0]))));
    let product = |x: &[Tensor]| linear(&x[0], &x[1], Some(&x[2]));
    cases.push(("linear".into(), vec![vec![2, 300, 320], vec![640, 320], vec![640]], Box::new(product)));
    // Of the network and of the VAE's encoder, inputs and outputs of few channels, patches; the last large enough to be
    // unfolded in several parts.
    for (x, (out, k), stride, pad) in [
        ([2, 16, 16, 64], (96, 3), 1, [1; 4]),
        ([2, 16, 16, 64], (96, 3), 2, [1; 4]),
        ([2, 15, 17, 64], (96, 3), 2, [0, 1, 0, 1]),
        ([2, 16, 16, 4], (320, 3), 1, [1; 4]),
        ([2, 17, 16, 24], (40, 1), 2, [0; 4]),
        ([2, 58, 57, 3], (96, 14), 14, [0; 4]),
        ([1, 256, 256, 128], (3, 3), 1, [1; 4]),
    ] {
        let operation = move |x: &[Tensor]| conv2d(&x[0], &x[1], Some(&x[2]), Conv2d { stride, pad });
        let shapes = vec![x.to_vec(), vec![out, x[3], k, k], vec![out]];
        let name = format!("convolution {k}×{k}, stride {stride}, {}×{}, {} to {out} channels", x[1], x[2], x[3]);
        cases.push((name, shapes, Box::new(operation)));
    }
    Ok(cases)
}

/// Every operation in `dtype` on `device`, forward and backward, against the CPU's.
pub fn agreement(device: &Device, dtype: DType) -> Result<Vec<Agreement>> {
    let mut found = Vec::new();
    for (operation, shapes, f) in cases()? {
        let draw = |(i, shape): (usize, &Vec<usize>)| {
            // bf16 holds them exactly, so that all start from the same values.
            Rng::new(5, "agreement", i as u64).normal_tensor(shape)?.to_dtype(DType::BF16)?.to_dtype(DType::F32)
        };
        let inputs = shapes.iter().enumerate().map(draw).collect::<Result<Vec<_>>>()?;
        let twin = evaluated(&inputs, &f)?;
        let there = inputs.iter().map(|x| x.to_device(device)?.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
        found.push(Agreement { operation, dtype, gap: gap(&twin, &evaluated(&there, &f)?)?, allowed: allowed(dtype) });
    }
    let operation = "norm of gradients and AdamW with averaged weights, 150 tensors".into();
    let (twin, own) = (updated(&Device::Cpu, DType::F32)?, updated(device, dtype)?);
    // Its state is f32 whatever the gradient is.
    found.push(Agreement { operation, dtype, gap: gap(&twin, &own)?, allowed: allowed(DType::F32) });
    Ok(found)
}

/// The output, and the gradient of Σ cotangent·output for each input.
fn evaluated(inputs: &[Tensor], f: &Operation) -> Result<Vec<Tensor>> {
    let vars = inputs.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let output = f(&vars.iter().map(|var| var.as_tensor().clone()).collect::<Vec<_>>())?;
    let cotangent = Rng::new(5, "agreement, cotangent", 0).normal_tensor(output.dims())?.to_dtype(DType::BF16)?;
    let cotangent = cotangent.to_device(output.device())?.to_dtype(output.dtype())?;
    let mut all = vec![output.detach()];
    let gradients = backward_from(output, cotangent)?;
    for var in &vars {
        let Some(gradient) = gradients.get(var) else { candle_core::bail!("an input gets no gradient") };
        all.push(gradient.clone());
    }
    Ok(all)
}

/// Parameters of unlike sizes and their moments, every other with an average, after an update with gradients in `dtype`;
/// last the gradients' norm, as a share of what it is of normal numbers.
pub fn updated(device: &Device, dtype: DType) -> Result<Vec<Tensor>> {
    // More than one launch takes, the largest in many blocks.
    let shapes = |i: usize| if i == 3 { vec![333, 129] } else { vec![1 + i % 5, 3 + i] };
    let (mut slots, mut gradients) = (Vec::new(), Vec::new());
    for i in 0..150 {
        let draw = |name: &str| Rng::new(5, name, i as u64).normal_tensor(&shapes(i))?.to_device(device);
        let ema = (i % 2 == 1).then(|| Var::from_tensor(&draw("ema")?)).transpose()?;
        let second = Var::from_tensor(&draw("second")?.sqr()?)?;
        slots.push((
            Var::from_tensor(&draw("parameter")?)?,
            Moments { first: Var::from_tensor(&draw("first")?)?, second, ema },
        ));
        gradients.push(draw("gradient")?.to_dtype(DType::BF16)?.to_dtype(dtype)?);
    }
    let count: usize = gradients.iter().map(Tensor::elem_count).sum();
    let norm = Tensor::new(&[(global_norm(&gradients)? / (count as f64).sqrt()) as f32], &Device::Cpu)?;
    let adamw = AdamW {
        lr: 0.01,
        betas: (0.9, 0.999),
        eps: 1e-8,
        weight_decay: 0.1,
        step: 3,
        gradient_scale: 0.5,
        ema_decay: 0.9,
    };
    let all = slots.iter().zip(&gradients);
    let all = all.map(|((values, moments), gradient)| Parameter { values, gradient, moments });
    adamw.update(&all.collect::<Vec<_>>())?;
    let parts =
        slots.iter().flat_map(|(values, own)| [Some(values), Some(&own.first), Some(&own.second), own.ema.as_ref()]);
    Ok(parts.flatten().map(|var| var.as_detached_tensor()).chain([norm]).collect())
}

/// The largest gap between two lists of tensors, as a share of the largest magnitude in the tensor; NaN where one is.
fn gap(twins: &[Tensor], others: &[Tensor]) -> Result<f32> {
    let mut worst = 0f32;
    for (twin, other) in twins.iter().zip(others) {
        let values = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let (twin, other) = (values(twin)?, values(other)?);
        let largest = twin.iter().fold(f32::MIN_POSITIVE, |largest, v| largest.max(v.abs()));
        for (twin, other) in twin.iter().zip(&other) {
            let gap = (twin - other).abs() / largest;
            if gap.is_nan() || gap > worst {
                worst = gap;
            }
            if worst.is_nan() {
                return Ok(worst);
            }
        }
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_agrees_with_itself_and_gaps_are_seen() {
        let found = agreement(&Device::Cpu, DType::F32).unwrap();
        assert!(found.len() > 20 && found.iter().all(|own| own.gap == 0.0 && own.holds()), "{found:?}");
        let tensors = |values: &[f32]| [Tensor::new(values, &Device::Cpu).unwrap()];
        assert_eq!(gap(&tensors(&[1.0, -4.0]), &tensors(&[2.0, -4.0])).unwrap(), 0.25);
        let broken = gap(&tensors(&[1.0, -4.0]), &tensors(&[f32::NAN, -4.0])).unwrap();
        let found = Agreement { operation: String::new(), dtype: DType::F32, gap: broken, allowed: 1.0 };
        assert!(broken.is_nan() && !found.holds());
    }
}

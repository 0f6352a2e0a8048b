//! Low-rank adapters (LoRA, Hu et al. 2021): beside a linear layer of weight W a second path B·A of small rank, which alone
//! is trained; afterwards it is merged into W.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use candle_core::{DType, Result as CandleResult, Tensor};

use super::layers::linear;
use super::params::{Init, Params};
use crate::ops;

/// A's name behind the layer's, as peft and diffusers have it.
pub const DOWN: &str = "lora_A.weight";
/// B's.
pub const UP: &str = "lora_B.weight";

/// Which layers get an adapter, and of which size.
#[derive(Clone)]
pub struct AdapterPlan {
    /// r: width between A and B.
    pub rank: usize,
    /// The path is multiplied by alpha/rank.
    pub alpha: f64,
    /// Of A's initial values.
    pub seed: u64,
    /// Whether the linear layer of this name gets one.
    pub is_target: Arc<dyn Fn(&str) -> bool + Send + Sync>,
}

/// The second path of a linear layer.
pub struct Adapter {
    down: Tensor,
    up: Tensor,
    scale: f64,
}

impl Adapter {
    /// The one of the layer at `params`, where it is to have one. B is zero, so that the layer starts as it was; A is drawn as
    /// diffusers does (`init_lora_weights="gaussian"`).
    pub fn new(params: &Params, inputs: usize, outputs: usize) -> Result<Option<Self>> {
        let Some(plan) = params.adapters().filter(|plan| (plan.is_target)(params.prefix())) else { return Ok(None) };
        let draw = Init::Normal(1.0 / plan.rank as f64);
        Ok(Some(Self {
            down: params.new_var(plan.seed, DOWN, &[plan.rank, inputs], draw)?,
            up: params.new_var(plan.seed, UP, &[outputs, plan.rank], Init::Zeros)?,
            scale: plan.alpha / plan.rank as f64,
        }))
    }

    /// y + alpha/rank · B·A·x.
    ///
    /// # Shapes
    /// - x `[.., in]`, y `[.., out]` → y's
    pub fn add_to(&self, y: &Tensor, x: &Tensor) -> CandleResult<Tensor> {
        let path = linear(&linear(x, &self.down, None, None)?, &self.up, None, None)?;
        ops::add(y, &ops::affine(&path, self.scale, 0.0)?)
    }
}

/// W + scale·B·A in f32, of a linear layer or a convolution.
///
/// # Shapes
/// - weight `[out, in, ..]`, down `[r, in, ..]`, up `[out, r]` or `[out, r, 1, 1]` → weight's
pub fn merged(weight: &Tensor, down: &Tensor, up: &Tensor, scale: f64) -> Result<Tensor> {
    let rows = |x: &Tensor| x.to_dtype(DType::F32)?.flatten_from(1);
    let change = rows(up)?.matmul(&rows(down)?)?; // [out, in·..]
    let change = change.reshape(weight.shape()).with_context(|| {
        format!("adapter {:?}, {:?} does not fit a weight {:?}", down.dims(), up.dims(), weight.dims())
    })?;
    Ok((weight.to_dtype(DType::F32)? + (change * scale)?)?)
}

/// Merges every adapter among `tensors` (by `layer.lora_A.weight` and `layer.lora_B.weight`) into `layer.weight`, and takes
/// it out.
pub fn merge_all(tensors: &mut BTreeMap<String, Tensor>, scale: f64) -> Result<()> {
    let layers: Vec<String> =
        tensors.keys().filter_map(|name| Some(name.strip_suffix(DOWN)?.strip_suffix('.')?.to_owned())).collect();
    for layer in layers {
        let mut take = |name: String| tensors.remove(&name).with_context(|| format!("tensor {name} is missing"));
        let (down, up) = (take(format!("{layer}.{DOWN}"))?, take(format!("{layer}.{UP}"))?);
        let weight = take(format!("{layer}.weight"))?;
        tensors.insert(format!("{layer}.weight"), merged(&weight, &down, &up, scale)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::layers::Linear;
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn a_merged_layer_gives_what_the_two_paths_give() {
        let plan = AdapterPlan { rank: 2, alpha: 3.0, seed: 1, is_target: Arc::new(|name| name == "a") };
        let params = Params::random(1, &Device::Cpu, DType::F32).frozen_where(|_| true).with_adapters(plan);
        let (with, without) =
            (Linear::new(&params.pp("a"), 5, 3).unwrap(), Linear::new(&params.pp("b"), 5, 3).unwrap());
        let vars = params.clone().finish().unwrap();
        assert_eq!(vars.keys().collect::<Vec<_>>(), ["a.lora_A.weight", "a.lora_B.weight"]);
        let x = Rng::new(1, "x", 0).normal_tensor(&[4, 5]).unwrap();
        let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let before = values(&with.forward(&x).unwrap());
        assert!(without.forward(&x).unwrap().dims() == [4, 3]);
        let up = Rng::new(2, "up", 0).normal_tensor(&[3, 2]).unwrap();
        vars["a.lora_B.weight"].set(&up).unwrap();
        let after = values(&with.forward(&x).unwrap());
        assert!(before.iter().zip(&after).any(|(a, b)| (a - b).abs() > 0.1));

        let mut tensors = params.frozen();
        tensors.extend(vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())));
        merge_all(&mut tensors, 1.5).unwrap();
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["a.bias", "a.weight", "b.bias", "b.weight"]);
        let params = Params::checkpoint(tensors, "merged", &Device::Cpu, DType::F32, false);
        let merged = values(&Linear::new(&params.pp("a"), 5, 3).unwrap().forward(&x).unwrap());
        assert!(merged.iter().zip(&after).all(|(a, b)| (a - b).abs() < 1e-5), "{merged:?} {after:?}");
    }

    #[test]
    fn a_convolution_takes_an_adapter_of_its_own_kernel() {
        let draw = |shape: &[usize]| Rng::new(3, "conv", shape[0] as u64).normal_tensor(shape).unwrap();
        let (weight, down, up) = (draw(&[4, 3, 3, 3]), draw(&[2, 3, 3, 3]), draw(&[4, 2, 1, 1]));
        let merged = merged(&weight, &down, &up, 0.5).unwrap();
        assert_eq!(merged.dims(), [4, 3, 3, 3]);
        let at = |x: &Tensor, i: &[usize]| -> f32 {
            let rows = i.iter().try_fold(x.clone(), |x, &i| x.get(i)).unwrap();
            rows.to_scalar().unwrap()
        };
        let by_hand = at(&weight, &[1, 2, 0, 1])
            + 0.5 * (0..2).map(|r| at(&up, &[1, r, 0, 0]) * at(&down, &[r, 2, 0, 1])).sum::<f32>();
        assert!((at(&merged, &[1, 2, 0, 1]) - by_hand).abs() < 1e-6);
        assert!(super::merged(&weight, &draw(&[2, 3, 1, 1]), &up, 1.0).is_err());
    }
}

//! The layers that hold parameters, named as in diffusers' checkpoints. They compute in the number format of their input, whatever
//! their parameters are kept in.

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::adapters::Adapter;
use super::params::{Init, Params};
use crate::ops::{self, Activation, Conv2d, Groups, Packed};

/// A fully connected layer: `weight [out, in]`, `bias [out]`.
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    packed: Packed,
    adapter: Option<Adapter>,
}

impl Linear {
    /// With a bias.
    pub fn new(params: &Params, inputs: usize, outputs: usize) -> Result<Self> {
        let bias = params.get("bias", &[outputs], Init::Zeros)?;
        Ok(Self { bias: Some(bias), ..Self::without_bias(params, inputs, outputs)? })
    }

    /// Weight alone.
    pub fn without_bias(params: &Params, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self {
            weight: params.get("weight", &[outputs, inputs], Init::FanIn(inputs))?,
            bias: None,
            packed: Packed::default(),
            adapter: Adapter::new(params, inputs, outputs)?,
        })
    }

    /// # Shapes
    /// - `[.., in]` → `[.., out]`
    pub fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let y = linear(x, &self.weight, self.bias.as_ref(), Some(&self.packed))?;
        match &self.adapter {
            None => Ok(y),
            Some(adapter) => adapter.add_to(&y, x),
        }
    }
}

/// [`ops::linear_packed`] in the number format of `x`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, packed: Option<&Packed>) -> CandleResult<Tensor> {
    let bias = bias.map(|bias| ops::cast(bias, x.dtype())).transpose()?;
    ops::linear_packed(x, &ops::cast(weight, x.dtype())?, bias.as_ref(), packed)
}

/// A layer's parameters in the number format of its input `x`.
fn alike(x: &Tensor, [weight, bias]: [&Tensor; 2]) -> CandleResult<[Tensor; 2]> {
    Ok([ops::cast(weight, x.dtype())?, ops::cast(bias, x.dtype())?])
}

/// A convolution: `weight [out, in, k, k]`, `bias [out]`; channel-last pictures.
pub struct Conv {
    weight: Tensor,
    bias: Tensor,
    packed: Packed,
    geometry: Conv2d,
}

impl Conv {
    /// Stride 1, same size.
    pub fn same(params: &Params, (inputs, outputs): (usize, usize), kernel: usize) -> Result<Self> {
        Self::new(params, (inputs, outputs), kernel, Conv2d::same(kernel))
    }

    /// From (inputs, outputs) channels, with a bias.
    pub fn new(params: &Params, channels: (usize, usize), kernel: usize, geometry: Conv2d) -> Result<Self> {
        Self::drawn(params, channels, kernel, geometry, Init::FanIn(channels.0 * kernel * kernel))
    }

    /// A 3×3 convolution that starts near zero: the last of a residual branch, or of a network.
    pub fn residual(params: &Params, channels: (usize, usize)) -> Result<Self> {
        Self::drawn(params, channels, 3, Conv2d::same(3), Init::Residual(9 * channels.0))
    }

    fn drawn(
        params: &Params,
        (inputs, outputs): (usize, usize),
        kernel: usize,
        geometry: Conv2d,
        init: Init,
    ) -> Result<Self> {
        Ok(Self {
            weight: params.get("weight", &[outputs, inputs, kernel, kernel], init)?,
            bias: params.get("bias", &[outputs], Init::Zeros)?,
            packed: Packed::default(),
            geometry,
        })
    }

    /// # Shapes
    /// - `[b, h, w, in]` → `[b, h', w', out]`
    pub fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let [weight, bias] = alike(x, [&self.weight, &self.bias])?;
        ops::conv2d_packed(x, &weight, Some(&bias), self.geometry, Some(&self.packed))
    }
}

/// Group norm, with SiLU behind it where the network has one there.
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: Groups,
    activation: Activation,
}

impl GroupNorm {
    /// With a scale and a shift a channel, the activation in the same pass.
    pub fn new(params: &Params, channels: usize, groups: Groups, activation: Activation) -> Result<Self> {
        anyhow::ensure!(
            groups.count > 0 && channels.is_multiple_of(groups.count),
            "norm_num_groups {} does not divide {channels} channels; change it or block_out_channels",
            groups.count
        );
        Ok(Self {
            weight: params.get("weight", &[channels], Init::Ones)?,
            bias: params.get("bias", &[channels], Init::Zeros)?,
            groups,
            activation,
        })
    }

    /// # Shapes
    /// - `[b, .., c]` → the same
    pub fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let [weight, bias] = alike(x, [&self.weight, &self.bias])?;
        ops::group_norm(x, &weight, &bias, self.groups, self.activation)
    }
}

/// Layer norm over the last dimension.
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// With a scale and a shift.
    pub fn new(params: &Params, width: usize, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: params.get("weight", &[width], Init::Ones)?,
            bias: params.get("bias", &[width], Init::Zeros)?,
            eps,
        })
    }

    /// # Shapes
    /// - `[.., c]` → the same
    pub fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let [weight, bias] = alike(x, [&self.weight, &self.bias])?;
        ops::layer_norm(x, &weight, &bias, self.eps)
    }
}

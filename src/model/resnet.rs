//! Residual blocks and the convolutions between resolutions, shared by U-Net and VAE (diffusers `ResnetBlock2D`,
//! `Downsample2D`, `Upsample2D`).

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::layers::{Conv, GroupNorm, Linear};
use super::params::Params;
use crate::ops::{self, Activation, Conv2d, Groups};

/// norm1·SiLU → conv1 → (+ time) → norm2·SiLU → conv2, plus the input (through a 1×1 when the width changes).
pub struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv,
    conv_shortcut: Option<Conv>,
}

impl ResnetBlock {
    /// `time_width` None: a block without time (the VAE's).
    pub fn new(
        params: &Params,
        (inputs, outputs): (usize, usize),
        time_width: Option<usize>,
        groups: Groups,
    ) -> Result<Self> {
        let time_emb_proj = match time_width {
            Some(width) => Some(Linear::new(&params.pp("time_emb_proj"), width, outputs)?),
            None => None,
        };
        let conv_shortcut = match inputs == outputs {
            true => None,
            false => Some(Conv::same(&params.pp("conv_shortcut"), (inputs, outputs), 1)?),
        };
        Ok(Self {
            norm1: GroupNorm::new(&params.pp("norm1"), inputs, groups, Activation::Silu)?,
            conv1: Conv::same(&params.pp("conv1"), (inputs, outputs), 3)?,
            time_emb_proj,
            norm2: GroupNorm::new(&params.pp("norm2"), outputs, groups, Activation::Silu)?,
            conv2: Conv::residual(&params.pp("conv2"), (outputs, outputs))?,
            conv_shortcut,
        })
    }

    /// # Shapes
    /// - x `[b, h, w, in]`, time (after SiLU) `[b, time_width]` → `[b, h, w, out]`
    pub fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> CandleResult<Tensor> {
        let mut hidden = self.conv1.forward(&self.norm1.forward(x)?)?;
        if let (Some(projection), Some(time)) = (&self.time_emb_proj, time) {
            hidden = ops::add_per_image(&hidden, &projection.forward(time)?)?;
        }
        let hidden = self.conv2.forward(&self.norm2.forward(&hidden)?)?;
        match &self.conv_shortcut {
            Some(shortcut) => ops::add(&shortcut.forward(x)?, &hidden),
            None => ops::add(x, &hidden),
        }
    }
}

/// A 3×3 convolution with stride 2; names as `downsamplers.0.conv`.
pub struct Downsample(Conv);

impl Downsample {
    /// `pad` top, bottom, left, right: 1 all round in the U-Net, bottom and right only in the VAE.
    pub fn new(params: &Params, channels: usize, pad: [usize; 4]) -> Result<Self> {
        let params = params.pp("downsamplers.0.conv");
        Ok(Self(Conv::new(&params, (channels, channels), 3, Conv2d { stride: 2, pad })?))
    }

    /// # Shapes
    /// - `[b, h, w, c]` → `[b, h/2, w/2, c]`
    pub fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        self.0.forward(x)
    }
}

/// Nearest-neighbour doubling, then a 3×3 convolution; names as `upsamplers.0.conv`.
pub struct Upsample(Conv);

impl Upsample {
    pub fn new(params: &Params, channels: usize) -> Result<Self> {
        Ok(Self(Conv::same(&params.pp("upsamplers.0.conv"), (channels, channels), 3)?))
    }

    /// # Shapes
    /// - `[b, h, w, c]` → `[b, 2h, 2w, c]`
    pub fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        self.0.forward(&ops::upsample2x(x)?)
    }
}

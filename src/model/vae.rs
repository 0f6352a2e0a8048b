//! The variational autoencoder between pictures and latents (diffusers `AutoencoderKL`).

use anyhow::{Result, ensure};
use candle_core::{Result as CandleResult, Tensor};

use super::config::VaeConfig;
use super::layers::{Conv, GroupNorm, Linear};
use super::params::{NamedVars, Params};
use super::resnet::{Downsample, ResnetBlock, Upsample};
use crate::ops::{self, Activation, Groups, Mask};

const EPS: f64 = 1e-6;

/// Pictures to latents and back.
pub struct Vae {
    config: VaeConfig,
    encoder: Encoder,
    quant_conv: Conv,
    post_quant_conv: Conv,
    decoder: Decoder,
}

/// The Gaussian that the encoder gives for each latent, unscaled; `[b, c, h, w]` each.
pub struct Moments {
    /// The middle of the distribution, unscaled.
    pub mean: Tensor,
    /// Clamped to [−30, 20], as diffusers does.
    pub logvar: Tensor,
}

impl Vae {
    /// Builds the network; the parameters that training may change come beside it.
    pub fn new(config: &VaeConfig, params: Params) -> Result<(Self, NamedVars)> {
        let levels = config.block_out_channels.len();
        ensure!(levels > 0, "vae config: block_out_channels is empty");
        for kind in config.down_block_types.iter().chain(&config.up_block_types) {
            ensure!(
                kind == "DownEncoderBlock2D" || kind == "UpDecoderBlock2D",
                "vae config: block type {kind} is not supported"
            );
        }
        for (field, values) in [("latents_mean", &config.latents_mean), ("latents_std", &config.latents_std)] {
            ensure!(
                values.is_none(),
                "vae config: {field} is not supported: such latents are scaled channel by channel"
            );
        }
        let c = config.latent_channels;
        let vae = Self {
            encoder: Encoder::new(&params.pp("encoder"), config)?,
            quant_conv: Conv::same(&params.pp("quant_conv"), (2 * c, 2 * c), 1)?,
            post_quant_conv: Conv::same(&params.pp("post_quant_conv"), (c, c), 1)?,
            decoder: Decoder::new(&params.pp("decoder"), config)?,
            config: config.clone(),
        };
        Ok((vae, params.finish()?))
    }

    /// What it was built from.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// # Shapes
    /// - images `[b, 3, H, W]` in [−1, 1] → moments `[b, c, H/f, W/f]`
    pub fn encode(&self, images: &Tensor) -> CandleResult<Moments> {
        let (_, _, h, w) = images.dims4()?;
        let f = self.config.downscale();
        if h % f != 0 || w % f != 0 {
            candle_core::bail!("vae: pictures of {h}×{w} must be multiples of {f}");
        }
        let hidden = self.encoder.forward(&ops::to_channels_last(images)?)?;
        let moments = ops::to_channels_first(&self.quant_conv.forward(&hidden)?)?; // [b, 2c, h, w]
        let c = self.config.latent_channels;
        let (mean, logvar) = (ops::narrow(&moments, 1, 0, c)?, ops::narrow(&moments, 1, c, c)?);
        Ok(Moments { mean, logvar: ops::clamp(&logvar, -30.0, 20.0)? })
    }

    /// Latents as the U-Net sees them: mean·scaling_factor.
    ///
    /// # Shapes
    /// - images `[b, 3, H, W]` in [−1, 1] → `[b, c, H/f, W/f]`
    pub fn latents_from_images(&self, images: &Tensor) -> CandleResult<Tensor> {
        ops::affine(&self.encode(images)?.mean, self.config.scaling_factor, 0.0)
    }

    /// # Shapes
    /// - latents `[b, c, h, w]` as the U-Net sees them → pictures `[b, 3, h·f, w·f]`, about [−1, 1], not clamped
    pub fn decode(&self, latents: &Tensor) -> CandleResult<Tensor> {
        self.decode_unscaled(&ops::affine(latents, 1.0 / self.config.scaling_factor, 0.0)?)
    }

    /// [`Vae::decode`] of latents before scaling, as the encoder gives them.
    pub fn decode_unscaled(&self, latents: &Tensor) -> CandleResult<Tensor> {
        let hidden = self.post_quant_conv.forward(&ops::to_channels_last(latents)?)?;
        ops::to_channels_first(&self.decoder.forward(&hidden)?)
    }
}

fn resnets(
    params: &Params,
    count: usize,
    (inputs, outputs): (usize, usize),
    groups: usize,
) -> Result<Vec<ResnetBlock>> {
    let groups = Groups { count: groups, eps: EPS };
    (0..count)
        .map(|i| {
            let inputs = if i == 0 { inputs } else { outputs };
            ResnetBlock::new(&params.pp("resnets").pp(i), (inputs, outputs), None, groups)
        })
        .collect()
}

struct Encoder {
    conv_in: Conv,
    levels: Vec<(Vec<ResnetBlock>, Option<Downsample>)>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv,
}

impl Encoder {
    fn new(params: &Params, config: &VaeConfig) -> Result<Self> {
        let widths = &config.block_out_channels;
        let last = widths.len() - 1;
        let mut levels = Vec::with_capacity(widths.len());
        for (level, &width) in widths.iter().enumerate() {
            let params = params.pp("down_blocks").pp(level);
            let inputs = widths[level.saturating_sub(1)];
            let stages = resnets(&params, config.layers_per_block, (inputs, width), config.norm_num_groups)?;
            // Zeros at the bottom and the right only.
            let downsample = match level < last {
                true => Some(Downsample::new(&params, width, [0, 1, 0, 1])?),
                false => None,
            };
            levels.push((stages, downsample));
        }
        let groups = Groups { count: config.norm_num_groups, eps: EPS };
        Ok(Self {
            conv_in: Conv::same(&params.pp("conv_in"), (config.in_channels, widths[0]), 3)?,
            levels,
            mid_block: MidBlock::new(&params.pp("mid_block"), widths[last], config.norm_num_groups)?,
            conv_norm_out: GroupNorm::new(&params.pp("conv_norm_out"), widths[last], groups, Activation::Silu)?,
            conv_out: Conv::same(&params.pp("conv_out"), (widths[last], 2 * config.latent_channels), 3)?,
        })
    }

    fn forward(&self, images: &Tensor) -> CandleResult<Tensor> {
        let mut hidden = self.conv_in.forward(images)?;
        for (stages, downsample) in &self.levels {
            for stage in stages {
                hidden = stage.forward(&hidden, None)?;
            }
            if let Some(downsample) = downsample {
                hidden = downsample.forward(&hidden)?;
            }
        }
        let hidden = self.mid_block.forward(&hidden)?;
        self.conv_out.forward(&self.conv_norm_out.forward(&hidden)?)
    }
}

struct Decoder {
    conv_in: Conv,
    mid_block: MidBlock,
    levels: Vec<(Vec<ResnetBlock>, Option<Upsample>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv,
}

impl Decoder {
    fn new(params: &Params, config: &VaeConfig) -> Result<Self> {
        let widths = &config.block_out_channels;
        let last = widths.len() - 1;
        let mut levels = Vec::with_capacity(widths.len());
        for index in 0..=last {
            let level = last - index;
            let params = params.pp("up_blocks").pp(index);
            let channels = (widths[(level + 1).min(last)], widths[level]);
            let stages = resnets(&params, config.layers_per_block + 1, channels, config.norm_num_groups)?;
            let upsample = match level > 0 {
                true => Some(Upsample::new(&params, widths[level])?),
                false => None,
            };
            levels.push((stages, upsample));
        }
        let groups = Groups { count: config.norm_num_groups, eps: EPS };
        Ok(Self {
            conv_in: Conv::same(&params.pp("conv_in"), (config.latent_channels, widths[last]), 3)?,
            mid_block: MidBlock::new(&params.pp("mid_block"), widths[last], config.norm_num_groups)?,
            levels,
            conv_norm_out: GroupNorm::new(&params.pp("conv_norm_out"), widths[0], groups, Activation::Silu)?,
            conv_out: Conv::same(&params.pp("conv_out"), (widths[0], config.out_channels), 3)?,
        })
    }

    fn forward(&self, latents: &Tensor) -> CandleResult<Tensor> {
        let mut hidden = self.mid_block.forward(&self.conv_in.forward(latents)?)?;
        for (stages, upsample) in &self.levels {
            for stage in stages {
                hidden = stage.forward(&hidden, None)?;
            }
            if let Some(upsample) = upsample {
                hidden = upsample.forward(&hidden)?;
            }
        }
        self.conv_out.forward(&self.conv_norm_out.forward(&hidden)?)
    }
}

/// Residual, attention, residual.
struct MidBlock {
    resnets: Vec<ResnetBlock>,
    attention: PixelAttention,
}

impl MidBlock {
    fn new(params: &Params, channels: usize, groups: usize) -> Result<Self> {
        Ok(Self {
            resnets: resnets(params, 2, (channels, channels), groups)?,
            attention: PixelAttention::new(&params.pp("attentions.0"), channels, groups)?,
        })
    }

    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let hidden = self.resnets[0].forward(x, None)?;
        self.resnets[1].forward(&self.attention.forward(&hidden)?, None)
    }
}

/// One head over all pixels. Checkpoints spell its layers `to_q, to_k, to_v, to_out.0` or, older ones (SD1.4's),
/// `query, key, value, proj_attn`.
struct PixelAttention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl PixelAttention {
    fn new(params: &Params, channels: usize, groups: usize) -> Result<Self> {
        let groups = Groups { count: groups, eps: EPS };
        let old = params.contains("query.weight");
        let linear = |new_name: &str, old_name: &str| {
            Linear::new(&params.pp(if old { old_name } else { new_name }), channels, channels)
        };
        Ok(Self {
            group_norm: GroupNorm::new(&params.pp("group_norm"), channels, groups, Activation::None)?,
            to_q: linear("to_q", "query")?,
            to_k: linear("to_k", "key")?,
            to_v: linear("to_v", "value")?,
            to_out: linear("to_out.0", "proj_attn")?,
        })
    }

    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let tokens = ops::reshape(&self.group_norm.forward(x)?, (b, h * w, c))?; // [b, l, d]
        let (q, k, v) = (self.to_q.forward(&tokens)?, self.to_k.forward(&tokens)?, self.to_v.forward(&tokens)?);
        let attended = self.to_out.forward(&ops::attention(&q, &k, &v, 1, Mask::None)?)?;
        ops::add(x, &ops::reshape(&attended, (b, h, w, c))?) // [b, h, w, c]
    }
}

//! The joint-image U-Net: diffusers' `UNet2DConditionModel` whose self-attention spans the images of a set.
//!
//! Tensors are channel-first at its door and channel-last inside.

use anyhow::{Context, Result, ensure};
use candle_core::{Result as CandleResult, Tensor};

use super::blocks::{CrossBlocks, DownBlock, LevelShape, MidBlock, UpBlock};
use super::conditions::ImageConditions;
use super::config::UnetConfig;
use super::coupling::{Coupling, Sight};
use super::layers::{Conv, GroupNorm};
use super::params::{NamedVars, Params};
use super::time::TimeEmbedding;
use super::transformer::Conditioning;
use crate::ops::{self, Activation, Groups};
use crate::shape::SetShape;

/// The denoising network of Stable Diffusion, its self-attention over all images of a set.
pub struct JointUnet {
    config: UnetConfig,
    conv_in: Conv,
    time: TimeEmbedding,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv,
    coupled: bool,
    checkpointed: bool,
}

impl JointUnet {
    /// Builds the network; the parameters that training may change come beside it.
    pub fn new(config: &UnetConfig, params: Params) -> Result<(Self, NamedVars)> {
        let unet = Self::build(config, &params)?;
        Ok((unet, params.finish()?))
    }

    fn build(config: &UnetConfig, params: &Params) -> Result<Self> {
        let widths = &config.block_out_channels;
        let levels = widths.len();
        ensure!(
            levels > 0 && config.down_block_types.len() == levels && config.up_block_types.len() == levels,
            "unet config: block_out_channels, down_block_types and up_block_types must have one entry a level"
        );
        let groups = Groups { count: config.norm_num_groups, eps: config.norm_eps };
        let time_width = 4 * widths[0];
        let shape = |level: usize, inputs: usize, is_last: bool, kind: &str| -> Result<LevelShape> {
            let heads = config.num_attention_heads.as_ref().unwrap_or(&config.attention_head_dim).at(level);
            let layers = config.transformer_layers_per_block.at(level);
            if let Some(heads) = heads {
                ensure!(
                    heads > 0 && widths[level].is_multiple_of(heads),
                    "unet config: {heads} heads (attention_head_dim) do not divide the {} channels of level {level}",
                    widths[level]
                );
            }
            Ok(LevelShape {
                inputs,
                outputs: widths[level],
                time_width,
                groups,
                resnets: config.layers_per_block,
                resample: !is_last,
                cross: match kind {
                    "DownBlock2D" | "UpBlock2D" => None,
                    "CrossAttnDownBlock2D" | "CrossAttnUpBlock2D" | "UNetMidBlock2DCrossAttn" => Some(CrossBlocks {
                        heads: heads.context("unet config: attention_head_dim has too few entries")?,
                        layers: layers.context("unet config: transformer_layers_per_block has too few entries")?,
                        context_width: config.cross_attention_dim,
                        linear_projection: config.use_linear_projection,
                    }),
                    other => anyhow::bail!("unet config: block type {other} is not supported"),
                },
            })
        };

        let mut down_blocks = Vec::with_capacity(levels);
        let mut skips = vec![widths[0]];
        for level in 0..levels {
            let inputs = widths[level.saturating_sub(1)];
            let shape = shape(level, inputs, level + 1 == levels, &config.down_block_types[level])?;
            down_blocks.push(DownBlock::new(&params.pp("down_blocks").pp(level), &shape, &mut skips)?);
        }
        let last = levels - 1;
        let mid = shape(last, widths[last], true, "UNetMidBlock2DCrossAttn")?;
        let mid_block = MidBlock::new(&params.pp("mid_block"), &mid)?;
        let mut up_blocks = Vec::with_capacity(levels);
        for index in 0..levels {
            let level = last - index;
            let inputs = widths[(level + 1).min(last)];
            let mut shape = shape(level, inputs, index == last, &config.up_block_types[index])?;
            shape.resnets += 1;
            if let (Some(cross), Some(layers)) = (&mut shape.cross, &config.reverse_transformer_layers_per_block) {
                let missing = "unet config: reverse_transformer_layers_per_block has too few entries";
                cross.layers = layers.at(index).context(missing)?;
            }
            up_blocks.push(UpBlock::new(&params.pp("up_blocks").pp(index), &shape, &mut skips)?);
        }
        Ok(Self {
            conv_in: Conv::same(&params.pp("conv_in"), (config.in_channels, widths[0]), 3)?,
            time: TimeEmbedding::new(params, config, time_width)?,
            down_blocks,
            mid_block,
            up_blocks,
            conv_norm_out: GroupNorm::new(&params.pp("conv_norm_out"), widths[0], groups, Activation::Silu)?,
            conv_out: Conv::residual(&params.pp("conv_out"), (widths[0], config.out_channels))?,
            config: config.clone(),
            coupled: true,
            checkpointed: false,
        })
    }

    /// What it was built from.
    pub fn config(&self) -> &UnetConfig {
        &self.config
    }

    /// The same network with self-attention inside each image only: the ablation that must lose the subject.
    pub fn uncoupled(self) -> Self {
        Self { coupled: false, ..self }
    }

    /// The same network, which keeps less for its gradients and computes its stages twice ([`ops::checkpoint`]).
    pub fn checkpointed(self) -> Self {
        Self { checkpointed: true, ..self }
    }

    /// Predicts the noise (or velocity) of every image of every set.
    ///
    /// # Shapes
    /// - input `[b·n, in_channels, h, w]`: for the joint model noisy latents, mask, reference in this order
    /// - timesteps `[b]`, one a set; context `[b·n, l, d]`
    /// - returns `[b·n, c, h, w]`
    pub fn forward(
        &self,
        input: &Tensor,
        timesteps: &Tensor,
        context: &Tensor,
        shape: SetShape,
    ) -> CandleResult<Tensor> {
        self.forward_seeing(input, timesteps, &ImageConditions::text(context), shape, &Sight::default())
    }

    /// [`JointUnet::forward`] with all that an image may be told, the images' sight of each other changed or watched.
    pub fn forward_seeing(
        &self,
        input: &Tensor,
        timesteps: &Tensor,
        told: &ImageConditions,
        shape: SetShape,
        sight: &Sight,
    ) -> CandleResult<Tensor> {
        let (total, _, h, w) = input.dims4()?;
        let context = &told.context;
        let multiple = 1 << (self.down_blocks.len() - 1);
        if total != shape.total() || timesteps.dims() != [shape.sets] || context.dim(0)? != total {
            candle_core::bail!(
                "unet: input {:?}, timesteps {:?} and context {:?} do not fit {shape:?}",
                input.dims(),
                timesteps.dims(),
                context.dims()
            );
        }
        if h % multiple != 0 || w % multiple != 0 {
            candle_core::bail!("unet: latents of {h}×{w} must be multiples of {multiple}");
        }
        let conditioning = Conditioning {
            time: self.time.forward(timesteps, told.added.as_ref(), shape, input.dtype())?,
            context: context.clone(),
            coupling: Coupling { images: if self.coupled { shape.images } else { 1 }, sight: sight.clone() },
            is_checkpointed: self.checkpointed,
        };
        let mut hidden = self.conv_in.forward(&ops::to_channels_last(input)?)?; // [b·n, h, w, c]
        let mut skips = vec![hidden.clone()];
        for block in &self.down_blocks {
            hidden = block.forward(hidden, &conditioning, &mut skips)?;
        }
        hidden = self.mid_block.forward(&hidden, &conditioning)?;
        for block in &self.up_blocks {
            hidden = block.forward(hidden, &conditioning, &mut skips)?;
        }
        ops::to_channels_first(&self.conv_out.forward(&self.conv_norm_out.forward(&hidden)?)?)
    }
}

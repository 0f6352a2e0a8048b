//! The levels of the U-Net: residual blocks, spatial transformers where the level has them, and the way to the next
//! resolution (diffusers `DownBlock2D`, `CrossAttnDownBlock2D`, `UNetMidBlock2DCrossAttn`, `UpBlock2D`, `CrossAttnUpBlock2D`).

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::{Result as CandleResult, Tensor};

use super::params::Params;
use super::resnet::{Downsample, ResnetBlock, Upsample};
use super::transformer::{Conditioning, SpatialTransformer, TransformerShape};
use crate::ops::{self, Groups};

/// Widths and contents of one level.
pub struct LevelShape {
    pub inputs: usize,
    pub outputs: usize,
    pub time_width: usize,
    pub groups: Groups,
    /// Residual blocks.
    pub resnets: usize,
    /// Whether the level ends with a change of resolution.
    pub resample: bool,
    /// None: a level without attention.
    pub cross: Option<CrossBlocks>,
}

/// The attention of a level.
pub struct CrossBlocks {
    pub heads: usize,
    pub layers: usize,
    pub context_width: usize,
    pub linear_projection: bool,
}

impl LevelShape {
    fn resnet(&self, params: &Params, index: usize, inputs: usize) -> Result<ResnetBlock> {
        let params = params.pp("resnets").pp(index);
        ResnetBlock::new(&params, (inputs, self.outputs), Some(self.time_width), self.groups)
    }

    fn transformer(&self, params: &Params, index: usize) -> Result<Option<SpatialTransformer>> {
        let Some(cross) = &self.cross else { return Ok(None) };
        let shape = TransformerShape {
            channels: self.outputs,
            heads: cross.heads,
            layers: cross.layers,
            context_width: cross.context_width,
            groups: self.groups.count,
            linear_projection: cross.linear_projection,
        };
        SpatialTransformer::new(&params.pp("attentions").pp(index), shape).map(Some)
    }
}

/// A residual block and the transformer behind it, where there is one.
struct Stage {
    resnet: ResnetBlock,
    attention: Option<SpatialTransformer>,
}

impl Stage {
    fn forward(self: &Arc<Self>, x: &Tensor, conditioning: &Conditioning) -> CandleResult<Tensor> {
        if !conditioning.is_checkpointed {
            return self.compute(x, conditioning);
        }
        let (stage, coupling) = (self.clone(), conditioning.coupling.clone());
        ops::checkpoint([x, &conditioning.time, &conditioning.context], move |[x, time, context]| {
            let (time, context, coupling) = (time.clone(), context.clone(), coupling.clone());
            stage.compute(x, &Conditioning { time, context, coupling, is_checkpointed: false })
        })
    }

    fn compute(&self, x: &Tensor, conditioning: &Conditioning) -> CandleResult<Tensor> {
        let hidden = self.resnet.forward(x, Some(&conditioning.time))?;
        match &self.attention {
            Some(attention) => attention.forward(&hidden, conditioning),
            None => Ok(hidden),
        }
    }
}

pub struct DownBlock {
    stages: Vec<Arc<Stage>>,
    downsample: Option<Downsample>,
}

impl DownBlock {
    /// Appends the widths of its outputs to `skips`.
    pub fn new(params: &Params, shape: &LevelShape, skips: &mut Vec<usize>) -> Result<Self> {
        let mut stages = Vec::with_capacity(shape.resnets);
        for index in 0..shape.resnets {
            let inputs = if index == 0 { shape.inputs } else { shape.outputs };
            let resnet = shape.resnet(params, index, inputs)?;
            stages.push(Arc::new(Stage { resnet, attention: shape.transformer(params, index)? }));
            skips.push(shape.outputs);
        }
        let downsample = match shape.resample {
            true => {
                skips.push(shape.outputs);
                Some(Downsample::new(params, shape.outputs, [1; 4])?)
            }
            false => None,
        };
        Ok(Self { stages, downsample })
    }

    /// Pushes every intermediate result onto `skips`.
    ///
    /// # Shapes
    /// - x `[b·n, h, w, in]` → `[b·n, h/2, w/2, out]`, the last level without the halving
    pub fn forward(&self, x: Tensor, conditioning: &Conditioning, skips: &mut Vec<Tensor>) -> CandleResult<Tensor> {
        let mut hidden = x;
        for stage in &self.stages {
            hidden = stage.forward(&hidden, conditioning)?;
            skips.push(hidden.clone());
        }
        if let Some(downsample) = &self.downsample {
            hidden = downsample.forward(&hidden)?;
            skips.push(hidden.clone());
        }
        Ok(hidden)
    }
}

/// Residual, transformer, residual at the lowest resolution.
pub struct MidBlock {
    first: Arc<Stage>,
    second: Arc<Stage>,
}

impl MidBlock {
    pub fn new(params: &Params, shape: &LevelShape) -> Result<Self> {
        let attention = shape.transformer(params, 0)?;
        Ok(Self {
            first: Arc::new(Stage { resnet: shape.resnet(params, 0, shape.inputs)?, attention }),
            second: Arc::new(Stage { resnet: shape.resnet(params, 1, shape.outputs)?, attention: None }),
        })
    }

    /// # Shapes
    /// - x `[b·n, h, w, c]` → the same
    pub fn forward(&self, x: &Tensor, conditioning: &Conditioning) -> CandleResult<Tensor> {
        self.second.forward(&self.first.forward(x, conditioning)?, conditioning)
    }
}

pub struct UpBlock {
    stages: Vec<Arc<Stage>>,
    upsample: Option<Upsample>,
}

impl UpBlock {
    /// Takes the widths that its stages receive from `skips`, last first.
    pub fn new(params: &Params, shape: &LevelShape, skips: &mut Vec<usize>) -> Result<Self> {
        let mut stages = Vec::with_capacity(shape.resnets);
        for index in 0..shape.resnets {
            let hidden = if index == 0 { shape.inputs } else { shape.outputs };
            let skip = skips.pop().context("unet config: more up stages than down stages")?;
            let resnet = shape.resnet(params, index, hidden + skip)?;
            stages.push(Arc::new(Stage { resnet, attention: shape.transformer(params, index)? }));
        }
        let upsample = match shape.resample {
            true => Some(Upsample::new(params, shape.outputs)?),
            false => None,
        };
        Ok(Self { stages, upsample })
    }

    /// # Shapes
    /// - x `[b·n, h, w, in]` → `[b·n, 2h, 2w, out]`, the last level without the doubling
    pub fn forward(&self, x: Tensor, conditioning: &Conditioning, skips: &mut Vec<Tensor>) -> CandleResult<Tensor> {
        let mut hidden = x;
        for stage in &self.stages {
            let Some(skip) = skips.pop() else { candle_core::bail!("unet: no skip connection left") };
            hidden = stage.forward(&ops::concat(&hidden, &skip)?, conditioning)?;
        }
        match &self.upsample {
            Some(upsample) => upsample.forward(&hidden),
            None => Ok(hidden),
        }
    }
}

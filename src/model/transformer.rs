//! The spatial transformer of the U-Net (diffusers `Transformer2DModel`), with self-attention coupled across a set.

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::coupling::Coupling;
use super::layers::{GroupNorm, LayerNorm, Linear, linear};
use super::params::{Init, Params};
use crate::ops::{self, Activation, Groups, Mask};

/// What every block of a forward pass sees besides its input.
pub struct Conditioning {
    /// Time embedding after SiLU, `[b·n, time_width]`.
    pub time: Tensor,
    /// Text embedding of each image, `[b·n, l, d]`.
    pub context: Tensor,
    /// What the images of a set see of each other.
    pub coupling: Coupling,
    /// Stages keep their inputs alone and are computed again for their gradients.
    pub is_checkpointed: bool,
}

/// Widths of a spatial transformer.
#[derive(Clone, Copy)]
pub struct TransformerShape {
    pub channels: usize,
    pub heads: usize,
    pub layers: usize,
    pub context_width: usize,
    pub groups: usize,
    /// Checkpoints store the projections as 1×1 convolutions (SD1.x) or as linear layers (SD2.x, SDXL).
    pub linear_projection: bool,
}

/// norm → proj_in → blocks → proj_out, plus the input.
pub struct SpatialTransformer {
    norm: GroupNorm,
    proj_in: Projection,
    transformer_blocks: Vec<TransformerBlock>,
    proj_out: Projection,
}

impl SpatialTransformer {
    pub fn new(params: &Params, shape: TransformerShape) -> Result<Self> {
        let groups = Groups { count: shape.groups, eps: 1e-6 };
        let blocks = params.pp("transformer_blocks");
        Ok(Self {
            norm: GroupNorm::new(&params.pp("norm"), shape.channels, groups, Activation::None)?,
            proj_in: Projection::new(&params.pp("proj_in"), shape, Init::FanIn(shape.channels))?,
            transformer_blocks: (0..shape.layers)
                .map(|i| TransformerBlock::new(&blocks.pp(i), shape))
                .collect::<Result<_>>()?,
            proj_out: Projection::new(&params.pp("proj_out"), shape, Init::Residual(shape.channels))?,
        })
    }

    /// # Shapes
    /// - x `[b·n, h, w, c]` → the same
    pub fn forward(&self, x: &Tensor, conditioning: &Conditioning) -> CandleResult<Tensor> {
        let (images, h, w, c) = x.dims4()?;
        let hidden = ops::reshape(&self.norm.forward(x)?, (images, h * w, c))?; // [b·n, l, d]
        let mut hidden = self.proj_in.forward(&hidden)?;
        let bias = conditioning.coupling.bias((h, w))?; // [b, n, n·l]
        for block in &self.transformer_blocks {
            hidden = block.forward(&hidden, conditioning, (h, w), bias.as_ref())?;
        }
        let hidden = ops::reshape(&self.proj_out.forward(&hidden)?, (images, h, w, c))?; // [b·n, h, w, c]
        ops::add(x, &hidden)
    }
}

/// A 1×1 convolution or a linear layer: the same product, two shapes of weight.
struct Projection {
    weight: Tensor,
    bias: Tensor,
}

impl Projection {
    fn new(params: &Params, shape: TransformerShape, init: Init) -> Result<Self> {
        let c = shape.channels;
        let dims: &[usize] = if shape.linear_projection { &[c, c] } else { &[c, c, 1, 1] };
        Ok(Self { weight: params.get("weight", dims, init)?, bias: params.get("bias", &[c], Init::Zeros)? })
    }

    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        linear(x, &self.weight, Some(&self.bias), None)
    }
}

/// Self-attention, cross-attention to the text, gated feed-forward; each behind a layer norm and added to its input.
struct TransformerBlock {
    /// Of its self-attention, as in the checkpoint.
    name: String,
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
}

impl TransformerBlock {
    fn new(params: &Params, shape: TransformerShape) -> Result<Self> {
        let c = shape.channels;
        let norm = |name: &str| LayerNorm::new(&params.pp(name), c, 1e-5);
        Ok(Self {
            name: params.pp("attn1").prefix().to_owned(),
            norm1: norm("norm1")?,
            attn1: Attention::new(&params.pp("attn1"), c, c, shape.heads)?,
            norm2: norm("norm2")?,
            attn2: Attention::new(&params.pp("attn2"), c, shape.context_width, shape.heads)?,
            norm3: norm("norm3")?,
            ff_in: Linear::new(&params.pp("ff.net.0.proj"), c, 8 * c)?,
            ff_out: Linear::new(&params.pp("ff.net.2"), 4 * c, c)?,
        })
    }

    /// Supplement §6: only `attn1` joins the images of a set; everything else works on each image.
    fn forward(
        &self,
        x: &Tensor,
        conditioning: &Conditioning,
        (h, w): (usize, usize),
        bias: Option<&Tensor>,
    ) -> CandleResult<Tensor> {
        let (images, l, d) = x.dims3()?;
        let coupling = &conditioning.coupling;
        let n = coupling.images;
        let joined = ops::reshape(&self.norm1.forward(x)?, (images / n, n * l, d))?; // [b, n·l, d]
        let (q, k, v) = self.attn1.project(&joined, &joined)?;
        if let Some(probe) = &coupling.sight.probe {
            probe.hear(&self.name, (&q, &k), self.attn1.heads, n, (h, w), bias)?;
        }
        let attended = self.attn1.attend((&q, &k, &v), bias.map_or(Mask::None, Mask::Biased))?;
        let x = ops::add(x, &ops::reshape(&attended, (images, l, d))?)?; // [b·n, l, d]
        let (q, k, v) = self.attn2.project(&self.norm2.forward(&x)?, &conditioning.context)?;
        let x = ops::add(&x, &self.attn2.attend((&q, &k, &v), Mask::None)?)?;
        let gated = ops::geglu(&self.ff_in.forward(&self.norm3.forward(&x)?)?)?;
        ops::add(&x, &self.ff_out.forward(&gated)?)
    }
}

struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    fn new(params: &Params, width: usize, context_width: usize, heads: usize) -> Result<Self> {
        Ok(Self {
            to_q: Linear::without_bias(&params.pp("to_q"), width, width)?,
            to_k: Linear::without_bias(&params.pp("to_k"), context_width, width)?,
            to_v: Linear::without_bias(&params.pp("to_v"), context_width, width)?,
            to_out: Linear::new(&params.pp("to_out.0"), width, width)?,
            heads,
        })
    }

    /// # Shapes
    /// - x `[b, l, d]`, context `[b, s, d']` → q `[b, l, d]`, k and v `[b, s, d]`
    fn project(&self, x: &Tensor, context: &Tensor) -> CandleResult<(Tensor, Tensor, Tensor)> {
        Ok((self.to_q.forward(x)?, self.to_k.forward(context)?, self.to_v.forward(context)?))
    }

    fn attend(&self, (q, k, v): (&Tensor, &Tensor, &Tensor), mask: Mask) -> CandleResult<Tensor> {
        self.to_out.forward(&ops::attention(q, k, v, self.heads, mask)?)
    }
}

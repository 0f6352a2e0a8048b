//! The transformer layer of CLIP's two encoders, of texts and of pictures.

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};
use serde::{Deserialize, Serialize};

use super::layers::{LayerNorm, Linear};
use super::params::Params;
use crate::ops::{self, Mask};

/// The activation of the feed-forward layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HiddenAct {
    /// x·σ(1.702·x), as in the first CLIP.
    #[default]
    QuickGelu,
    /// The exact one.
    Gelu,
}

/// Sizes and kind of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// d: width of a token.
    pub width: usize,
    /// Width inside the feed-forward layers.
    pub inner: usize,
    /// Heads of the attention.
    pub heads: usize,
    /// Inside the feed-forward layers.
    pub hidden_act: HiddenAct,
    /// Added to variances in the norms.
    pub eps: f64,
}

/// Self-attention and feed-forward, each behind a layer norm and added to its input.
pub struct ClipLayer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
    hidden_act: HiddenAct,
}

impl ClipLayer {
    /// `params` stands at the layer.
    pub fn new(params: &Params, shape: Shape) -> Result<Self> {
        let (d, inner) = (shape.width, shape.inner);
        let attention = params.pp("self_attn");
        Ok(Self {
            layer_norm1: LayerNorm::new(&params.pp("layer_norm1"), d, shape.eps)?,
            q_proj: Linear::new(&attention.pp("q_proj"), d, d)?,
            k_proj: Linear::new(&attention.pp("k_proj"), d, d)?,
            v_proj: Linear::new(&attention.pp("v_proj"), d, d)?,
            out_proj: Linear::new(&attention.pp("out_proj"), d, d)?,
            layer_norm2: LayerNorm::new(&params.pp("layer_norm2"), d, shape.eps)?,
            fc1: Linear::new(&params.pp("mlp.fc1"), d, inner)?,
            fc2: Linear::new(&params.pp("mlp.fc2"), inner, d)?,
            heads: shape.heads,
            hidden_act: shape.hidden_act,
        })
    }

    /// # Shapes
    /// - `[b, l, d]` → the same
    pub fn forward(&self, x: &Tensor, mask: Mask) -> CandleResult<Tensor> {
        let normed = self.layer_norm1.forward(x)?;
        let (q, k, v) = (self.q_proj.forward(&normed)?, self.k_proj.forward(&normed)?, self.v_proj.forward(&normed)?);
        let attended = ops::attention(&q, &k, &v, self.heads, mask)?;
        let x = ops::add(x, &self.out_proj.forward(&attended)?)?;
        let hidden = self.fc1.forward(&self.layer_norm2.forward(&x)?)?;
        let hidden = match self.hidden_act {
            HiddenAct::QuickGelu => ops::quick_gelu(&hidden)?,
            HiddenAct::Gelu => ops::gelu(&hidden)?,
        };
        ops::add(&x, &self.fc2.forward(&hidden)?)
    }
}

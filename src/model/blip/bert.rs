//! The pieces of BERT that the Q-Former and BLIP's decoder are made of; norms lie behind the sums.

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::config::Act;
use crate::model::layers::{LayerNorm, Linear};
use crate::model::params::Params;
use crate::ops::{self, Mask};

/// The activation `act`.
pub fn activate(act: Act, x: &Tensor) -> CandleResult<Tensor> {
    match act {
        Act::Gelu => ops::gelu(x),
        Act::QuickGelu => ops::quick_gelu(x),
        Act::Relu => x.relu(),
    }
}

/// Sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Widths {
    /// Of what asks.
    pub own: usize,
    /// Of what is looked at.
    pub source: usize,
    /// Heads side by side.
    pub heads: usize,
    /// Added to variances in the norm.
    pub eps: f64,
}

/// Attention, its output layer, the sum with its input, the norm.
pub struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    dense: Linear,
    norm: LayerNorm,
    heads: usize,
}

impl Attention {
    /// `inner` is the name of the part with queries, keys and values: `self` in BERT, `attention` in the Q-Former.
    pub fn new(params: &Params, inner: &str, widths: Widths) -> Result<Self> {
        let (attention, output) = (params.pp(inner), params.pp("output"));
        Ok(Self {
            query: Linear::new(&attention.pp("query"), widths.own, widths.own)?,
            key: Linear::new(&attention.pp("key"), widths.source, widths.own)?,
            value: Linear::new(&attention.pp("value"), widths.source, widths.own)?,
            dense: Linear::new(&output.pp("dense"), widths.own, widths.own)?,
            norm: LayerNorm::new(&output.pp("LayerNorm"), widths.own, widths.eps)?,
            heads: widths.heads,
        })
    }

    /// What is looked at, ready to be: keys and values `[b, s, d]`.
    pub fn keys_values(&self, source: &Tensor) -> CandleResult<(Tensor, Tensor)> {
        Ok((self.key.forward(source)?, self.value.forward(source)?))
    }

    /// # Shapes
    /// - x `[b, l, d]`, keys and values `[b, s, d]` → `[b, l, d]`
    pub fn forward(&self, x: &Tensor, (keys, values): (&Tensor, &Tensor), mask: Mask) -> CandleResult<Tensor> {
        let attended = ops::attention(&self.query.forward(x)?, keys, values, self.heads, mask)?;
        self.norm.forward(&(self.dense.forward(&attended)? + x)?)
    }
}

/// The feed-forward layers, the sum with their input, the norm.
pub struct FeedForward {
    intermediate: Linear,
    dense: Linear,
    norm: LayerNorm,
    act: Act,
}

impl FeedForward {
    /// `names` are those of the two layers: `intermediate`, `output`.
    pub fn new(
        params: &Params,
        names: [&str; 2],
        (width, inner): (usize, usize),
        (act, eps): (Act, f64),
    ) -> Result<Self> {
        let output = params.pp(names[1]);
        Ok(Self {
            intermediate: Linear::new(&params.pp(names[0]).pp("dense"), width, inner)?,
            dense: Linear::new(&output.pp("dense"), inner, width)?,
            norm: LayerNorm::new(&output.pp("LayerNorm"), width, eps)?,
            act,
        })
    }

    /// # Shapes
    /// - `[b, l, d]` → the same
    pub fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let hidden = activate(self.act, &self.intermediate.forward(x)?)?;
        self.norm.forward(&(self.dense.forward(&hidden)? + x)?)
    }
}

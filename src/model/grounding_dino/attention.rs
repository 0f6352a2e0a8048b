//! Multi-head attention with queries, keys and values from wherever (`GroundingDinoMultiheadAttention`).

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use crate::model::layers::Linear;
use crate::model::params::Params;
use crate::ops::{self, Mask};

/// The layer.
pub struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    out_proj: Linear,
    heads: usize,
}

impl Attention {
    /// Of width d.
    pub fn new(params: &Params, d: usize, heads: usize) -> Result<Self> {
        let linear = |name: &str| Linear::new(&params.pp(name), d, d);
        let (query, key, value) = (linear("query")?, linear("key")?, linear("value")?);
        Ok(Self { query, key, value, out_proj: linear("out_proj")?, heads })
    }

    /// # Shapes
    /// - queries `[b, l, d]`, keys and values `[b, s, d]` → `[b, l, d]`
    pub fn forward(&self, [queries, keys, values]: [&Tensor; 3], mask: Mask) -> CandleResult<Tensor> {
        let (q, k, v) = (self.query.forward(queries)?, self.key.forward(keys)?, self.value.forward(values)?);
        self.out_proj.forward(&ops::attention(&q, &k, &v, self.heads, mask)?)
    }
}

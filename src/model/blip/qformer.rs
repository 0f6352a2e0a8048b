//! BLIP-2's querying transformer (`Blip2QFormerModel`): a few learnt vectors that look at a picture's features.

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::bert::{Attention, FeedForward, Widths};
use super::config::QFormerConfig;
use crate::model::layers::LayerNorm;
use crate::model::params::Params;
use crate::ops::Mask;

/// Features to queries.
pub struct QFormer {
    layernorm: LayerNorm,
    layers: Vec<Layer>,
}

struct Layer {
    attention: Attention,
    crossattention: Option<Attention>,
    feed_forward: FeedForward,
}

impl QFormer {
    /// From the parameters below `qformer`; `features` is the width of the vision tower.
    pub fn new(config: &QFormerConfig, features: usize, params: &Params) -> Result<Self> {
        let (d, heads, eps) = (config.hidden_size, config.num_attention_heads, config.layer_norm_eps);
        let layer = |index: usize| -> Result<Layer> {
            let layer = params.pp("encoder.layer").pp(index);
            let own = Widths { own: d, source: d, heads, eps };
            let cross = Widths { source: features, ..own };
            let looks = index.is_multiple_of(config.cross_attention_frequency);
            Ok(Layer {
                attention: Attention::new(&layer.pp("attention"), "attention", own)?,
                crossattention: match looks {
                    true => Some(Attention::new(&layer.pp("crossattention"), "attention", cross)?),
                    false => None,
                },
                feed_forward: FeedForward::new(
                    &layer,
                    ["intermediate_query", "output_query"],
                    (d, config.intermediate_size),
                    (config.hidden_act, eps),
                )?,
            })
        };
        Ok(Self {
            layernorm: LayerNorm::new(&params.pp("layernorm"), d, eps)?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
        })
    }

    /// # Shapes
    /// - queries `[b, q, d]`, features `[b, l, features]` → `[b, q, d]`
    pub fn forward(&self, queries: &Tensor, features: &Tensor) -> CandleResult<Tensor> {
        let mut hidden = self.layernorm.forward(queries)?;
        for layer in &self.layers {
            let (keys, values) = layer.attention.keys_values(&hidden)?;
            hidden = layer.attention.forward(&hidden, (&keys, &values), Mask::None)?;
            if let Some(crossattention) = &layer.crossattention {
                let (keys, values) = crossattention.keys_values(features)?;
                hidden = crossattention.forward(&hidden, (&keys, &values), Mask::None)?;
            }
            hidden = layer.feed_forward.forward(&hidden)?;
        }
        Ok(hidden)
    }
}

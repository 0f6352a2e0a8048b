//! The text's encoder: BERT (transformers `BertModel` without its pooling), whose tokens see their own phrase alone.

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::activated;
use super::config::{Activation, BertConfig};
use super::phrases::Phrases;
use crate::model::layers::{LayerNorm, Linear};
use crate::model::params::{Init, Params};
use crate::ops::{self, Mask};

/// Tokens to vectors.
pub struct Bert {
    words: Tensor,
    places: Tensor,
    /// The vector of the first kind of text, `[1, d]`.
    kind: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

impl Bert {
    /// `params` stands at the encoder.
    pub fn new(config: &BertConfig, params: &Params) -> Result<Self> {
        let (d, embeddings) = (config.hidden_size, params.pp("embeddings"));
        let table = |name: &str, rows: usize| embeddings.get(&format!("{name}.weight"), &[rows, d], Init::Normal(0.02));
        Ok(Self {
            words: table("word_embeddings", config.vocab_size)?,
            places: table("position_embeddings", config.max_position_embeddings)?,
            kind: table("token_type_embeddings", config.type_vocab_size)?.narrow(0, 0, 1)?,
            norm: LayerNorm::new(&embeddings.pp("LayerNorm"), d, config.layer_norm_eps)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::new(&params.pp("encoder.layer").pp(i), config))
                .collect::<Result<_>>()?,
        })
    }

    /// # Shapes
    /// - → `[b, t, d]`
    pub fn forward(&self, phrases: &Phrases) -> CandleResult<Tensor> {
        let (b, t) = phrases.tokens.dims2()?;
        let places = Tensor::from_slice(&phrases.places, b * t, self.places.device())?;
        let words = self.words.index_select(&phrases.tokens.flatten_all()?, 0)?;
        let summed = (words + self.places.index_select(&places, 0)?)?.broadcast_add(&self.kind)?;
        let mut x = self.norm.forward(&summed.reshape((b, t, ()))?)?; // [b, t, d]
        for layer in &self.layers {
            x = layer.forward(&x, &phrases.within)?;
        }
        Ok(x)
    }
}

/// Self-attention and feed-forward, each added to its input before a norm.
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    dense: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
    act: Activation,
    heads: usize,
}

impl Layer {
    fn new(params: &Params, config: &BertConfig) -> Result<Self> {
        let (d, inner) = (config.hidden_size, config.intermediate_size);
        let own = params.pp("attention.self");
        let norm = |name: &str| LayerNorm::new(&params.pp(name).pp("LayerNorm"), d, config.layer_norm_eps);
        Ok(Self {
            query: Linear::new(&own.pp("query"), d, d)?,
            key: Linear::new(&own.pp("key"), d, d)?,
            value: Linear::new(&own.pp("value"), d, d)?,
            dense: Linear::new(&params.pp("attention.output.dense"), d, d)?,
            attention_norm: norm("attention.output")?,
            intermediate: Linear::new(&params.pp("intermediate.dense"), d, inner)?,
            output: Linear::new(&params.pp("output.dense"), inner, d)?,
            output_norm: norm("output")?,
            act: config.hidden_act,
            heads: config.num_attention_heads,
        })
    }

    fn forward(&self, x: &Tensor, within: &Tensor) -> CandleResult<Tensor> {
        let (q, k, v) = (self.query.forward(x)?, self.key.forward(x)?, self.value.forward(x)?);
        let attended = self.dense.forward(&ops::attention(&q, &k, &v, self.heads, Mask::Biased(within))?)?;
        let x = self.attention_norm.forward(&ops::add(x, &attended)?)?;
        let hidden = activated(&self.intermediate.forward(&x)?, self.act)?;
        self.output_norm.forward(&ops::add(&x, &self.output.forward(&hidden)?)?)
    }
}

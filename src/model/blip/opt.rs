//! OPT (`OPTForCausalLM`), the language model of BLIP-2: causal transformer, norms in front of the layers.

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::bert::activate;
use super::cache::Cache;
use super::config::{Act, OptConfig};
use crate::model::layers::{LayerNorm, Linear};
use crate::model::params::{Init, Params};
use crate::ops::{self, Mask};

/// Where OPT's table of places begins to count.
const FIRST_PLACE: usize = 2;
/// `torch.nn.LayerNorm`'s default, which OPT uses.
const EPS: f64 = 1e-5;

/// Vectors to scores of the next token.
pub struct Opt {
    embed_tokens: Tensor,
    embed_positions: Tensor,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
    /// None: the table of tokens.
    lm_head: Option<Tensor>,
}

impl Opt {
    /// From the parameters below `language_model`.
    pub fn new(config: &OptConfig, params: &Params) -> Result<Self> {
        let (d, vocabulary) = (config.hidden_size, config.vocab_size);
        let decoder = params.pp("model.decoder");
        let n_places = config.max_position_embeddings + FIRST_PLACE;
        Ok(Self {
            embed_tokens: decoder.pp("embed_tokens").get("weight", &[vocabulary, d], Init::Normal(0.02))?,
            embed_positions: decoder.pp("embed_positions").get("weight", &[n_places, d], Init::Normal(0.02))?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::new(&decoder.pp("layers").pp(i), config))
                .collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::new(&decoder.pp("final_layer_norm"), d, EPS)?,
            lm_head: match config.tie_word_embeddings {
                true => None,
                false => Some(params.pp("lm_head").get("weight", &[vocabulary, d], Init::FanIn(d))?),
            },
        })
    }

    /// The vectors of tokens, without their places.
    ///
    /// # Shapes
    /// - tokens `[b, l]` u32 → `[b, l, d]`
    pub fn embed(&self, tokens: &Tensor) -> CandleResult<Tensor> {
        let (b, l) = tokens.dims2()?;
        self.embed_tokens.index_select(&tokens.flatten_all()?, 0)?.reshape((b, l, ()))
    }

    /// Goes on from what the cache holds: the first call may bring many vectors, later ones bring one a row.
    ///
    /// # Shapes
    /// - `[b, l, d]` → `[b, l, d]`
    pub fn forward(&self, embedded: &Tensor, cache: &mut Cache) -> CandleResult<Tensor> {
        let (first, l) = (cache.n_tokens()?, embedded.dim(1)?);
        if first > 0 && l > 1 {
            candle_core::bail!("OPT: {l} tokens behind others; they come one by one");
        }
        let places = self.embed_positions.narrow(0, FIRST_PLACE + first, l)?;
        let mut hidden = embedded.broadcast_add(&places)?;
        for (index, layer) in self.layers.iter().enumerate() {
            hidden = layer.forward(&hidden, index, cache)?;
        }
        self.final_layer_norm.forward(&hidden)
    }

    /// Scores of the token behind each.
    ///
    /// # Shapes
    /// - `[.., d]` → `[.., vocabulary]`
    pub fn logits(&self, hidden: &Tensor) -> CandleResult<Tensor> {
        ops::linear(hidden, self.lm_head.as_ref().unwrap_or(&self.embed_tokens), None)
    }
}

struct Layer {
    self_attn_layer_norm: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    final_layer_norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
    act: Act,
}

impl Layer {
    fn new(params: &Params, config: &OptConfig) -> Result<Self> {
        let (d, inner) = (config.hidden_size, config.ffn_dim);
        let attention = params.pp("self_attn");
        Ok(Self {
            self_attn_layer_norm: LayerNorm::new(&params.pp("self_attn_layer_norm"), d, EPS)?,
            q_proj: Linear::new(&attention.pp("q_proj"), d, d)?,
            k_proj: Linear::new(&attention.pp("k_proj"), d, d)?,
            v_proj: Linear::new(&attention.pp("v_proj"), d, d)?,
            out_proj: Linear::new(&attention.pp("out_proj"), d, d)?,
            final_layer_norm: LayerNorm::new(&params.pp("final_layer_norm"), d, EPS)?,
            fc1: Linear::new(&params.pp("fc1"), d, inner)?,
            fc2: Linear::new(&params.pp("fc2"), inner, d)?,
            heads: config.num_attention_heads,
            act: config.activation_function,
        })
    }

    fn forward(&self, x: &Tensor, index: usize, cache: &mut Cache) -> CandleResult<Tensor> {
        let normed = self.self_attn_layer_norm.forward(x)?;
        let (q, k, v) = (self.q_proj.forward(&normed)?, self.k_proj.forward(&normed)?, self.v_proj.forward(&normed)?);
        let mask = if x.dim(1)? > 1 { Mask::Causal } else { Mask::None };
        let (k, v) = cache.extend(index, k, v)?;
        let attended = ops::attention(&q, k, v, self.heads, mask)?;
        let x = (x + self.out_proj.forward(&attended)?)?;
        let hidden = activate(self.act, &self.fc1.forward(&self.final_layer_norm.forward(&x)?)?)?;
        &x + self.fc2.forward(&hidden)?
    }
}

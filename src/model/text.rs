//! The CLIP text encoder (transformers `CLIPTextModel`, `CLIPTextModelWithProjection`): token and position embeddings, causal
//! transformer, final norm, and what Stable Diffusion XL takes from it: the layer before the last, and the pooled text.

use anyhow::{Result, ensure};
use candle_core::{DType, Result as CandleResult, Tensor};
use serde::{Deserialize, Serialize};

pub use super::clip_layer::HiddenAct;
use super::clip_layer::{ClipLayer, Shape};
use super::layers::{LayerNorm, Linear};
use super::params::{Init, NamedVars, Params};
use crate::ops::{self, Mask};

/// `text_encoder/config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextConfig {
    /// The class that transformers reads it with.
    #[serde(default = "architectures")]
    pub architectures: Vec<String>,
    /// The family that transformers knows it by.
    #[serde(default = "model_type")]
    pub model_type: String,
    /// Tokens that can be told apart.
    pub vocab_size: usize,
    /// d: width of a token.
    pub hidden_size: usize,
    /// Width inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Heads of each attention.
    pub num_attention_heads: usize,
    /// l: tokens a prompt is cut or padded to.
    #[serde(default = "seventy_seven")]
    pub max_position_embeddings: usize,
    /// Activation inside the feed-forward layers.
    #[serde(default)]
    pub hidden_act: HiddenAct,
    /// Added to variances in the norms.
    #[serde(default = "eps")]
    pub layer_norm_eps: f64,
    /// The token that ends a text, at which it is pooled; None: CLIP's own, 49407. In files of old transformers it is 2, which
    /// is no end token: there a text is pooled at its highest token, as CLIP does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eos_token_id: Option<u32>,
    /// p: width of the pooled text where the class projects it; None: 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projection_dim: Option<usize>,
}

impl TextConfig {
    fn shape(&self) -> Shape {
        Shape {
            width: self.hidden_size,
            inner: self.intermediate_size,
            heads: self.num_attention_heads,
            hidden_act: self.hidden_act,
            eps: self.layer_norm_eps,
        }
    }

    /// p, where this is a `CLIPTextModelWithProjection`.
    pub fn pooled_width(&self) -> Option<usize> {
        let is_projected = self.architectures.iter().any(|class| class == "CLIPTextModelWithProjection");
        is_projected.then(|| self.projection_dim.unwrap_or(512))
    }
}

fn architectures() -> Vec<String> {
    vec!["CLIPTextModel".into()]
}
fn model_type() -> String {
    "clip_text_model".into()
}
fn seventy_seven() -> usize {
    77
}
fn eps() -> f64 {
    1e-5
}

/// `<|endoftext|>` of CLIP's vocabulary.
const END: u32 = 49_407;

/// Tokens to the context of the U-Net.
pub struct TextEncoder {
    config: TextConfig,
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<ClipLayer>,
    final_layer_norm: LayerNorm,
    text_projection: Option<Linear>,
    /// What the layers compute in.
    dtype: DType,
}

impl TextEncoder {
    /// Builds the network; the parameters that training may change come beside it.
    pub fn new(config: &TextConfig, params: Params) -> Result<(Self, NamedVars)> {
        let (width, heads) = (config.hidden_size, config.num_attention_heads);
        ensure!(
            heads > 0 && width.is_multiple_of(heads),
            "text encoder config: num_attention_heads {heads} does not divide hidden_size {width}"
        );
        let root = params.pp("text_model");
        let embeddings = root.pp("embeddings");
        // The deviations that transformers draws CLIP's embeddings with.
        let token_init = Init::Normal(0.02);
        let token_embedding = embeddings.get("token_embedding.weight", &[config.vocab_size, width], token_init)?;
        let text = Self {
            dtype: token_embedding.dtype(),
            token_embedding,
            position_embedding: embeddings.get(
                "position_embedding.weight",
                &[config.max_position_embeddings, width],
                token_init,
            )?,
            layers: (0..config.num_hidden_layers)
                .map(|i| ClipLayer::new(&root.pp("encoder.layers").pp(i), config.shape()))
                .collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::new(&root.pp("final_layer_norm"), width, config.layer_norm_eps)?,
            text_projection: match config.pooled_width() {
                None => None,
                Some(pooled) => Some(Linear::without_bias(&params.pp("text_projection"), width, pooled)?),
            },
            config: config.clone(),
        };
        Ok((text, params.finish()?))
    }

    /// The same network, whose layers compute in this number format, whatever the parameters are kept in.
    pub fn computing_in(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// What the layers are given.
    ///
    /// # Shapes
    /// - tokens `[b, l]` → `[b, l, d]`
    fn embed(&self, tokens: &Tensor) -> CandleResult<Tensor> {
        let hidden = ops::embed(tokens, &self.token_embedding, &self.position_embedding)?;
        ops::cast(&hidden, self.dtype)
    }

    /// What it was built from.
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// # Shapes
    /// - tokens `[b, l]` u32, `l` at most `max_position_embeddings` → `[b, l, d]`
    pub fn forward(&self, tokens: &Tensor) -> CandleResult<Tensor> {
        let mut hidden = self.embed(tokens)?; // [b, l, d]
        for layer in &self.layers {
            hidden = layer.forward(&hidden, Mask::Causal)?;
        }
        self.final_layer_norm.forward(&hidden)
    }

    /// What the last layer is given, without norm: the context of Stable Diffusion XL.
    ///
    /// # Shapes
    /// - as [`TextEncoder::forward`]
    pub fn penultimate(&self, tokens: &Tensor) -> CandleResult<Tensor> {
        let mut hidden = self.embed(tokens)?; // [b, l, d]
        for layer in &self.layers[..self.layers.len().saturating_sub(1)] {
            hidden = layer.forward(&hidden, Mask::Causal)?;
        }
        Ok(hidden)
    }

    /// [`TextEncoder::penultimate`], and the pooled text: the final norm where the text ends, projected.
    ///
    /// # Shapes
    /// - tokens `[b, l]` → `[b, l, d]`, `[b, p]`
    pub fn penultimate_and_pooled(&self, tokens: &Tensor) -> CandleResult<(Tensor, Tensor)> {
        let (Some(projection), Some(last)) = (&self.text_projection, self.layers.last()) else {
            candle_core::bail!("text encoder: pools no text; that takes a CLIPTextModelWithProjection");
        };
        let penultimate = self.penultimate(tokens)?;
        let hidden = last.forward(&penultimate, Mask::Causal)?;
        let (b, l, d) = hidden.dims3()?;
        let rows: Vec<u32> =
            self.ends(tokens)?.into_iter().zip(0..).map(|(end, text)| (text * l + end) as u32).collect();
        let rows = Tensor::from_vec(rows, (b, 1), tokens.device())?;
        // The rows of a table, with nothing added to them.
        let nothing = Tensor::zeros((1, d), hidden.dtype(), hidden.device())?;
        let pooled = ops::embed(&rows, &ops::reshape(&hidden, (b * l, d))?, &nothing)?; // [b, 1, d]
        let pooled = ops::reshape(&self.final_layer_norm.forward(&pooled)?, (b, d))?;
        Ok((penultimate, projection.forward(&pooled)?))
    }

    /// Where each text ends: its first end token (transformers `CLIPTextTransformer.forward`); at its start if it has none.
    fn ends(&self, tokens: &Tensor) -> CandleResult<Vec<usize>> {
        let texts: Vec<Vec<u32>> = tokens.to_dtype(DType::U32)?.to_vec2()?;
        let end = |text: Vec<u32>| {
            let wanted = match self.config.eos_token_id {
                Some(2) => text.iter().copied().max(),
                other => Some(other.unwrap_or(END)),
            };
            text.iter().position(|&token| Some(token) == wanted).unwrap_or(0)
        };
        Ok(texts.into_iter().map(end).collect())
    }
}

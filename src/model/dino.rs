//! DINO's and DINOv2's picture encoders (transformers `ViTModel`, `Dinov2Model`): a picture to a vector that tells one
//! thing from another of its kind. Forward only.

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::{D, IndexOp as _, Result as CandleResult, Tensor};
use serde::Deserialize;

use super::files::Files;
use super::layers::{LayerNorm, Linear};
use super::params::{Init, Params};
use super::patches::{grid_of, patches_from_pixels, positions_for, tokens_with_class};
use super::weights::Weights;
use crate::device::Runtime;
use crate::ops::{self, Mask};

/// `config.json`; None is transformers' own default, which the two families do not share.
#[derive(Clone, Debug, Deserialize)]
pub struct DinoConfig {
    /// Which of the two.
    pub model_type: DinoKind,
    /// d: width of a token.
    #[serde(default = "width")]
    pub hidden_size: usize,
    /// Transformer layers.
    #[serde(default = "twelve")]
    pub num_hidden_layers: usize,
    /// Heads of each attention.
    #[serde(default = "twelve")]
    pub num_attention_heads: usize,
    /// Width inside DINO's feed-forward layers; None: 3072.
    pub intermediate_size: Option<usize>,
    /// The same of DINOv2, in d; None: 4.
    pub mlp_ratio: Option<f64>,
    /// Whether DINOv2's feed-forward layers are gated (the giant one).
    #[serde(default)]
    pub use_swiglu_ffn: bool,
    /// Added to variances in the norms; None: 1e-12 of DINO, 1e-6 of DINOv2.
    pub layer_norm_eps: Option<f64>,
    /// Side of the pictures in pixels that its positions are for.
    #[serde(default = "side")]
    pub image_size: usize,
    /// Side of a patch in pixels; None: 16 of DINO, 14 of DINOv2.
    pub patch_size: Option<usize>,
    /// Whether queries, keys and values have biases.
    #[serde(default = "yes")]
    pub qkv_bias: bool,
    /// `gelu`.
    pub hidden_act: Option<String>,
}

/// The two families.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum DinoKind {
    /// DINO, a plain vision transformer.
    Vit,
    /// DINOv2: outputs of branches scaled, perhaps gated.
    Dinov2,
}

fn width() -> usize {
    768
}
fn twelve() -> usize {
    12
}
fn side() -> usize {
    224
}
fn yes() -> bool {
    true
}

impl DinoConfig {
    fn patch_size(&self) -> usize {
        self.patch_size.unwrap_or(if self.model_type == DinoKind::Vit { 16 } else { 14 })
    }

    fn eps(&self) -> f64 {
        self.layer_norm_eps.unwrap_or(if self.model_type == DinoKind::Vit { 1e-12 } else { 1e-6 })
    }

    fn check(&self) -> Result<()> {
        let (d, heads, size) = (self.hidden_size, self.num_attention_heads, self.patch_size());
        ensure!(heads > 0 && d.is_multiple_of(heads), "num_attention_heads {heads} does not divide hidden_size {d}");
        ensure!(size > 0 && self.image_size >= size, "patch_size {size} does not fit image_size {}", self.image_size);
        if let Some(other) = self.hidden_act.as_deref().filter(|act| *act != "gelu") {
            bail!("hidden_act {other:?}: DINO's is gelu");
        }
        Ok(())
    }
}

/// The network.
pub struct DinoEncoder {
    kind: DinoKind,
    class: Tensor,
    patch_weight: Tensor,
    patch_bias: Tensor,
    patch_size: usize,
    /// `[1 + side², d]`: of the whole picture, then of the patches.
    positions: Tensor,
    layers: Vec<Layer>,
    layernorm: LayerNorm,
}

impl DinoEncoder {
    /// Reads a transformers folder: `config.json`, `model.safetensors`.
    pub fn load(files: &Files, runtime: &Runtime) -> Result<Self> {
        let config: DinoConfig = files.json("config.json")?;
        Self::new(&config, files.weights("")?, runtime).with_context(|| files.describe("config.json"))
    }

    /// From weights by transformers' names.
    pub fn new(config: &DinoConfig, weights: Weights, runtime: &Runtime) -> Result<Self> {
        config.check()?;
        let (d, size) = (config.hidden_size, config.patch_size());
        // What was only there for training, and a pooling that was never trained.
        let is_read = |name: &str| !name.ends_with("mask_token") && !name.starts_with("pooler.");
        let params = Params::stored(weights.only(is_read), &runtime.device, runtime.dtype, false);
        let embeddings = params.pp("embeddings");
        let patch = embeddings.pp("patch_embeddings.projection");
        let n_positions = (config.image_size / size).pow(2) + 1;
        let network = Self {
            kind: config.model_type,
            class: embeddings.get("cls_token", &[1, 1, d], Init::Normal(0.02))?,
            patch_weight: patch.get("weight", &[d, 3, size, size], Init::FanIn(3 * size * size))?,
            patch_bias: patch.get("bias", &[d], Init::Zeros)?,
            patch_size: size,
            positions: embeddings.get("position_embeddings", &[1, n_positions, d], Init::Normal(0.02))?.squeeze(0)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::new(&params.pp("encoder.layer").pp(i), config))
                .collect::<Result<_>>()?,
            layernorm: LayerNorm::new(&params.pp("layernorm"), d, config.eps())?,
        };
        params.finish()?;
        Ok(network)
    }

    /// Which family it is of.
    pub fn kind(&self) -> DinoKind {
        self.kind
    }

    /// The vector of the whole picture.
    ///
    /// # Shapes
    /// - pixels `[b, 3, h, w]` of any size, normalised → `[b, d]`, of any length
    pub fn forward(&self, pixels: &Tensor) -> CandleResult<Tensor> {
        let grid = grid_of(pixels, self.patch_size)?;
        if grid.0 == 0 || grid.1 == 0 {
            candle_core::bail!("DINO: pictures {:?} have no patch of {} pixels", pixels.dims(), self.patch_size);
        }
        let pixels = pixels.to_dtype(self.patch_weight.dtype())?;
        let patches = patches_from_pixels(&pixels, &self.patch_weight, Some(&self.patch_bias))?;
        let (first, rest) = (self.positions.narrow(0, 0, 1)?, self.positions.dim(0)? - 1);
        let positions = Tensor::cat(&[first, positions_for(grid, &self.positions.narrow(0, 1, rest)?)?], 0)?;
        let mut x = tokens_with_class(&patches, &self.class)?.broadcast_add(&positions)?;
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        self.layernorm.forward(&x.i((.., 0))?.contiguous()?)
    }
}

/// Self-attention and feed-forward, each behind a norm and added to its input.
struct Layer {
    norm1: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    dense: Linear,
    scale1: Option<Tensor>,
    norm2: LayerNorm,
    feed_forward: FeedForward,
    scale2: Option<Tensor>,
    heads: usize,
}

enum FeedForward {
    Plain(Linear, Linear),
    /// silu(a)·b of one layer's halves a and b.
    Gated(Linear, Linear),
}

impl Layer {
    fn new(params: &Params, config: &DinoConfig) -> Result<Self> {
        let (d, attention) = (config.hidden_size, params.pp("attention.attention"));
        let norm = |name: &str| LayerNorm::new(&params.pp(name), d, config.eps());
        let linear = |name: &str| match config.qkv_bias {
            true => Linear::new(&attention.pp(name), d, d),
            false => Linear::without_bias(&attention.pp(name), d, d),
        };
        let scale = |name: &str| params.pp(name).get("lambda1", &[d], Init::Ones);
        let is_first = config.model_type == DinoKind::Vit;
        let feed_forward = if is_first {
            let inner = config.intermediate_size.unwrap_or(3072);
            let outer = Linear::new(&params.pp("output.dense"), inner, d)?;
            FeedForward::Plain(Linear::new(&params.pp("intermediate.dense"), d, inner)?, outer)
        } else {
            let (mlp, inner) = (params.pp("mlp"), (d as f64 * config.mlp_ratio.unwrap_or(4.0)) as usize);
            if config.use_swiglu_ffn {
                // Two thirds, as both halves together then weigh what a plain layer does; in eights.
                let inner = (inner as f64 * 2.0 / 3.0) as usize;
                let inner = inner.next_multiple_of(8);
                let outer = Linear::new(&mlp.pp("weights_out"), inner, d)?;
                FeedForward::Gated(Linear::new(&mlp.pp("weights_in"), d, 2 * inner)?, outer)
            } else {
                FeedForward::Plain(Linear::new(&mlp.pp("fc1"), d, inner)?, Linear::new(&mlp.pp("fc2"), inner, d)?)
            }
        };
        Ok(Self {
            norm1: norm(if is_first { "layernorm_before" } else { "norm1" })?,
            query: linear("query")?,
            key: linear("key")?,
            value: linear("value")?,
            dense: Linear::new(&params.pp("attention.output.dense"), d, d)?,
            scale1: if is_first { None } else { Some(scale("layer_scale1")?) },
            norm2: norm(if is_first { "layernorm_after" } else { "norm2" })?,
            feed_forward,
            scale2: if is_first { None } else { Some(scale("layer_scale2")?) },
            heads: config.num_attention_heads,
        })
    }

    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let normed = self.norm1.forward(x)?;
        let (q, k, v) = (self.query.forward(&normed)?, self.key.forward(&normed)?, self.value.forward(&normed)?);
        let attended = self.dense.forward(&ops::attention(&q, &k, &v, self.heads, Mask::None)?)?;
        let x = ops::add(x, &scaled(attended, self.scale1.as_ref())?)?;
        let hidden = self.norm2.forward(&x)?;
        let hidden = match &self.feed_forward {
            FeedForward::Plain(into, outer) => outer.forward(&ops::gelu(&into.forward(&hidden)?)?)?,
            FeedForward::Gated(into, outer) => {
                let halves = into.forward(&hidden)?.chunk(2, D::Minus1)?;
                outer.forward(&ops::mul(&ops::silu(&halves[0].contiguous()?)?, &halves[1].contiguous()?)?)?
            }
        };
        ops::add(&x, &scaled(hidden, self.scale2.as_ref())?)
    }
}

fn scaled(x: Tensor, scale: Option<&Tensor>) -> CandleResult<Tensor> {
    scale.map_or(Ok(x.clone()), |scale| x.broadcast_mul(scale))
}

//! CLIP's picture encoder (transformers `CLIPModel`, `CLIPVisionModelWithProjection`): a picture to a vector whose angle to
//! others tells how alike they are. Forward only.

use anyhow::{Context as _, Result, ensure};
use candle_core::{IndexOp as _, Result as CandleResult, Tensor};
use serde::Deserialize;

use super::clip_layer::{ClipLayer, HiddenAct, Shape};
use super::files::Files;
use super::layers::{LayerNorm, Linear};
use super::params::{Init, Params};
use super::patches::{grid_of, patches_from_pixels, tokens_with_class};
use super::weights::Weights;
use crate::device::Runtime;
use crate::ops::Mask;

/// `vision_config` of a `CLIPModel`, or the whole `config.json` of a `CLIPVisionModelWithProjection`. What a file leaves out
/// has transformers' own default.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct ClipImageConfig {
    /// d: width of a token.
    pub hidden_size: usize,
    /// Width inside the feed-forward layers.
    pub intermediate_size: usize,
    /// p: width of the vector.
    pub projection_dim: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Heads of each attention.
    pub num_attention_heads: usize,
    /// Side of the pictures in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Inside the feed-forward layers.
    pub hidden_act: HiddenAct,
    /// Added to variances in the norms.
    pub layer_norm_eps: f64,
}

impl Default for ClipImageConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 224,
            patch_size: 32,
            hidden_act: HiddenAct::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

/// `config.json` of a whole `CLIPModel`.
#[derive(Deserialize)]
struct Whole {
    vision_config: Option<ClipImageConfig>,
    projection_dim: Option<usize>,
}

/// The network.
pub struct ClipImageEncoder {
    class_embedding: Tensor,
    patch_embedding: Tensor,
    position_embedding: Tensor,
    pre_layernorm: LayerNorm,
    layers: Vec<ClipLayer>,
    post_layernorm: LayerNorm,
    visual_projection: Linear,
    image_size: usize,
}

impl ClipImageEncoder {
    /// Reads a transformers folder: `config.json`, `model.safetensors`; the text's half of a `CLIPModel` is left alone.
    pub fn load(files: &Files, runtime: &Runtime) -> Result<Self> {
        let whole: Whole = files.json("config.json")?;
        let config = match (whole.vision_config, whole.projection_dim) {
            (Some(config), width) => ClipImageConfig { projection_dim: width.unwrap_or(512), ..config },
            (None, _) => files.json("config.json")?,
        };
        Self::new(&config, files.weights("")?, runtime).with_context(|| files.describe("config.json"))
    }

    /// From weights by transformers' names.
    pub fn new(config: &ClipImageConfig, weights: Weights, runtime: &Runtime) -> Result<Self> {
        let (d, heads, size) = (config.hidden_size, config.num_attention_heads, config.patch_size);
        ensure!(heads > 0 && d.is_multiple_of(heads), "num_attention_heads {heads} does not divide hidden_size {d}");
        ensure!(
            size > 0 && config.image_size.is_multiple_of(size),
            "patch_size {size} does not divide image_size {}",
            config.image_size
        );
        let is_read = |name: &str| name.starts_with("vision_model.") || name.starts_with("visual_projection.");
        let params = Params::stored(weights.only(is_read), &runtime.device, runtime.dtype, false);
        let root = params.pp("vision_model");
        let embeddings = root.pp("embeddings");
        let norm = |name: &str| LayerNorm::new(&root.pp(name), d, config.layer_norm_eps);
        let shape = Shape {
            width: d,
            inner: config.intermediate_size,
            heads,
            hidden_act: config.hidden_act,
            eps: config.layer_norm_eps,
        };
        let positions = (config.image_size / size).pow(2) + 1;
        let network = Self {
            class_embedding: embeddings.get("class_embedding", &[d], Init::Normal(0.02))?,
            patch_embedding: embeddings.get(
                "patch_embedding.weight",
                &[d, 3, size, size],
                Init::FanIn(3 * size * size),
            )?,
            position_embedding: embeddings.get("position_embedding.weight", &[positions, d], Init::Normal(0.02))?,
            // Spelt so in every checkpoint.
            pre_layernorm: norm("pre_layrnorm")?,
            layers: (0..config.num_hidden_layers)
                .map(|i| ClipLayer::new(&root.pp("encoder.layers").pp(i), shape))
                .collect::<Result<_>>()?,
            post_layernorm: norm("post_layernorm")?,
            visual_projection: Linear::without_bias(&params.pp("visual_projection"), d, config.projection_dim)?,
            image_size: config.image_size,
        };
        params.finish()?;
        Ok(network)
    }

    /// Side of the pictures in pixels.
    pub fn image_size(&self) -> usize {
        self.image_size
    }

    /// # Shapes
    /// - pixels `[b, 3, side, side]`, normalised → `[b, p]`, of any length
    pub fn forward(&self, pixels: &Tensor) -> CandleResult<Tensor> {
        let side = self.image_size;
        if grid_of(pixels, 1)? != (side, side) {
            candle_core::bail!("CLIP: pictures {:?}, the network takes {side}×{side} pixels", pixels.dims());
        }
        let patches =
            patches_from_pixels(&pixels.to_dtype(self.patch_embedding.dtype())?, &self.patch_embedding, None)?;
        let x = tokens_with_class(&patches, &self.class_embedding)?.broadcast_add(&self.position_embedding)?;
        let mut x = self.pre_layernorm.forward(&x)?; // [b, 1 + patches, d]
        for layer in &self.layers {
            x = layer.forward(&x, Mask::None)?;
        }
        self.visual_projection.forward(&self.post_layernorm.forward(&x.i((.., 0))?.contiguous()?)?)
    }
}

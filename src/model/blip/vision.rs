//! The vision transformer of BLIP and BLIP-2 (`BlipVisionModel`, `Blip2VisionModel`): patches and a class vector to features.

use anyhow::{Result, ensure};
use candle_core::{Result as CandleResult, Tensor};

use super::bert::activate;
use super::config::{Act, VisionConfig};
use crate::model::layers::{LayerNorm, Linear};
use crate::model::params::{Init, Params};
use crate::ops::{self, Mask};

/// Pictures to features.
pub struct VisionTower {
    class_embedding: Tensor,
    position_embedding: Tensor,
    /// The convolution of the patches, which do not overlap, as a matrix.
    patch_weight: Tensor,
    patch_bias: Tensor,
    layers: Vec<Layer>,
    post_layernorm: LayerNorm,
    side: usize,
    patch: usize,
}

impl VisionTower {
    /// From the parameters below `vision_model`.
    pub fn new(config: &VisionConfig, params: &Params) -> Result<Self> {
        let (d, patch, side) = (config.hidden_size, config.patch_size, config.image_size);
        ensure!(
            patch > 0 && side.is_multiple_of(patch),
            "vision_config: image_size {side} is no multiple of patch_size {patch}"
        );
        let embeddings = params.pp("embeddings");
        let n_positions = (side / patch).pow(2) + 1;
        let kernel =
            embeddings.pp("patch_embedding").get("weight", &[d, 3, patch, patch], Init::FanIn(3 * patch * patch))?;
        Ok(Self {
            class_embedding: embeddings.get("class_embedding", &[1, 1, d], Init::Normal(0.02))?,
            position_embedding: embeddings.get("position_embedding", &[1, n_positions, d], Init::Normal(0.02))?,
            patch_weight: kernel.reshape((d, 3 * patch * patch))?, // [d, 3·p·p]
            patch_bias: embeddings.pp("patch_embedding").get("bias", &[d], Init::Zeros)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::new(&params.pp("encoder.layers").pp(i), config))
                .collect::<Result<_>>()?,
            post_layernorm: LayerNorm::new(&params.pp("post_layernorm"), d, config.layer_norm_eps)?,
            side,
            patch,
        })
    }

    /// # Shapes
    /// - normalised pixels `[b, 3, side, side]` → `[b, (side/p)² + 1, d]`
    pub fn forward(&self, pixels: &Tensor) -> CandleResult<Tensor> {
        let (b, _, height, width) = pixels.dims4()?;
        if (height, width) != (self.side, self.side) {
            candle_core::bail!("a picture of {width}×{height} for a network of {0}×{0}", self.side);
        }
        let (p, n) = (self.patch, self.side / self.patch);
        let patches = pixels.reshape(&[b, 3, n, p, n, p][..])?.permute(vec![0, 2, 4, 1, 3, 5])?; // [b, n, n, 3, p, p]
        let patches = patches.contiguous()?.reshape((b, n * n, 3 * p * p))?; // [b, n·n, 3·p·p]
        let patches = ops::linear(&patches, &self.patch_weight, Some(&self.patch_bias))?; // [b, n·n, d]
        let class = self.class_embedding.repeat((b, 1, 1))?; // [b, 1, d]
        let mut hidden = Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.position_embedding)?;
        for layer in &self.layers {
            hidden = layer.forward(&hidden)?;
        }
        self.post_layernorm.forward(&hidden)
    }
}

struct Layer {
    layer_norm1: LayerNorm,
    qkv: Linear,
    projection: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
    act: Act,
}

impl Layer {
    fn new(params: &Params, config: &VisionConfig) -> Result<Self> {
        let (d, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let qkv = params.pp("self_attn.qkv");
        Ok(Self {
            layer_norm1: LayerNorm::new(&params.pp("layer_norm1"), d, eps)?,
            qkv: if config.qkv_bias { Linear::new(&qkv, d, 3 * d)? } else { Linear::without_bias(&qkv, d, 3 * d)? },
            projection: Linear::new(&params.pp("self_attn.projection"), d, d)?,
            layer_norm2: LayerNorm::new(&params.pp("layer_norm2"), d, eps)?,
            fc1: Linear::new(&params.pp("mlp.fc1"), d, inner)?,
            fc2: Linear::new(&params.pp("mlp.fc2"), inner, d)?,
            heads: config.num_attention_heads,
            act: config.hidden_act,
        })
    }

    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let d = x.dim(2)?;
        let qkv = self.qkv.forward(&self.layer_norm1.forward(x)?)?; // [b, l, 3·d]
        let part = |index: usize| qkv.narrow(2, index * d, d)?.contiguous();
        let attended = ops::attention(&part(0)?, &part(1)?, &part(2)?, self.heads, Mask::None)?;
        let x = (x + self.projection.forward(&attended)?)?;
        let hidden = activate(self.act, &self.fc1.forward(&self.layer_norm2.forward(&x)?)?)?;
        &x + self.fc2.forward(&hidden)?
    }
}

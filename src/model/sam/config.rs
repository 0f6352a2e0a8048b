//! `config.json` of a SAM checkpoint (transformers `SamConfig`). What a file leaves out has transformers' own default.

use anyhow::{Result, ensure};
use serde::Deserialize;

use crate::model::grounding_dino::Activation;

/// The whole network.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct SamConfig {
    /// The picture's encoder.
    pub vision_config: SamVisionConfig,
    /// The prompt's.
    pub prompt_encoder_config: SamPromptConfig,
    /// What makes masks of both.
    pub mask_decoder_config: SamMaskConfig,
}

impl SamConfig {
    /// Refuses what this network is not built for.
    pub fn check(&self) -> Result<()> {
        let (vision, prompt, masks) = (&self.vision_config, &self.prompt_encoder_config, &self.mask_decoder_config);
        let divides = |what: &str, width: usize, heads: usize| {
            ensure!(heads > 0 && width.is_multiple_of(heads), "{what}: {heads} heads do not divide a width of {width}");
            Ok(())
        };
        divides("vision_config.num_attention_heads", vision.hidden_size, vision.num_attention_heads)?;
        let narrow = masks.hidden_size / masks.attention_downsample_rate.max(1);
        divides("mask_decoder_config.num_attention_heads", narrow, masks.num_attention_heads)?;
        ensure!(
            vision.patch_size > 0 && vision.image_size.is_multiple_of(vision.patch_size),
            "vision_config: patch_size {} does not divide image_size {}",
            vision.patch_size,
            vision.image_size
        );
        ensure!(
            prompt.hidden_size == masks.hidden_size && vision.output_channels == masks.hidden_size,
            "picture, prompt and masks have widths {}, {} and {}, which must be one",
            vision.output_channels,
            prompt.hidden_size,
            masks.hidden_size
        );
        ensure!(
            2 * vision.num_pos_feats == masks.hidden_size && masks.hidden_size.is_multiple_of(8),
            "vision_config.num_pos_feats {} is not half of the width {}, or that is no multiple of 8",
            vision.num_pos_feats,
            masks.hidden_size
        );
        ensure!(vision.use_abs_pos && vision.use_rel_pos, "vision_config: positions switched off are not supported");
        ensure!(
            masks.num_multimask_outputs > 0 && masks.iou_head_depth > 1,
            "mask_decoder_config: no masks to choose from"
        );
        Ok(())
    }
}

/// The picture's encoder: a vision transformer whose layers attend within windows, some of them everywhere.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct SamVisionConfig {
    /// Width of a patch's token.
    pub hidden_size: usize,
    /// Width of what comes out.
    pub output_channels: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Heads of each attention.
    pub num_attention_heads: usize,
    /// Side of the square that pictures are fitted into, in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Inside the feed-forward layers.
    pub hidden_act: Activation,
    /// Added to variances in the norms.
    pub layer_norm_eps: f64,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Width inside the feed-forward layers, in `hidden_size`.
    pub mlp_ratio: f64,
    /// The same in itself, where a file has it.
    pub mlp_dim: Option<usize>,
    /// Whether each patch has a vector for its place.
    pub use_abs_pos: bool,
    /// Whether attention knows distances.
    pub use_rel_pos: bool,
    /// Patches a side that attend to each other.
    pub window_size: usize,
    /// The layers that attend everywhere.
    pub global_attn_indexes: Vec<usize>,
    /// Frequencies of the places of points, half the width.
    pub num_pos_feats: usize,
}

impl Default for SamVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            output_channels: 256,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 1024,
            patch_size: 16,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-6,
            qkv_bias: true,
            mlp_ratio: 4.0,
            mlp_dim: None,
            use_abs_pos: true,
            use_rel_pos: true,
            window_size: 14,
            global_attn_indexes: vec![2, 5, 8, 11],
            num_pos_feats: 128,
        }
    }
}

impl SamVisionConfig {
    /// Patches a side.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Width inside the feed-forward layers.
    pub fn inner(&self) -> usize {
        self.mlp_dim.unwrap_or((self.hidden_size as f64 * self.mlp_ratio) as usize)
    }
}

/// The prompt's encoder.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct SamPromptConfig {
    /// Width of a token.
    pub hidden_size: usize,
    /// Kinds of points: out, in, upper left and lower right corner.
    pub num_point_embeddings: usize,
}

impl Default for SamPromptConfig {
    fn default() -> Self {
        Self { hidden_size: 256, num_point_embeddings: 4 }
    }
}

/// What makes masks.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct SamMaskConfig {
    /// Width of a token.
    pub hidden_size: usize,
    /// Inside the feed-forward layers.
    pub hidden_act: Activation,
    /// Width inside them.
    pub mlp_dim: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Heads of each attention.
    pub num_attention_heads: usize,
    /// How much narrower attention between picture and tokens is.
    pub attention_downsample_rate: usize,
    /// Masks to choose from.
    pub num_multimask_outputs: usize,
    /// Layers of the network that says how good a mask is.
    pub iou_head_depth: usize,
    /// Width inside it.
    pub iou_head_hidden_dim: usize,
    /// Added to variances in the norms.
    pub layer_norm_eps: f64,
}

impl Default for SamMaskConfig {
    fn default() -> Self {
        Self {
            hidden_size: 256,
            hidden_act: Activation::Relu,
            mlp_dim: 2048,
            num_hidden_layers: 2,
            num_attention_heads: 8,
            attention_downsample_rate: 2,
            num_multimask_outputs: 3,
            iou_head_depth: 3,
            iou_head_hidden_dim: 256,
            layer_norm_eps: 1e-6,
        }
    }
}

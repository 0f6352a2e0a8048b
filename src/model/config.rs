//! `unet/config.json` and `vae/config.json` as diffusers writes them; fields that do not shape the network are ignored.
#![allow(missing_docs)] // The fields are diffusers' own and documented there; what is surprising is said here.

use serde::{Deserialize, Serialize};

/// One number for all levels, or one for each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PerLevel {
    All(usize),
    Each(Vec<usize>),
}

impl PerLevel {
    /// The number of level `level`, if there is one.
    pub fn at(&self, level: usize) -> Option<usize> {
        match self {
            Self::All(value) => Some(*value),
            Self::Each(values) => values.get(level).copied(),
        }
    }
}

/// diffusers `UNet2DConditionModel`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnetConfig {
    #[serde(rename = "_class_name", default = "unet_class")]
    pub class_name: String,
    /// Height and width of the latents that it was made for.
    #[serde(default)]
    pub sample_size: Option<usize>,
    pub in_channels: usize,
    pub out_channels: usize,
    pub down_block_types: Vec<String>,
    pub up_block_types: Vec<String>,
    pub block_out_channels: Vec<usize>,
    #[serde(default = "two")]
    pub layers_per_block: usize,
    /// In SD1.x files, in spite of its name, the *number of heads*.
    #[serde(default = "eight")]
    pub attention_head_dim: PerLevel,
    /// Where present, the number of heads; it then wins over `attention_head_dim`.
    #[serde(default)]
    pub num_attention_heads: Option<PerLevel>,
    #[serde(default = "one_layer")]
    pub transformer_layers_per_block: PerLevel,
    #[serde(default = "context_width")]
    pub cross_attention_dim: usize,
    #[serde(default = "thirty_two")]
    pub norm_num_groups: usize,
    #[serde(default = "unet_eps")]
    pub norm_eps: f64,
    #[serde(default)]
    pub use_linear_projection: bool,
    #[serde(default = "yes")]
    pub flip_sin_to_cos: bool,
    #[serde(default)]
    pub freq_shift: f64,
}

impl UnetConfig {
    /// c: channels of the latents.
    pub fn latent_channels(&self) -> usize {
        self.out_channels
    }

    /// Whether the input is `noisy(c), mask(1), reference(c)`, the joint model's.
    pub fn is_joint(&self) -> bool {
        self.in_channels == 2 * self.out_channels + 1
    }
}

/// diffusers `AutoencoderKL`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VaeConfig {
    #[serde(rename = "_class_name", default = "vae_class")]
    pub class_name: String,
    /// Height and width of the pictures that it was made for.
    #[serde(default)]
    pub sample_size: Option<usize>,
    #[serde(default = "three")]
    pub in_channels: usize,
    #[serde(default = "three")]
    pub out_channels: usize,
    pub down_block_types: Vec<String>,
    pub up_block_types: Vec<String>,
    pub block_out_channels: Vec<usize>,
    #[serde(default = "one")]
    pub layers_per_block: usize,
    #[serde(default = "four")]
    pub latent_channels: usize,
    #[serde(default = "thirty_two")]
    pub norm_num_groups: usize,
    /// The U-Net sees mean·scaling_factor, of about unit variance.
    #[serde(default = "scaling_factor")]
    pub scaling_factor: f64,
}

impl VaeConfig {
    /// Pixels a latent spans in each direction.
    pub fn downscale(&self) -> usize {
        1 << (self.block_out_channels.len().saturating_sub(1))
    }
}

fn unet_class() -> String {
    "UNet2DConditionModel".into()
}
fn vae_class() -> String {
    "AutoencoderKL".into()
}
fn one() -> usize {
    1
}
fn two() -> usize {
    2
}
fn three() -> usize {
    3
}
fn four() -> usize {
    4
}
fn thirty_two() -> usize {
    32
}
fn eight() -> PerLevel {
    PerLevel::All(8)
}
fn one_layer() -> PerLevel {
    PerLevel::All(1)
}
fn context_width() -> usize {
    1280
}
fn unet_eps() -> f64 {
    1e-5
}
fn scaling_factor() -> f64 {
    0.18215
}
fn yes() -> bool {
    true
}

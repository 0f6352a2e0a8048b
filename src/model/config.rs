//! `unet/config.json` and `vae/config.json` as diffusers writes them; fields that do not shape the network are ignored.
#![allow(missing_docs)] // The fields are diffusers' own and documented there; what is surprising is said here.

use serde::{Deserialize, Serialize};

/// One number for all levels, or one for each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "must be one number for all levels, or a list of one number a level")]
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
    /// Of the levels going up, first the deepest; None: as going down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reverse_transformer_layers_per_block: Option<PerLevel>,
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
    /// `text_time` in Stable Diffusion XL: pooled text and sizes are added to the time embedding. None: nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addition_embed_type: Option<String>,
    /// Width of the sinusoids of each of these sizes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addition_time_embed_dim: Option<usize>,
    /// Width of pooled text and sinusoids together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projection_class_embeddings_input_dim: Option<usize>,
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

    /// Whether it is told pooled text and sizes besides the text (`AddedConditions`), as Stable Diffusion XL is.
    pub fn takes_added_conditions(&self) -> bool {
        self.addition_embed_type.is_some()
    }

    /// p: width of the pooled text beside `n_sizes` sizes; None for a network that is told neither, or not so many.
    pub fn pooled_width(&self, n_sizes: usize) -> Option<usize> {
        self.projection_class_embeddings_input_dim?.checked_sub(n_sizes * self.addition_time_embed_dim?)
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
    /// Whether f16 is too narrow for its activations, as it is for Stable Diffusion XL's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force_upcast: Option<bool>,
    /// Of each latent channel. No Stable Diffusion has it; where it is there the latents' scale is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latents_mean: Option<Vec<f64>>,
    /// Beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latents_std: Option<Vec<f64>>,
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

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use serde_json::{Value, json};

    use super::*;
    use crate::model::params::Params;
    use crate::model::{JointUnet, Vae};

    fn unet(layers: Value, reverse: Value) -> serde_json::Result<UnetConfig> {
        serde_json::from_value(json!({
            "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 8], "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": 2, "cross_attention_dim": 8, "norm_num_groups": 4,
            "transformer_layers_per_block": layers, "reverse_transformer_layers_per_block": reverse,
        }))
    }

    fn random() -> Params {
        Params::random(1, &Device::Cpu, DType::F32)
    }

    /// diffusers `UNet2DConditionModel.__init__`: up block i has the i-th of the list, which else is the other reversed.
    #[test]
    fn the_depths_going_up_are_those_that_the_config_says() {
        let depths = |reverse: Value| -> Vec<usize> {
            let names = JointUnet::new(&unet(json!([1, 2]), reverse).unwrap(), random()).unwrap().1;
            let has = |block: &str, layer: usize| {
                names.contains_key(&format!("{block}.attentions.0.transformer_blocks.{layer}.norm1.weight"))
            };
            let blocks = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"];
            blocks.map(|block| (0..).take_while(|&layer| has(block, layer)).count()).into()
        };
        assert_eq!(depths(Value::Null), [1, 2, 2, 2, 1]);
        assert_eq!(depths(json!([1, 3])), [1, 2, 2, 1, 3]);
        let error = JointUnet::new(&unet(json!([1, 2]), json!([1])).unwrap(), random()).err().unwrap().to_string();
        assert!(error.contains("reverse_transformer_layers_per_block has too few entries"), "{error}");
        // One number a layer, as distilled networks have it.
        let error = unet(json!([1, [2, 1]]), Value::Null).unwrap_err().to_string();
        assert!(error.contains("must be one number for all levels, or a list of one number a level"), "{error}");
    }

    #[test]
    fn an_autoencoder_whose_latents_are_scaled_by_channel_is_refused_by_the_field() {
        for field in ["latents_mean", "latents_std"] {
            let mut config = json!({
                "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
                "block_out_channels": [4], "norm_num_groups": 2,
            });
            let vae = |config: &Value| Vae::new(&serde_json::from_value(config.clone()).unwrap(), random());
            assert!(vae(&config).is_ok());
            config[field] = json!([0.1, 0.2, 0.3, 0.4]);
            let error = vae(&config).err().unwrap().to_string();
            assert!(error.contains(&format!("{field} is not supported")), "{error}");
        }
    }
}

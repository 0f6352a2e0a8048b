//! What the networks in a single file are, from the names and shapes of their tensors: such a file brings no config. Heads,
//! groups and norms leave no trace in a shape, so these are the ones of every public Stable Diffusion.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{CLIP, OPEN_CLIP, UNET, VAE};
use crate::model::config::{UnetConfig, VaeConfig};
use crate::model::text::TextConfig;

/// Channels a head of Stable Diffusion 2's attention has, and of both CLIPs'.
const HEAD_CHANNELS: usize = 64;
/// Heads of Stable Diffusion 1's attention, at every width.
const HEADS_SD1: usize = 8;
/// Layers of OpenCLIP ViT-H that Stable Diffusion 2 uses: all but the last.
const LAYERS_SD2: usize = 23;

/// The shapes of a file's tensors by name.
pub struct Shapes(BTreeMap<String, Vec<usize>>);

/// Which text encoder a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextKind {
    /// OpenAI's CLIP ViT-L: Stable Diffusion 1.
    Clip,
    /// OpenCLIP ViT-H: Stable Diffusion 2.
    OpenClip,
}

impl TextKind {
    /// By the names of a file's tensors; None where there is no text encoder.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a String>) -> Option<Self> {
        names.into_iter().find_map(|name| match name {
            name if name.starts_with(OPEN_CLIP) => Some(Self::OpenClip),
            name if name.starts_with(CLIP) => Some(Self::Clip),
            _ => None,
        })
    }

    /// The kind that a config describes: transformers writes the first CLIP's activation for Stable Diffusion 1 alone.
    pub fn of_config(config: &TextConfig) -> Self {
        match config.hidden_act {
            crate::model::text::HiddenAct::QuickGelu => Self::Clip,
            crate::model::text::HiddenAct::Gelu => Self::OpenClip,
        }
    }
}

impl FromIterator<(String, Vec<usize>)> for Shapes {
    fn from_iter<I: IntoIterator<Item = (String, Vec<usize>)>>(shapes: I) -> Self {
        Self(shapes.into_iter().collect())
    }
}

impl Shapes {
    /// Whether any name starts so.
    pub fn has(&self, prefix: &str) -> bool {
        self.0.range(prefix.to_owned()..).next().is_some_and(|(name, _)| name.starts_with(prefix))
    }

    /// One dimension of a tensor that must be there.
    fn size(&self, name: &str, dimension: usize) -> Result<usize> {
        let shape = self.0.get(name).with_context(|| format!("tensor {name} is missing"))?;
        shape.get(dimension).copied().with_context(|| format!("tensor {name} has shape {shape:?}"))
    }

    /// How many numbers follow `prefix` without a gap from 0, each with some tensor below it.
    fn count(&self, prefix: &str) -> usize {
        (0..).take_while(|index| self.has(&format!("{prefix}{index}."))).count()
    }

    /// The U-Net.
    pub fn unet(&self) -> Result<UnetConfig> {
        let n_inputs = self.count(&format!("{UNET}input_blocks."));
        let is_resample = |block: &usize| self.has(&format!("{UNET}input_blocks.{block}.0.op."));
        let resamples: Vec<usize> = (0..n_inputs).filter(is_resample).collect();
        let stride = resamples.first().copied().unwrap_or(n_inputs);
        let levels = resamples.len() + 1;
        let is_regular = stride > 1
            && n_inputs == levels * stride
            && self.count(&format!("{UNET}output_blocks.")) == n_inputs
            && resamples.iter().enumerate().all(|(i, &block)| block == (i + 1) * stride);
        ensure!(is_regular, "its U-Net is laid out in another way than Stable Diffusion's");

        let first = |level: usize| format!("{UNET}input_blocks.{}", 1 + level * stride);
        let attention = |block: String| format!("{block}.1.transformer_blocks.");
        let width = |level| self.size(&format!("{}.0.out_layers.3.weight", first(level)), 0);
        let widths = (0..levels).map(width).collect::<Result<Vec<_>>>()?;
        let depths: Vec<usize> = (0..levels).map(|level| self.count(&attention(first(level)))).collect();
        let up = |index: usize| self.has(&attention(format!("{UNET}output_blocks.{}", index * stride)));
        let kinds = |with: &str, without: &str, has: &dyn Fn(usize) -> bool| -> Vec<String> {
            (0..levels).map(|i| if has(i) { with.into() } else { without.into() }).collect()
        };
        let middle = format!("{UNET}middle_block.1.");
        let context_width = self.size(&format!("{middle}transformer_blocks.0.attn2.to_k.weight"), 1)?;
        let is_linear = self.0.get(&format!("{middle}proj_in.weight")).is_some_and(|shape| shape.len() == 2);
        let heads = match is_linear {
            true => json!(widths.iter().map(|width| width / HEAD_CHANNELS).collect::<Vec<_>>()),
            false => json!(HEADS_SD1),
        };
        let config = json!({
            "sample_size": 64,
            "in_channels": self.size(&format!("{UNET}input_blocks.0.0.weight"), 1)?,
            "out_channels": self.size(&format!("{UNET}out.2.weight"), 0)?,
            "down_block_types": kinds("CrossAttnDownBlock2D", "DownBlock2D", &|level| depths[level] > 0),
            "up_block_types": kinds("CrossAttnUpBlock2D", "UpBlock2D", &up),
            "block_out_channels": widths,
            "layers_per_block": stride - 1,
            "attention_head_dim": heads,
            "transformer_layers_per_block": match depths.iter().all(|&depth| depth <= 1) {
                true => json!(1),
                // A level without attention has no depth; any will do.
                false => json!(depths.iter().map(|&depth| depth.max(1)).collect::<Vec<_>>()),
            },
            "cross_attention_dim": context_width,
            "norm_num_groups": 32,
            "use_linear_projection": is_linear,
        });
        serde_json::from_value(config).context("the U-Net's config")
    }

    /// The autoencoder.
    pub fn vae(&self) -> Result<VaeConfig> {
        let levels = self.count(&format!("{VAE}encoder.down."));
        ensure!(levels > 0, "its autoencoder is laid out in another way than Stable Diffusion's");
        let width = |level| self.size(&format!("{VAE}encoder.down.{level}.block.0.conv1.weight"), 0);
        let config = json!({
            "sample_size": 512,
            "in_channels": self.size(&format!("{VAE}encoder.conv_in.weight"), 1)?,
            "out_channels": self.size(&format!("{VAE}decoder.conv_out.weight"), 0)?,
            "down_block_types": vec!["DownEncoderBlock2D"; levels],
            "up_block_types": vec!["UpDecoderBlock2D"; levels],
            "block_out_channels": (0..levels).map(width).collect::<Result<Vec<_>>>()?,
            "layers_per_block": self.count(&format!("{VAE}encoder.down.0.block.")),
            "latent_channels": self.size(&format!("{VAE}post_quant_conv.weight"), 0)?,
            "norm_num_groups": 32,
            "scaling_factor": 0.18215,
        });
        serde_json::from_value(config).context("the VAE's config")
    }

    /// The text encoder.
    pub fn text(&self) -> Result<TextConfig> {
        let kind = TextKind::of(self.0.keys()).context("it holds no text encoder")?;
        let config = match kind {
            TextKind::Clip => {
                let root = match self.has(&format!("{CLIP}text_model.")) {
                    true => format!("{CLIP}text_model."),
                    false => CLIP.to_owned(),
                };
                let tokens = format!("{root}embeddings.token_embedding.weight");
                let width = self.size(&tokens, 1)?;
                json!({
                    "vocab_size": self.size(&tokens, 0)?,
                    "hidden_size": width,
                    "intermediate_size": self.size(&format!("{root}encoder.layers.0.mlp.fc1.weight"), 0)?,
                    "num_hidden_layers": self.count(&format!("{root}encoder.layers.")),
                    "num_attention_heads": width / HEAD_CHANNELS,
                    "max_position_embeddings": self.size(&format!("{root}embeddings.position_embedding.weight"), 0)?,
                    "hidden_act": "quick_gelu",
                })
            }
            TextKind::OpenClip => {
                let tokens = format!("{OPEN_CLIP}token_embedding.weight");
                let width = self.size(&tokens, 1)?;
                let n_blocks = self.count(&format!("{OPEN_CLIP}transformer.resblocks."));
                // The context is the output of the last layer but one. Some converters write the file without the last.
                let n_layers = if n_blocks == LAYERS_SD2 { n_blocks } else { n_blocks.saturating_sub(1) };
                let inner = format!("{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight");
                json!({
                    "vocab_size": self.size(&tokens, 0)?,
                    "hidden_size": width,
                    "intermediate_size": self.size(&inner, 0)?,
                    "num_hidden_layers": n_layers,
                    "num_attention_heads": width / HEAD_CHANNELS,
                    "max_position_embeddings": self.size(&format!("{OPEN_CLIP}positional_embedding"), 0)?,
                    "hidden_act": "gelu",
                })
            }
        };
        serde_json::from_value(config).context("the text encoder's config")
    }
}

/// `scheduler/scheduler_config.json` of Stable Diffusion for this prediction type, as diffusers spells it.
pub fn scheduler(prediction_type: &str) -> Value {
    json!({
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": false,
        "clip_sample": false,
    })
}

/// `tokenizer/tokenizer_config.json`: the files of CLIP's tokenizer are elsewhere, how a model pads is the model's own.
/// OpenCLIP fills up with 0, the token of `!`.
pub fn tokenizer_config(kind: TextKind, length: usize) -> Value {
    json!({
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": match kind {
            TextKind::Clip => "<|endoftext|>",
            TextKind::OpenClip => "!",
        },
    })
}

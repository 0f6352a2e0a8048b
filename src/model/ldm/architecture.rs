//! What the networks in a single file are, from the names and shapes of their tensors: such a file brings no config. Heads,
//! groups and norms leave no trace in a shape, so these are the ones of every public Stable Diffusion.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{TextKind, UNET, VAE};
use crate::model::conditions::N_SIZES;
use crate::model::config::{UnetConfig, VaeConfig};
use crate::model::text::TextConfig;

/// Channels a head of Stable Diffusion 2's attention has, and of both CLIPs'.
const HEAD_CHANNELS: usize = 64;
/// Heads of Stable Diffusion 1's attention, at every width.
const HEADS_SD1: usize = 8;
/// Layers of OpenCLIP ViT-H that Stable Diffusion 2 uses: all but the last.
const LAYERS_SD2: usize = 23;
/// Width of the text that Stable Diffusion XL's public models pool, and of that and six sizes together.
const POOLED_XL: (usize, usize) = (1280, 2816);

/// The shapes of a file's tensors by name.
pub struct Shapes(BTreeMap<String, Vec<usize>>);

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

    /// Whether the file is of Stable Diffusion XL: two text encoders, or a U-Net that is told pooled text and sizes.
    pub fn is_xl(&self) -> bool {
        self.has(TextKind::XlOpenClip.prefix()) || self.has(&format!("{UNET}label_emb.0.0."))
    }

    /// Transformer layers behind each residual block of a level, which are as many all over Stable Diffusion.
    fn depth(&self, blocks: impl Iterator<Item = String>) -> Result<usize> {
        let depths: Vec<usize> = blocks.map(|block| self.count(&format!("{block}.1.transformer_blocks."))).collect();
        let first = depths.first().copied().unwrap_or(0);
        ensure!(
            depths.iter().all(|&depth| depth == first),
            "the blocks of a level of its U-Net have unlike numbers of transformer layers ({depths:?}), which jedi does not \
             build"
        );
        Ok(first)
    }

    /// Width of pooled text and sinusoids together and of the sinusoids of one size, for a U-Net that is told them.
    fn added_widths(&self) -> Result<Option<(usize, usize)>> {
        let name = format!("{UNET}label_emb.0.0.weight");
        if !self.has(&name) {
            return Ok(None);
        }
        let inputs = self.size(&name, 1)?;
        let projection = format!("{}text_projection", TextKind::XlOpenClip.prefix());
        let pooled = match self.has(&projection) {
            true => self.size(&projection, 1)?,
            false if inputs == POOLED_XL.1 => POOLED_XL.0,
            false => bail!("its U-Net is told something of {inputs} numbers (label_emb) that jedi does not know"),
        };
        let sizes = inputs.checked_sub(pooled).filter(|sizes| *sizes > 0 && sizes.is_multiple_of(N_SIZES));
        let sizes = sizes.with_context(|| {
            format!("its U-Net is told {inputs} numbers (label_emb), which are not pooled text of {pooled} and {N_SIZES} sizes")
        })?;
        Ok(Some((inputs, sizes / N_SIZES)))
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

        let down = |level: usize, layer: usize| format!("{UNET}input_blocks.{}", 1 + level * stride + layer);
        let up = |index: usize, layer: usize| format!("{UNET}output_blocks.{}", index * stride + layer);
        let width = |level| self.size(&format!("{}.0.out_layers.3.weight", down(level, 0)), 0);
        let widths = (0..levels).map(width).collect::<Result<Vec<_>>>()?;
        let downs = (0..levels).map(|level| self.depth((0..stride - 1).map(|layer| down(level, layer))));
        let downs = downs.collect::<Result<Vec<_>>>()?;
        let ups = (0..levels).map(|index| self.depth((0..stride).map(|layer| up(index, layer))));
        let ups = ups.collect::<Result<Vec<_>>>()?;
        let kinds = |with: &str, without: &str, depths: &[usize]| -> Vec<String> {
            depths.iter().map(|&depth| if depth > 0 { with.into() } else { without.into() }).collect()
        };
        let middle = format!("{UNET}middle_block.1.");
        let context_width = self.size(&format!("{middle}transformer_blocks.0.attn2.to_k.weight"), 1)?;
        let is_linear = self.0.get(&format!("{middle}proj_in.weight")).is_some_and(|shape| shape.len() == 2);
        let heads = match is_linear {
            true => json!(widths.iter().map(|width| width / HEAD_CHANNELS).collect::<Vec<_>>()),
            false => json!(HEADS_SD1),
        };
        // The middle goes by the number of the last level, which may have no transformer of its own.
        let middle_depth = self.count(&format!("{middle}transformer_blocks."));
        let mut depths = downs.clone();
        ensure!(
            [0, middle_depth].contains(&depths[levels - 1]),
            "the middle of its U-Net has {middle_depth} transformer layers and the level in front of it {}, which jedi does \
             not build",
            depths[levels - 1]
        );
        depths[levels - 1] = middle_depth;
        // A level without attention has no depth; any will do.
        depths.iter_mut().for_each(|depth| *depth = (*depth).max(1));
        let is_mirrored = ups.iter().zip(depths.iter().rev()).all(|(&up, &down)| up == 0 || up == down);
        let mut config = json!({
            "sample_size": if self.is_xl() { 128 } else { 64 },
            "in_channels": self.size(&format!("{UNET}input_blocks.0.0.weight"), 1)?,
            "out_channels": self.size(&format!("{UNET}out.2.weight"), 0)?,
            "down_block_types": kinds("CrossAttnDownBlock2D", "DownBlock2D", &downs),
            "up_block_types": kinds("CrossAttnUpBlock2D", "UpBlock2D", &ups),
            "block_out_channels": widths,
            "layers_per_block": stride - 1,
            "attention_head_dim": heads,
            "transformer_layers_per_block": match depths.iter().all(|&depth| depth == 1) {
                true => json!(1),
                false => json!(depths),
            },
            "cross_attention_dim": context_width,
            "norm_num_groups": 32,
            "use_linear_projection": is_linear,
        });
        if !is_mirrored {
            config["reverse_transformer_layers_per_block"] = json!(ups.iter().map(|&up| up.max(1)).collect::<Vec<_>>());
        }
        if let Some((inputs, size_width)) = self.added_widths()? {
            config["addition_embed_type"] = json!("text_time");
            config["addition_time_embed_dim"] = json!(size_width);
            config["projection_class_embeddings_input_dim"] = json!(inputs);
        }
        serde_json::from_value(config).context("the U-Net's config")
    }

    /// The autoencoder.
    pub fn vae(&self) -> Result<VaeConfig> {
        let levels = self.count(&format!("{VAE}encoder.down."));
        ensure!(levels > 0, "its autoencoder is laid out in another way than Stable Diffusion's");
        let width = |level| self.size(&format!("{VAE}encoder.down.{level}.block.0.conv1.weight"), 0);
        let mut config = json!({
            "sample_size": if self.is_xl() { 1024 } else { 512 },
            "in_channels": self.size(&format!("{VAE}encoder.conv_in.weight"), 1)?,
            "out_channels": self.size(&format!("{VAE}decoder.conv_out.weight"), 0)?,
            "down_block_types": vec!["DownEncoderBlock2D"; levels],
            "up_block_types": vec!["UpDecoderBlock2D"; levels],
            "block_out_channels": (0..levels).map(width).collect::<Result<Vec<_>>>()?,
            "layers_per_block": self.count(&format!("{VAE}encoder.down.0.block.")),
            "latent_channels": self.size(&format!("{VAE}post_quant_conv.weight"), 0)?,
            "norm_num_groups": 32,
            "scaling_factor": if self.is_xl() { 0.13025 } else { 0.18215 },
        });
        if self.is_xl() {
            config["force_upcast"] = json!(true);
        }
        serde_json::from_value(config).context("the VAE's config")
    }

    /// A text encoder.
    pub fn text(&self, kind: TextKind) -> Result<TextConfig> {
        let prefix = kind.prefix();
        let mut config = if kind.is_open_clip() {
            let tokens = format!("{prefix}token_embedding.weight");
            let width = self.size(&tokens, 1)?;
            let n_blocks = self.count(&format!("{prefix}transformer.resblocks."));
            // The context of Stable Diffusion 2 is the output of the last layer but one. Some converters write the file
            // without the last. Of XL's the pooled text is the last layer's.
            let has_all = kind == TextKind::XlOpenClip || n_blocks == LAYERS_SD2;
            json!({
                "vocab_size": self.size(&tokens, 0)?,
                "hidden_size": width,
                "intermediate_size": self.size(&format!("{prefix}transformer.resblocks.0.mlp.c_fc.weight"), 0)?,
                "num_hidden_layers": if has_all { n_blocks } else { n_blocks.saturating_sub(1) },
                "num_attention_heads": width / HEAD_CHANNELS,
                "max_position_embeddings": self.size(&format!("{prefix}positional_embedding"), 0)?,
                "hidden_act": "gelu",
            })
        } else {
            let root = match self.has(&format!("{prefix}text_model.")) {
                true => format!("{prefix}text_model."),
                false => prefix.to_owned(),
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
        };
        if kind == TextKind::XlOpenClip {
            config["architectures"] = json!(["CLIPTextModelWithProjection"]);
            config["projection_dim"] = json!(self.size(&format!("{prefix}text_projection"), 1)?);
            // As the public config says it: pooled at the highest token, as OpenCLIP does.
            config["eos_token_id"] = json!(2);
        }
        serde_json::from_value(config).context("the text encoder's config")
    }
}

/// `scheduler/scheduler_config.json` of Stable Diffusion for this prediction type, as diffusers spells it. `ends_in_noise`: of
/// a network trained with pure noise at the last timestep, which has to be sampled from there.
pub fn scheduler(prediction_type: &str, ends_in_noise: bool) -> Value {
    let mut config = json!({
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
    });
    if ends_in_noise {
        config["rescale_betas_zero_snr"] = json!(true);
        config["timestep_spacing"] = json!("trailing");
    }
    config
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
        "pad_token": if kind.is_open_clip() { "!" } else { "<|endoftext|>" },
    })
}

//! A model in the proportions of Stable Diffusion 1, 2 or XL (its heads and groups), a fraction of its size.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use jedi::model::files::read_safetensors;
use jedi::model::params::{NamedVars, Params};
use jedi::model::write::{write_component, write_json, write_model_index, write_tensors};
use jedi::model::{JointUnet, TextConfig, TextEncoder, UnetConfig, Vae, VaeConfig};
use jedi::rng::Rng;
use serde_json::{Value, json};

/// p: width of the text that XL's second encoder pools.
pub const POOLED: usize = 32;
/// Width of the sinusoids of one of XL's six sizes.
const SIZE_WIDTH: usize = 8;
const WIDTH: usize = 64;
const WIDTH_2: usize = 128;

/// The generation that it is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Sd1,
    Sd2,
    Xl,
}

#[derive(Clone, Copy)]
pub struct Model {
    pub kind: Kind,
    pub in_channels: usize,
    pub prediction: &'static str,
}

pub const SD1: Model = Model { kind: Kind::Sd1, in_channels: 4, prediction: "epsilon" };
pub const SD2: Model = Model { kind: Kind::Sd2, ..SD1 };
pub const XL: Model = Model { kind: Kind::Xl, ..SD1 };

/// A folder of the tokenizer of the tiny pipeline: 604 tokens.
pub fn tokenizer() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-pipeline/tokenizer").display().to_string()
}

impl Model {
    /// d: width of the context.
    pub fn context_width(&self) -> usize {
        if self.kind == Kind::Xl { WIDTH + WIDTH_2 } else { WIDTH }
    }

    fn is_velocity(&self) -> bool {
        self.prediction == "v_prediction"
    }

    fn unet(&self) -> Value {
        let mut config = json!({
            "in_channels": self.in_channels, "out_channels": 4, "layers_per_block": 1,
            "cross_attention_dim": self.context_width(), "use_linear_projection": self.kind != Kind::Sd1,
        });
        let fields = match self.kind {
            Kind::Sd1 | Kind::Sd2 => json!({
                "sample_size": if self.is_velocity() { 96 } else { 64 },
                "block_out_channels": if self.kind == Kind::Sd1 { [32, 64] } else { [64, 128] },
                "attention_head_dim": if self.kind == Kind::Sd1 { json!(8) } else { json!([1, 2]) },
                "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            }),
            Kind::Xl => json!({
                "sample_size": 128, "block_out_channels": [64, 64, 128], "attention_head_dim": [1, 1, 2],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": [1, 2, 3], "addition_embed_type": "text_time",
                "addition_time_embed_dim": SIZE_WIDTH,
                "projection_class_embeddings_input_dim": POOLED + 6 * SIZE_WIDTH,
            }),
        };
        for (name, value) in fields.as_object().expect("fields") {
            config[name] = value.clone();
        }
        config
    }

    pub fn write(&self, folder: &Path) {
        let unet: UnetConfig = serde_json::from_value(self.unet()).expect("a U-Net config");
        let mut vae = json!({
            "sample_size": 512, "block_out_channels": [32, 32], "down_block_types": (["DownEncoderBlock2D"; 2]),
            "up_block_types": (["UpDecoderBlock2D"; 2]),
        });
        if self.kind == Kind::Xl {
            (vae["sample_size"], vae["scaling_factor"], vae["force_upcast"]) =
                (json!(1024), json!(0.13025), json!(true));
        }
        let vae: VaeConfig = serde_json::from_value(vae).expect("a VAE config");
        let text = json!({
            "vocab_size": 604, "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 1, "hidden_act": if self.kind == Kind::Sd2 { "gelu" } else { "quick_gelu" },
        });
        let mut weights = plain(JointUnet::new(&unet, random(1)).expect("a U-Net").1);
        if self.kind == Kind::Sd2 {
            // By the spread of this norm the models that predict v are known.
            let name = "up_blocks.1.attentions.1.transformer_blocks.0.norm1.bias";
            let spread = if self.is_velocity() { 0.3 } else { 0.02 };
            let bias = (Rng::new(4, "bias", 0).normal_tensor(&[64]).expect("a tensor") * spread).expect("a tensor");
            assert!(weights.insert(name.into(), bias).is_some());
        }
        write_component(folder, "unet", &unet, &weights).expect("a writable folder");
        write_component(folder, "vae", &vae, &plain(Vae::new(&vae, random(2)).expect("a VAE").1)).expect("a folder");
        write_text(folder, "text_encoder", text, 3);
        let mut scheduler = json!({
            "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "prediction_type": self.prediction, "timestep_spacing": "leading",
            "steps_offset": 1, "set_alpha_to_one": false, "clip_sample": false,
        });
        write_tokenizer(folder, "tokenizer", if self.kind == Kind::Sd2 { "!" } else { "<|endoftext|>" });
        if self.kind == Kind::Xl {
            let second = json!({
                "architectures": ["CLIPTextModelWithProjection"], "vocab_size": 604, "hidden_size": WIDTH_2,
                "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": "gelu",
                "projection_dim": POOLED, "eos_token_id": 2,
            });
            write_text(folder, "text_encoder_2", second, 5);
            write_tokenizer(folder, "tokenizer_2", "!");
            if self.is_velocity() {
                // Such models of XL are trained down to pure noise, and say so by a tensor.
                scheduler["rescale_betas_zero_snr"] = json!(true);
                scheduler["timestep_spacing"] = json!("trailing");
            }
        }
        write_json(&folder.join("scheduler/scheduler_config.json"), &scheduler).expect("a writable folder");
        if self.in_channels != 9 {
            // Without an index it is a joint model.
            write_model_index(folder).expect("a writable folder");
        }
    }

    /// The same tensors as a file from elsewhere would have them: no metadata, of XL's models the markers of what they predict.
    pub fn without_metadata(&self, from: &str, to: &str) {
        let tensors = read_safetensors(Path::new(from)).expect("a file");
        let has_markers = ["v_pred", "ztsnr"].map(|marker| tensors.contains_key(marker));
        assert_eq!(has_markers, [self.kind == Kind::Xl && self.is_velocity(); 2]);
        write_tensors(Path::new(to), &tensors, &[]).expect("a writable folder");
    }
}

fn random(seed: u64) -> Params {
    Params::random(seed, &Device::Cpu, DType::F32)
}

fn plain(vars: NamedVars) -> BTreeMap<String, Tensor> {
    vars.into_iter().map(|(name, var)| (name, var.as_detached_tensor())).collect()
}

fn write_text(folder: &Path, component: &str, config: Value, seed: u64) {
    let config: TextConfig = serde_json::from_value(config).expect("a text encoder config");
    let weights = plain(TextEncoder::new(&config, random(seed)).expect("a text encoder").1);
    write_component(folder, component, &config, &weights).expect("a writable folder");
}

fn write_tokenizer(folder: &Path, component: &str, pad: &str) {
    fs::create_dir_all(folder.join(component)).expect("a writable folder");
    for name in ["vocab.json", "merges.txt"] {
        fs::copy(Path::new(&tokenizer()).join(name), folder.join(component).join(name)).expect("a file");
    }
    let config = json!({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad});
    write_json(&folder.join(component).join("tokenizer_config.json"), &config).expect("a writable folder");
}

//! A whole model folder of random weights, small enough to sample from in a test: 32-pixel pictures, latents of 8×8×4,
//! texts of 20 tokens (the toybox tokenizer).

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use jedi::diffusion::ScheduleConfig;
use jedi::model::params::{NamedVars, Params};
use jedi::model::write::{copy_file, write_component, write_json, write_model_index};
use jedi::model::{Files, JointUnet, TextConfig, TextEncoder, UnetConfig, Vae, VaeConfig};
use serde_json::json;

/// What the U-Net takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Noisy latents, mask and reference: 9 channels.
    Joint,
    /// Noisy latents alone: 4 channels.
    Plain,
}

/// Writes the model into `folder`.
pub fn write(folder: &Path, family: Family) {
    let random = |seed| Params::random(seed, &Device::Cpu, DType::F32);
    let unet = unet_config(family);
    let vars = JointUnet::new(&unet, random(1)).expect("a U-Net of this config").1;
    write_component(folder, "unet", &unet, &plain(vars)).expect("a writable folder");

    let vae: VaeConfig = serde_json::from_value(json!({
        "down_block_types": (["DownEncoderBlock2D"; 3]), "up_block_types": (["UpDecoderBlock2D"; 3]),
        "block_out_channels": [8, 8, 8], "norm_num_groups": 4,
    }))
    .expect("a VAE config");
    let vars = Vae::new(&vae, random(2)).expect("a VAE of this config").1;
    write_component(folder, "vae", &vae, &plain(vars)).expect("a writable folder");

    let text: TextConfig = serde_json::from_value(json!({
        "vocab_size": 636, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 20,
    }))
    .expect("a text encoder config");
    let vars = TextEncoder::new(&text, random(3)).expect("a text encoder of this config").1;
    write_component(folder, "text_encoder", &text, &plain(vars)).expect("a writable folder");

    let toybox = Files::Folder(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/toybox/architecture"));
    for name in ["vocab.json", "merges.txt", "tokenizer_config.json"] {
        copy_file(&toybox, &format!("tokenizer/{name}"), folder).expect("the toybox tokenizer");
    }
    write_json(&folder.join("scheduler/scheduler_config.json"), &ScheduleConfig::default()).expect("a writable folder");
    write_model_index(folder).expect("a writable folder");
}

pub fn unet_config(family: Family) -> UnetConfig {
    let in_channels = if family == Family::Joint { 9 } else { 4 };
    serde_json::from_value(json!({
        "sample_size": 8, "in_channels": in_channels, "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [8, 16], "layers_per_block": 1, "attention_head_dim": 2,
        "cross_attention_dim": 16, "norm_num_groups": 4,
    }))
    .expect("a U-Net config")
}

/// The weights, the last layers of branches as strong as the others: a fresh network starts with them near zero, and its
/// pictures would hardly depend on anything.
fn plain(vars: NamedVars) -> std::collections::BTreeMap<String, Tensor> {
    let awake = |(name, var): (String, candle_core::Var)| {
        let is_asleep =
            ["conv2.weight", "proj_out.weight"].iter().any(|end| name.ends_with(end)) || name == "conv_out.weight";
        let weight = (var.as_tensor().detach() * if is_asleep { 100.0 } else { 1.0 }).expect("a weight");
        (name, weight)
    };
    vars.into_iter().map(awake).collect()
}

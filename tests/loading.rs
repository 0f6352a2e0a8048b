//! What loading costs in memory: the weights in the dtype that computes, and little more. Alone in its binary, since it reads
//! the whole process's memory.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]

#[allow(dead_code)] // What a run printed; here it is what it needed.
mod harness;
#[path = "harness/room.rs"]
mod room;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use harness::jedi;
use jedi::device::Runtime;
use jedi::model::params::Params;
use jedi::model::write::{write_component, write_json};
use jedi::model::{Files, JointUnet, SingleFile, TextConfig, TextEncoder, UnetConfig, Vae, VaeConfig};
use room::Room;
use serde_json::json;

/// Peak memory while loading, as a share of the weights in the dtype that computes.
const AT_MOST: f64 = 1.15;

/// A line of `/proc/self/status` in bytes.
fn status(key: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim_matches([':', ' ', '\t']).split(' ').next().unwrap().parse::<f64>().unwrap() * 1024.0
}

/// Loads all three networks in f32; the peak of what that took over the weights' size in f32.
fn peak_share(files: &Files) -> f64 {
    let runtime = Runtime::cpu();
    // Writing 5 sets the peak back to what is held now (proc(5)).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    let params = |part| files.params(part, &runtime, false).unwrap();
    let unet: UnetConfig = files.json("unet/config.json").unwrap();
    let vae: VaeConfig = files.json("vae/config.json").unwrap();
    let text: TextConfig = files.json("text_encoder/config.json").unwrap();
    let networks = (
        JointUnet::new(&unet, params("unet")).unwrap().0,
        Vae::new(&vae, params("vae")).unwrap().0,
        TextEncoder::new(&text, params("text_encoder")).unwrap().0,
    );
    let peak = status("VmHWM") - before;
    drop(networks);
    let n_values: usize = ["unet", "vae", "text_encoder"]
        .iter()
        .map(|part| files.weights(part).unwrap().tensors().values().map(|tensor| tensor.n_values()).sum::<usize>())
        .sum();
    let share = peak / (4.0 * n_values as f64);
    println!("{n_values} weights: {:.1} MB at most, {share:.3} of their size in f32", peak / 1e6);
    share
}

/// Some 60 million weights, a dozen of them in large tensors, as in Stable Diffusion.
fn write_model(folder: &Path) {
    let unet: UnetConfig = serde_json::from_value(json!({
        "in_channels": 4, "out_channels": 4, "block_out_channels": [128, 256, 512], "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 8, "cross_attention_dim": 256,
    }))
    .unwrap();
    let vae: VaeConfig = serde_json::from_value(json!({
        "down_block_types": (["DownEncoderBlock2D"; 2]), "up_block_types": (["UpDecoderBlock2D"; 2]),
        "block_out_channels": [64, 64],
    }))
    .unwrap();
    let text: TextConfig = serde_json::from_value(json!({
        "vocab_size": 604, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
    }))
    .unwrap();
    let random = |seed| Params::random(seed, &Device::Cpu, DType::F32);
    let halves = |vars: jedi::model::params::NamedVars| -> BTreeMap<String, Tensor> {
        vars.into_iter().map(|(name, var)| (name, var.as_tensor().to_dtype(DType::F16).unwrap())).collect()
    };
    write_component(folder, "unet", &unet, &halves(JointUnet::new(&unet, random(1)).unwrap().1)).unwrap();
    write_component(folder, "vae", &vae, &halves(Vae::new(&vae, random(2)).unwrap().1)).unwrap();
    write_component(folder, "text_encoder", &text, &halves(TextEncoder::new(&text, random(3)).unwrap().1)).unwrap();
    write_json(&folder.join("scheduler/scheduler_config.json"), &json!({})).unwrap();
}

#[test]
fn loading_holds_the_weights_once() {
    let room = Room::new();
    let half = room.path("f16");
    write_model(Path::new(&half));
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-pipeline/tokenizer");
    let tokenizer = tokenizer.display().to_string();
    let convert = |out: &str, flags: &[&str]| {
        let out = room.path(out);
        let args = ["convert", "--model", &half, "--tokenizer", &tokenizer, "--out", &out];
        let outcome = jedi(args.iter().chain(flags));
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        out
    };
    let models = [
        convert("f32", &["--dtype", "f32"]),
        convert("bf16-shards", &["--dtype", "bf16", "--max-shard-size", "20MB"]),
        convert("f32.safetensors", &["--dtype", "f32"]),
        convert("f16.safetensors", &[]),
        half.clone(),
    ];
    for model in &models {
        // In a process of its own: memory that this one has freed would take the weights in without being counted.
        let test = ["--ignored", "--exact", "loading_a_given_model_holds_its_weights_once", "--nocapture"];
        let this_binary = std::env::current_exe().unwrap();
        let run = Command::new(this_binary).args(test).env("JEDI_MODEL", model).output().unwrap();
        let said = String::from_utf8_lossy(&run.stdout);
        println!("{model}: {said}");
        assert!(run.status.success() && said.contains("1 passed"), "{model}: {}", String::from_utf8_lossy(&run.stderr));
    }
}

/// The same of any model, Stable Diffusion at its full size.
#[test]
#[ignore = "needs a whole model: JEDI_MODEL=FOLDER cargo test --release --test loading -- --ignored --nocapture"]
fn loading_a_given_model_holds_its_weights_once() {
    let path = std::env::var("JEDI_MODEL").expect("JEDI_MODEL names a model");
    let files = match Path::new(&path).is_dir() {
        true => Files::Folder(path.into()),
        false => Files::Single(SingleFile::open(Path::new(&path)).unwrap().into()),
    };
    jedi::ops::keep_freed_memory();
    let share = peak_share(&files);
    // Less than the weights themselves would be a measurement that misses them.
    assert!((0.95..=AT_MOST).contains(&share), "{share}");
}

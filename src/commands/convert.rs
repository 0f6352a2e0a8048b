//! `jedi convert`: a model folder in another number format, without training state.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::DType;

use super::models;
use crate::cli::{ConvertArgs, WeightDtype};
use crate::model::write::{copy_file, write_tensors};
use crate::report;

/// What a model folder holds besides weights.
const FILES: [&str; 11] = [
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
    "jedi.json",
    "model_index.json",
];

pub fn run(args: ConvertArgs) -> Result<()> {
    let files = models::open(&args.model)?;
    let out = &args.out;
    let is_empty = |folder: &Path| std::fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none());
    ensure!(is_empty(out), "--out {}: is not empty; choose another folder", out.display());
    let dtype = match args.dtype {
        WeightDtype::F32 => DType::F32,
        WeightDtype::F16 => DType::F16,
        WeightDtype::Bf16 => DType::BF16,
    };
    for component in ["unet", "vae", "text_encoder"] {
        let (mut tensors, origin) = files.tensors(component)?;
        for tensor in tensors.values_mut() {
            *tensor = tensor.to_dtype(dtype).with_context(|| origin.clone())?;
        }
        let stem = if component == "text_encoder" { "model" } else { "diffusion_pytorch_model" };
        write_tensors(&out.join(component).join(format!("{stem}.safetensors")), &tensors, &[])?;
    }
    // The index comes last: a folder without it is not a model.
    for name in FILES {
        if files.contains(name) {
            copy_file(&files, name, out)?;
        }
    }
    Ok(report::result(out.display().to_string())?)
}

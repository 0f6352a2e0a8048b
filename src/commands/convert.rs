//! `jedi convert`: a model folder in another number format, without training state.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::DType;

use super::models;
use crate::cli::{ConvertArgs, WeightDtype};
use crate::model::files::weights_stem;
use crate::model::write::{copy_file, copy_tokenizer, write_tensors};
use crate::report;

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
        copy_file(&files, &format!("{component}/config.json"), out)?;
        write_tensors(&out.join(component).join(format!("{}.safetensors", weights_stem(component))), &tensors, &[])?;
    }
    copy_tokenizer(&files, out)?;
    copy_file(&files, "scheduler/scheduler_config.json", out)?;
    for name in ["jedi.json", "model_index.json"] {
        if files.contains(name) {
            copy_file(&files, name, out)?;
        }
    }
    Ok(report::result(out.display().to_string())?)
}

//! `jedi convert`: a model in another layout or number format, without training state.

use std::path::Path;

use anyhow::Result;
use candle_core::DType;

use super::models;
use crate::cli::{ConvertArgs, Prediction, WeightDtype};
use crate::invalid::invalid;
use crate::model::convert::Model;
use crate::report;

pub fn run(args: ConvertArgs) -> Result<()> {
    let out = &args.out;
    let to_file = out.extension().is_some_and(|suffix| suffix == "safetensors");
    check_out(out, to_file)?;
    if to_file && args.max_shard_size.is_some() {
        return Err(invalid("--max-shard-size: a single file is not split; name a folder in --out, or leave it out"));
    }
    let files = models::open(&args.model, args.tokenizer.as_deref())?;
    let mut model = Model::read(&files)?;
    if args.joint {
        model.make_joint(&files)?;
    }
    if let Some(prediction) = args.prediction {
        model.set_prediction(match prediction {
            Prediction::Epsilon => "epsilon",
            Prediction::V => "v_prediction",
        })?;
    }
    let dtype = args.dtype.map(|dtype| match dtype {
        WeightDtype::F32 => DType::F32,
        WeightDtype::F16 => DType::F16,
        WeightDtype::Bf16 => DType::BF16,
    });
    match to_file {
        true => model.write_single_file(out, dtype)?,
        false => model.write_folder(out, dtype, args.max_shard_size)?,
    }
    Ok(report::result(out.display().to_string())?)
}

/// Nothing that is there is written over.
fn check_out(out: &Path, to_file: bool) -> Result<()> {
    let is_empty = |folder: &Path| std::fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none());
    if to_file && out.exists() {
        return Err(invalid(format!("--out {}: is there already; name another file", out.display())));
    }
    if out.is_file() {
        return Err(invalid(format!(
            "--out {}: is a file; name a folder, or a new file that ends in .safetensors",
            out.display()
        )));
    }
    if !is_empty(out) {
        return Err(invalid(format!("--out {}: is not empty; choose another folder", out.display())));
    }
    Ok(())
}

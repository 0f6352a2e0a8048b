//! Writes model folders in the diffusers layout. Every file goes to a temporary name first and is renamed when whole.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Tensor;
use serde::Serialize;

use super::files::{Files, weights_stem};
use crate::whole_file::write_whole;

/// Writes a file whole or not at all, and the folders that lead to it.
fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
    }
    write_whole(path, bytes)
}

/// Copies a file of a model as it is.
pub fn copy_file(files: &Files, name: &str, folder: &Path) -> Result<()> {
    write_file(&folder.join(name), &files.bytes(name)?)
}

/// Writes indented JSON, whole or not at all, and the folders that lead to it.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    write_file(path, text.as_bytes())
}

/// Writes a `.safetensors` file, tensors sorted by name; the metadata says that they are PyTorch's.
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>, metadata: &[(&str, String)]) -> Result<()> {
    let mut all: HashMap<String, String> = metadata.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
    all.insert("format".into(), "pt".into());
    let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    let bytes = safetensors::serialize(tensors, Some(all)).with_context(|| path.display().to_string())?;
    write_file(path, &bytes)
}

/// Writes `config.json` and the weights of one component of a model folder.
pub fn write_component(
    folder: &Path,
    component: &str,
    config: &impl Serialize,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<()> {
    let folder = folder.join(component);
    write_json(&folder.join("config.json"), config)?;
    write_tensors(&folder.join(format!("{}.safetensors", weights_stem(component))), tensors, &[])
}

/// Copies the files of a tokenizer that the model has.
pub fn copy_tokenizer(files: &Files, folder: &Path) -> Result<()> {
    for name in ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        let name = format!("tokenizer/{name}");
        if files.contains(&name) {
            copy_file(files, &name, folder)?;
        }
    }
    Ok(())
}

/// `model_index.json`: which class of which library reads each component that the folder holds.
pub fn write_model_index(folder: &Path) -> Result<()> {
    let mut index = serde_json::Map::new();
    index.insert("_class_name".into(), "StableDiffusionPipeline".into());
    for (component, library, class) in [
        ("scheduler", "diffusers", "DDIMScheduler"),
        ("text_encoder", "transformers", "CLIPTextModel"),
        ("tokenizer", "transformers", "CLIPTokenizer"),
        ("unet", "diffusers", "UNet2DConditionModel"),
        ("vae", "diffusers", "AutoencoderKL"),
    ] {
        if folder.join(component).is_dir() {
            index.insert(component.into(), serde_json::json!([library, class]));
        }
    }
    for absent in ["safety_checker", "feature_extractor"] {
        index.insert(absent.into(), serde_json::json!([null, null]));
    }
    write_json(&folder.join("model_index.json"), &index)
}

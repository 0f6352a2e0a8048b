//! Writes model folders in the diffusers layout. Every file goes to a temporary name first and is renamed when whole.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::convert::TOKENIZER_FILES;
use super::files::{Files, weights_stem};
use super::weights::Stored;
use crate::whole_file::{write_whole, write_whole_with};

/// Writes a file whole or not at all, and the folders that lead to it.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    make_folder_of(path)?;
    write_whole(path, bytes)
}

fn make_folder_of(path: &Path) -> Result<()> {
    let Some(folder) = path.parent() else { return Ok(()) };
    std::fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))
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
    let stored: Vec<(&str, Stored)> = tensors.iter().map(|(name, tensor)| (&**name, tensor.clone().into())).collect();
    let metadata = metadata.iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
    write_stored(path, stored.iter().map(|(name, tensor)| (*name, tensor)), None, metadata)
}

/// [`write_tensors`] of tensors that are read one by one as they are written, cast to `dtype` (None: as they are).
pub fn write_stored<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (&'a str, &'a Stored)>,
    dtype: Option<DType>,
    mut metadata: BTreeMap<String, String>,
) -> Result<()> {
    let mut tensors: Vec<(&str, &Stored)> = tensors.collect();
    // As the safetensors library orders them, so that each lies aligned in a mapped file: wide numbers first.
    tensors.sort_by_key(|(name, tensor)| (Reverse(tensor.written_dtype(dtype)), *name));
    metadata.insert("format".into(), "pt".into());
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!(metadata))]);
    let mut end = 0;
    for (name, tensor) in &tensors {
        let written = tensor.written_dtype(dtype);
        let start = end;
        end += tensor.n_values() * written.bitsize() / 8;
        let entry = json!({"dtype": written, "shape": tensor.shape(), "data_offsets": [start, end]});
        header.insert((*name).to_owned(), entry);
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    make_folder_of(path)?;
    write_whole_with(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for (name, tensor) in tensors {
            tensor.with_bytes(dtype, |bytes| file.write_all(bytes)).with_context(|| format!("tensor {name}"))?;
        }
        Ok(())
    })
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
    for name in TOKENIZER_FILES {
        let name = format!("tokenizer/{name}");
        if files.contains(&name) {
            copy_file(files, &name, folder)?;
        }
    }
    Ok(())
}

/// The diffusers pipeline that opens a model whose U-Net takes so many channels of which the latents have four.
pub fn pipeline_class(in_channels: usize, is_xl: bool) -> &'static str {
    match (in_channels, is_xl) {
        (9, false) => "StableDiffusionInpaintPipeline",
        (8, false) => "StableDiffusionInstructPix2PixPipeline",
        (_, false) => "StableDiffusionPipeline",
        (9, true) => "StableDiffusionXLInpaintPipeline",
        (8, true) => "StableDiffusionXLInstructPix2PixPipeline",
        (_, true) => "StableDiffusionXLPipeline",
    }
}

/// `model_index.json`: which class of which library reads each component that the folder holds.
pub fn write_model_index(folder: &Path) -> Result<()> {
    let is_there = |component: &str| folder.join(component).is_dir();
    let index = model_index(pipeline_class(4, is_there("text_encoder_2")), is_there);
    write_json(&folder.join("model_index.json"), &index)
}

/// [`write_model_index`]'s contents for a pipeline of this class and the components that are there.
pub fn model_index(pipeline_class: &str, is_there: impl Fn(&str) -> bool) -> Map<String, Value> {
    /// The version whose layout this is. diffusers' inpainting pipelines do not open a folder that names none.
    const DIFFUSERS_VERSION: &str = "0.36.0";
    let mut index = Map::from_iter([
        ("_class_name".to_owned(), json!(pipeline_class)),
        ("_diffusers_version".to_owned(), json!(DIFFUSERS_VERSION)),
    ]);
    for (component, library, class) in [
        ("scheduler", "diffusers", "DDIMScheduler"),
        ("text_encoder", "transformers", "CLIPTextModel"),
        ("text_encoder_2", "transformers", "CLIPTextModelWithProjection"),
        ("tokenizer", "transformers", "CLIPTokenizer"),
        ("tokenizer_2", "transformers", "CLIPTokenizer"),
        ("unet", "diffusers", "UNet2DConditionModel"),
        ("vae", "diffusers", "AutoencoderKL"),
    ] {
        if is_there(component) {
            index.insert(component.into(), json!([library, class]));
        }
    }
    let absent = match is_there("text_encoder_2") {
        true => ["image_encoder", "feature_extractor"],
        false => ["safety_checker", "feature_extractor"],
    };
    index.extend(absent.map(|component| (component.to_owned(), json!([null, null]))));
    if is_there("text_encoder_2") {
        // The null text of Stable Diffusion XL's base model is zeros.
        index.insert("force_zeros_for_empty_prompt".into(), json!(true));
    }
    index
}

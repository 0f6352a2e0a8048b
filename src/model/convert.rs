//! A model in another layout: a diffusers folder or a single file, in another dtype, in shards, widened to a joint model.
//! Tensors are read one by one as they are written.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::config::{UnetConfig, VaeConfig};
use super::family::Family;
use super::files::{Files, weights_stem};
use super::ldm::{self, TextKind};
use super::single_file;
use super::text::TextConfig;
use super::weights::{Stored, Weights};
use super::widen::widen;
use super::write::{model_index, pipeline_class, write_file, write_json, write_stored};
use crate::invalid::invalid;

/// Parts that have weights.
pub const NETWORKS: [&str; 4] = ["unet", "vae", "text_encoder", "text_encoder_2"];
const TOKENIZERS: [&str; 2] = ["tokenizer", "tokenizer_2"];
/// Files of a tokenizer.
pub const TOKENIZER_FILES: [&str; 5] =
    ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];
const UNET_CONFIG: &str = "unet/config.json";
const SCHEDULER_CONFIG: &str = "scheduler/scheduler_config.json";
const INDEX: &str = "model_index.json";

/// A model to be written.
pub struct Model {
    weights: BTreeMap<&'static str, Weights>,
    /// Small files by their names in the folder.
    texts: BTreeMap<String, String>,
}

impl Model {
    /// All that jedi uses of a model. What else its `model_index.json` names (the safety checker of SD1) is crossed out there,
    /// or diffusers would look for it.
    pub fn read(files: &Files) -> Result<Self> {
        let mut texts = BTreeMap::new();
        let mut keep = |name: &str| -> Result<()> {
            if files.contains(name) {
                texts.insert(name.to_owned(), files.text(name)?);
            }
            Ok(())
        };
        for tokenizer in TOKENIZERS {
            // With vocabulary and merges there, tokenizer.json says nothing more.
            let has_vocabulary = files.contains(&format!("{tokenizer}/vocab.json"));
            for name in TOKENIZER_FILES.iter().filter(|name| !(has_vocabulary && **name == "tokenizer.json")) {
                keep(&format!("{tokenizer}/{name}"))?;
            }
        }
        for name in ["jedi.json", INDEX, SCHEDULER_CONFIG] {
            keep(name)?;
        }
        let mut weights = BTreeMap::new();
        for network in NETWORKS {
            let config = format!("{network}/config.json");
            if files.contains(&config) {
                keep(&config)?;
                weights.insert(network, files.weights(network)?);
            }
        }
        let mut model = Self { weights, texts };
        let has = |part: &str| model.texts.keys().any(|name| name.starts_with(&format!("{part}/")));
        let mut index = match model.texts.contains_key(INDEX) {
            true => model.json(INDEX)?,
            false => model_index(pipeline_class(4, has("text_encoder_2")), has),
        };
        for (part, class) in index.iter_mut().filter(|(_, class)| class.is_array()) {
            if !has(part) {
                *class = json!([null, null]);
            }
        }
        model.set_json(INDEX, &index)?;
        Ok(model)
    }

    /// Makes the joint model that training starts from out of a plain one or one for inpainting.
    pub fn make_joint(&mut self, files: &Files) -> Result<()> {
        let mut config: Value = self.json(UNET_CONFIG)?;
        let typed: UnetConfig = self.json(UNET_CONFIG)?;
        let inputs = 2 * typed.latent_channels() + 1;
        match Family::of(files, &typed)? {
            Family::Joint | Family::Inpainting => {}
            Family::Plain => {
                let unet = self.weights.get_mut("unet").context("it holds no U-Net")?;
                widen(unet, inputs)?;
                config["in_channels"] = json!(inputs);
                self.set_json(UNET_CONFIG, &config)?;
            }
            family @ (Family::InstructPix2Pix | Family::Other) => {
                return Err(invalid(format!(
                    "--joint: {}; only a plain U-Net or one for inpainting becomes a joint one",
                    family.describe(&typed)
                )));
            }
        }
        if !self.texts.contains_key("jedi.json") {
            let vae: VaeConfig = self.json("vae/config.json")?;
            let info = json!({
                "format_version": 1,
                "trained_steps": 0,
                "image_size": typed.sample_size.map(|size| size * vae.downscale()),
                "channel_order": ["noisy", "mask", "reference"],
            });
            self.set_json("jedi.json", &info)?;
        }
        Ok(())
    }

    /// Says what the network predicts: `epsilon` or `v_prediction`.
    pub fn set_prediction(&mut self, prediction_type: &str) -> Result<()> {
        let mut scheduler: Value = self.json(SCHEDULER_CONFIG)?;
        scheduler["prediction_type"] = json!(prediction_type);
        self.set_json(SCHEDULER_CONFIG, &scheduler)
    }

    /// Writes a diffusers folder. Weights of more than `max_shard_bytes` are split (None: never).
    pub fn write_folder(&self, out: &Path, dtype: Option<DType>, max_shard_bytes: Option<u64>) -> Result<()> {
        for (network, weights) in &self.weights {
            write_shards(&out.join(network), weights_stem(network), weights, dtype, max_shard_bytes)?;
        }
        for (name, text) in &self.texts {
            write_file(&out.join(name), text.as_bytes())?;
        }
        Ok(())
    }

    /// Writes a single file in Stable Diffusion's own layout, the small files in its metadata.
    pub fn write_single_file(&self, out: &Path, dtype: Option<DType>) -> Result<()> {
        let is_xl = self.weights.contains_key("text_encoder_2");
        let mut all = ldm::Tensors::new();
        for (network, weights) in &self.weights {
            let tensors = weights.tensors();
            let config = format!("{network}/config.json");
            let named = match *network {
                "unet" => ldm::unet_to_ldm(tensors, &self.json(&config)?),
                "vae" => ldm::vae_to_ldm(tensors, &self.json(&config)?),
                _ => {
                    let config: TextConfig = self.json(&config)?;
                    ldm::text_to_ldm(tensors, TextKind::of_component(network, &config, is_xl), &config)
                }
            };
            all.extend(named.with_context(|| weights.origin().to_owned())?);
        }
        if is_xl {
            self.mark_prediction(&mut all)?;
        }
        let tensors = all.iter().map(|(name, tensor)| (name.as_str(), tensor));
        write_stored(out, tensors, dtype, single_file::metadata(&self.texts)?)
    }

    /// Says among the tensors of Stable Diffusion XL what other programs cannot tell from them.
    fn mark_prediction(&self, tensors: &mut ldm::Tensors) -> Result<()> {
        if !self.texts.contains_key(SCHEDULER_CONFIG) {
            return Ok(());
        }
        let scheduler: Value = self.json(SCHEDULER_CONFIG)?;
        for (marker, is_so) in [
            (single_file::V_MARKER, scheduler["prediction_type"] == "v_prediction"),
            (single_file::PURE_NOISE_MARKER, scheduler["rescale_betas_zero_snr"] == true),
        ] {
            if is_so {
                tensors.insert(marker.into(), Tensor::zeros(0, DType::F32, &Device::Cpu)?.into());
            }
        }
        Ok(())
    }

    fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T> {
        let text = self.texts.get(name).with_context(|| format!("the model has no {name}"))?;
        serde_json::from_str(text).with_context(|| name.to_owned())
    }

    fn set_json(&mut self, name: &str, value: &impl serde::Serialize) -> Result<()> {
        self.texts.insert(name.to_owned(), serde_json::to_string_pretty(value)? + "\n");
        Ok(())
    }
}

/// One file, or several and their index, as `save_pretrained` names them.
fn write_shards(
    folder: &Path,
    stem: &str,
    weights: &Weights,
    dtype: Option<DType>,
    max_bytes: Option<u64>,
) -> Result<()> {
    let n_bytes = |tensor: &Stored| (tensor.n_values() * tensor.written_dtype(dtype).bitsize() / 8) as u64;
    let mut shards: Vec<Vec<(&str, &Stored)>> = vec![Vec::new()];
    let (mut in_shard, mut total) = (0, 0);
    for (name, tensor) in weights.tensors() {
        let size = n_bytes(tensor);
        if in_shard > 0 && max_bytes.is_some_and(|max| in_shard + size > max) {
            shards.push(Vec::new());
            in_shard = 0;
        }
        in_shard += size;
        total += size;
        // One at least is there.
        if let Some(shard) = shards.last_mut() {
            shard.push((name, tensor));
        }
    }
    let count = shards.len();
    if count == 1 {
        let tensors = shards.into_iter().flatten();
        return write_stored(&folder.join(format!("{stem}.safetensors")), tensors, dtype, BTreeMap::new());
    }
    ensure!(count < 100_000, "--max-shard-size: makes {count} files of {}; choose a larger one", weights.origin());
    let mut weight_map = BTreeMap::new();
    for (index, shard) in shards.into_iter().enumerate() {
        let file = format!("{stem}-{:05}-of-{count:05}.safetensors", index + 1);
        weight_map.extend(shard.iter().map(|(name, _)| (*name, file.clone())));
        write_stored(&folder.join(&file), shard.into_iter(), dtype, BTreeMap::new())?;
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    write_json(&folder.join(format!("{stem}.safetensors.index.json")), &index)
}

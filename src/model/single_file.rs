//! A whole model in one `.safetensors` file in Stable Diffusion's own layout, as A1111 and ComfyUI have it, seen as if it were
//! a diffusers folder. The small files of the folder come from the metadata where jedi wrote the file, and otherwise from
//! what its tensors tell; a tokenizer is in it only if jedi put it there.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::{DType, Tensor};
use serde_json::json;

use super::config::UnetConfig;
use super::ldm::{self, Shapes, Tensors, TextKind};
use super::weight_file::WeightFile;
use super::weights::Weights;
use super::write::{model_index, pipeline_class};
use crate::invalid::invalid;

/// In front of a small file's name in the metadata.
pub const FILE_KEY: &str = "jedi/";
/// What the network predicts, by the ModelSpec standard: `epsilon` or `v`.
pub const PREDICTION_KEY: &str = "modelspec.prediction_type";

/// A tensor of this name, whatever is in it, says that a network of Stable Diffusion XL predicts v. ComfyUI knows it by this too.
pub const V_MARKER: &str = "v_pred";
/// The same of one that was trained down to pure noise.
pub const PURE_NOISE_MARKER: &str = "ztsnr";
/// Tensors of one number by which files of models say that their noise levels are EDM's (Karras et al. 2022).
const EDM_MARKERS: [&str; 2] = ["edm_mean", "edm_vpred.sigma_max"];

/// An open file.
#[derive(Debug)]
pub struct SingleFile {
    path: PathBuf,
    tensors: Tensors,
    /// Small files by their names in the folder.
    texts: BTreeMap<String, String>,
    notice: Option<String>,
}

impl SingleFile {
    /// Reads the header and finds out what is in the file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = WeightFile::open(path)?;
        let (tensors, metadata) = (file.tensors(), file.metadata());
        let own =
            metadata.iter().filter_map(|(key, text)| Some((key.strip_prefix(FILE_KEY)?.to_owned(), text.clone())));
        let mut single = Self { path: path.to_owned(), tensors, texts: own.collect(), notice: None };
        single.find_out(&metadata).map_err(|error| match crate::invalid::is_invalid(&error) {
            true => error,
            false => invalid(format!("{}: {error:#}", path.display())),
        })?;
        Ok(single)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A small file by its name in the folder; None if there is none.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.texts.get(name).map(String::as_str)
    }

    /// What was guessed, for the user.
    pub fn notice(&self) -> Option<&str> {
        self.notice.as_deref()
    }

    /// The tensors of a component under the names that diffusers gives them.
    pub fn weights(&self, component: &str) -> Result<Weights> {
        let origin = self.path.display().to_string();
        let name = format!("{component}/config.json");
        let text = self.text(&name).with_context(|| format!("{origin}: holds no {component}"))?;
        let tensors = match component {
            "unet" => ldm::unet_from_ldm(&self.tensors, &parsed(&name, text)?),
            "vae" => ldm::vae_from_ldm(&self.tensors, &parsed(&name, text)?),
            other => match self.text_kinds().into_iter().find(|kind| kind.component() == other) {
                Some(kind) => ldm::text_from_ldm(&self.tensors, kind, &parsed(&name, text)?),
                None => bail!("{origin}: holds no tensors of {other}"),
            },
        };
        Ok(Weights::new(origin.clone(), tensors.context(origin)?))
    }

    fn find_out(&mut self, metadata: &HashMap<String, String>) -> Result<()> {
        let shapes: Shapes =
            self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shape().to_vec())).collect();
        let (has_unet, has_vae) = (shapes.has(ldm::UNET), shapes.has(ldm::VAE));
        let kinds = self.text_kinds();
        if shapes.has(ldm::REFINER_TEXT) {
            bail!(
                "is Stable Diffusion XL's refiner, which only goes over pictures of the base model; give the base model"
            );
        }
        if let Some(name) = EDM_MARKERS.iter().find(|name| self.tensors.contains_key(**name)) {
            bail!("is trained on noise levels of its own kind (EDM, tensor {name}), which jedi does not sample");
        }
        if !has_unet && !has_vae && kinds.is_empty() {
            bail!("{}", self.what_else());
        }
        if has_unet && self.text("unet/config.json").is_none() {
            let mut config = shapes.unet().context("not Stable Diffusion 1, 2 or XL")?;
            let prediction = self.prediction(&config, metadata)?;
            if prediction == "v_prediction" && config.use_linear_projection && !shapes.is_xl() {
                // 768 pixels a side: the size of both public models that predict v.
                config.sample_size = Some(96);
            }
            let is_there = |part: &str| match part {
                "vae" => has_vae,
                "unet" | "scheduler" => true,
                text => kinds.iter().any(|kind| [kind.component(), kind.tokenizer()].contains(&text)),
            };
            let class = pipeline_class(config.in_channels, shapes.is_xl());
            self.tell("unet/config.json", &config)?;
            let ends_in_noise = self.tensors.contains_key(PURE_NOISE_MARKER);
            self.tell("scheduler/scheduler_config.json", &ldm::scheduler(prediction, ends_in_noise))?;
            self.tell("model_index.json", &model_index(class, is_there))?;
        }
        if has_vae && self.text("vae/config.json").is_none() {
            self.tell("vae/config.json", &shapes.vae()?)?;
        }
        for kind in kinds {
            let name = format!("{}/config.json", kind.component());
            if self.text(&name).is_none() {
                let config = shapes.text(kind)?;
                let tokenizer = ldm::tokenizer_config(kind, config.max_position_embeddings);
                self.tell(&format!("{}/tokenizer_config.json", kind.tokenizer()), &tokenizer)?;
                self.tell(&name, &config)?;
            }
        }
        Ok(())
    }

    fn text_kinds(&self) -> Vec<TextKind> {
        TextKind::all_in(self.tensors.keys())
    }

    fn tell(&mut self, name: &str, contents: &impl serde::Serialize) -> Result<()> {
        self.texts.insert(name.to_owned(), serde_json::to_string_pretty(contents)? + "\n");
        Ok(())
    }

    /// A file without a network that we know.
    fn what_else(&self) -> String {
        let has = |prefix: &str| self.tensors.keys().any(|name| name.starts_with(prefix));
        if has("down_blocks.") || has("encoder.down_blocks.") || has("text_model.") {
            return "is one part of a diffusers folder; give the folder that has model_index.json".into();
        }
        if has("lora_") || self.tensors.keys().any(|name| name.contains("lora_")) {
            return "is a LoRA, which changes a model and is none".into();
        }
        let first = self.tensors.keys().next().map_or("it is empty".into(), |name| format!("its first is {name}"));
        let (clip, xl_clip) = (TextKind::Clip.prefix(), TextKind::XlClip.prefix());
        format!(
            "holds no tensor of a Stable Diffusion model ({}…, {}…, {clip}…, {xl_clip}…); {first}",
            ldm::UNET,
            ldm::VAE
        )
    }

    /// What the network predicts. Shapes do not tell; Stable Diffusion 2 came in both kinds.
    fn prediction(&mut self, config: &UnetConfig, metadata: &HashMap<String, String>) -> Result<&'static str> {
        match metadata.get(PREDICTION_KEY).map(String::as_str) {
            Some("v" | "v_prediction") => return Ok("v_prediction"),
            Some("epsilon") => return Ok("epsilon"),
            _ => {}
        }
        if self.tensors.contains_key(V_MARKER) {
            return Ok("v_prediction");
        }
        let is_sd2 = config.use_linear_projection && !config.takes_added_conditions();
        if !is_sd2 || config.in_channels != config.out_channels {
            return Ok("epsilon");
        }
        /// ComfyUI tells Stable Diffusion 2's models that predict v by this much spread in one bias
        /// (`supported_models.py`, SD20.model_type).
        const V_SPREAD: f64 = 0.09;
        let last = config.block_out_channels.len() * (config.layers_per_block + 1) - 1;
        let name = format!("{}output_blocks.{last}.1.transformer_blocks.0.norm1.bias", ldm::UNET);
        let Some(bias) = self.tensors.get(&name) else { return Ok("epsilon") };
        let spread = deviation(&bias.load(&candle_core::Device::Cpu)?)?;
        let prediction = if spread > V_SPREAD { "v_prediction" } else { "epsilon" };
        self.notice = Some(format!(
            "{}: Stable Diffusion 2, taken to predict {} by the spread of its last norm ({spread:.3}); if its pictures are \
             noise, tell it the other with `jedi convert --prediction`",
            self.path.display(),
            if prediction == "epsilon" { "the noise" } else { "v" },
        ));
        Ok(prediction)
    }
}

/// The standard deviation of all values.
fn deviation(tensor: &Tensor) -> Result<f64> {
    let values: Vec<f64> = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    ensure!(!values.is_empty(), "an empty tensor");
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    Ok((values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt())
}

fn parsed<T: serde::de::DeserializeOwned>(name: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).with_context(|| name.to_owned())
}

/// What a file's metadata says of a small file and of the prediction, for [`SingleFile`] to find again.
pub fn metadata(texts: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
    let mut metadata: BTreeMap<String, String> =
        texts.iter().map(|(name, text)| (format!("{FILE_KEY}{name}"), text.clone())).collect();
    if let Some(text) = texts.get("scheduler/scheduler_config.json") {
        let scheduler: serde_json::Value = parsed("scheduler/scheduler_config.json", text)?;
        let is_velocity = scheduler["prediction_type"] == json!("v_prediction");
        metadata.insert(PREDICTION_KEY.into(), if is_velocity { "v" } else { "epsilon" }.into());
    }
    Ok(metadata)
}

//! What is written inside and beside a picture: all that makes it again.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cli::{Dtype, Fit, Guidance, Lora, Sampler};
use crate::report;
use crate::sample::settings_of;

/// The settings of one picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Of the program.
    pub version: String,
    pub model: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<RecordedLora>,
    pub prompt: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub negative_prompt: String,
    pub references: Vec<RecordedReference>,
    pub fit: Fit,
    pub seed: u64,
    pub steps: usize,
    pub sampler: Sampler,
    #[serde(default, skip_serializing_if = "is_false")]
    pub karras: bool,
    pub guidance: RecordedGuidance,
    pub size: usize,
    pub coupled: bool,
    pub device: String,
    pub dtype: Dtype,
    #[serde(default, skip_serializing_if = "is_false")]
    pub low_memory: bool,
    /// Only where the picture is larger than a tile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae_tile: Option<usize>,
    /// The set that the picture was made in together with others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<RecordedSet>,
    /// The file that the noise came from, in place of the seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noise: Option<RecordedNoise>,
}

/// Adapters that were merged into the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordedLora {
    pub path: PathBuf,
    pub sha256: String,
    pub weight: f64,
}

impl RecordedLora {
    /// As asked for; not read yet.
    pub fn by_flag(lora: &Lora) -> Self {
        Self { path: lora.path.clone(), sha256: String::new(), weight: lora.weight }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordedReference {
    pub path: PathBuf,
    pub sha256: String,
    pub caption: Option<String>,
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub weight: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<RecordedMask>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordedMask {
    pub path: PathBuf,
    pub sha256: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordedGuidance {
    pub kind: Guidance,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_scale: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_scale: Option<f64>,
    #[serde(default, skip_serializing_if = "is_false")]
    pub normalised: bool,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub rescale: f64,
}

/// Each prompt `num_images` times in a row, with seeds that count up from `seed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordedSet {
    pub prompts: Vec<String>,
    pub num_images: usize,
    pub seed: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordedNoise {
    pub path: PathBuf,
    pub sha256: String,
    /// Which of the file's targets is the first of this picture's set.
    pub first: usize,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

fn one() -> f64 {
    1.0
}

fn is_one(value: &f64) -> bool {
    *value == 1.0
}

impl Record {
    /// The settings in a picture or in the `.json` beside it.
    pub fn read(path: &Path) -> Result<Self> {
        let settings = settings_of(path).context("--from")?;
        let record: Self = serde_json::from_value(settings)
            .with_context(|| format!("--from {}: its settings are not those of `jedi sample`", path.display()))?;
        let version = env!("CARGO_PKG_VERSION");
        if record.version != version {
            let made = &record.version;
            report::note(format!(
                "{}: was made by jedi {made}; this is {version}, and the last bits may differ",
                path.display()
            ));
        }
        Ok(record)
    }

    /// What decides how the picture looks, as text: not where it was made, nor where the references lay.
    pub fn essence(&self) -> String {
        let mut essence = Self { version: String::new(), device: String::new(), ..self.clone() };
        essence.loras.iter_mut().for_each(|lora| lora.path = PathBuf::new());
        for reference in &mut essence.references {
            reference.path = PathBuf::new();
            reference.mask.iter_mut().for_each(|mask| mask.path = PathBuf::new());
        }
        json!(essence).to_string()
    }

    /// A picture on stdout: its path, or all about it.
    pub fn line(&self, path: &Path, is_json: bool) -> String {
        let path = path.display().to_string();
        let mut all = json!({ "path": path });
        match (all.as_object_mut(), json!(self)) {
            (Some(all), Value::Object(record)) if is_json => all.extend(record),
            _ => return path,
        }
        all.to_string()
    }
}

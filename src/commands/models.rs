//! The name of a model to its files: a folder, a single file, the hub's `owner/name`, or `toybox`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;

use super::pickle;
use crate::invalid::{invalid, is_invalid};
use crate::model::{Files, SingleFile, toybox};
use crate::report;

/// A part of a model folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The denoising network.
    Unet,
    /// Pictures to latents and back.
    Vae,
    /// Tokens to context.
    TextEncoder,
    /// Text to tokens.
    Tokenizer,
    /// The noise levels.
    Scheduler,
}

impl Part {
    /// A whole model.
    pub const ALL: &[Part] = &[Part::Unet, Part::Vae, Part::TextEncoder, Part::Tokenizer, Part::Scheduler];

    /// One of these files must be there.
    fn files(self) -> &'static [&'static str] {
        match self {
            Part::Unet => &["unet/config.json"],
            Part::Vae => &["vae/config.json"],
            Part::TextEncoder => &["text_encoder/config.json"],
            Part::Tokenizer => &["tokenizer/vocab.json", "tokenizer/tokenizer.json"],
            Part::Scheduler => &["scheduler/scheduler_config.json"],
        }
    }

    fn in_words(self) -> &'static str {
        match self {
            Part::Unet => "the U-Net (model.diffusion_model.…)",
            Part::Vae => "the VAE (first_stage_model.…)",
            Part::TextEncoder => "the text encoder (cond_stage_model.…)",
            Part::Tokenizer => "the tokenizer (give --tokenizer DIR)",
            Part::Scheduler => "the noise schedule",
        }
    }
}

/// The files of a whole model; those of its tokenizer in the folder `tokenizer` where one is given.
pub fn open(name: &str, tokenizer: Option<&Path>) -> Result<Files> {
    open_parts(name, tokenizer, Part::ALL)
}

/// The files of a model of which only `parts` are needed.
pub fn open_parts(name: &str, tokenizer: Option<&Path>, parts: &[Part]) -> Result<Files> {
    let files = find(name, tokenizer)?;
    let is_there = |part: &Part| part.files().iter().any(|file| files.contains(file));
    let missing: Vec<&Part> = parts.iter().filter(|part| !is_there(part)).collect();
    if missing.is_empty() {
        return Ok(files);
    }
    let wrong = |cause: String| Err(invalid(format!("--model {name}: {cause}")));
    if Path::new(name).is_file() {
        return match missing.as_slice() {
            [Part::Tokenizer] => wrong(
                "a single file has no tokenizer; give --tokenizer DIR, the `tokenizer/` of any Stable Diffusion 1 or 2 \
                 folder or a copy of openai/clip-vit-large-patch14 (vocab.json, merges.txt), or put it beside the file as \
                 `tokenizer/`"
                    .into(),
            ),
            _ => wrong(format!(
                "is no whole model: it lacks {}",
                missing.iter().map(|part| part.in_words()).collect::<Vec<_>>().join(", ")
            )),
        };
    }
    let index = if files.contains("model_index.json") { "" } else { " (nor is there a model_index.json)" };
    let missing: Vec<&str> = missing.iter().map(|part| part.files()[0]).collect();
    wrong(format!("is no whole model folder (diffusers layout): no {}{index}", missing.join(", no ")))
}

fn find(name: &str, tokenizer: Option<&Path>) -> Result<Files> {
    let path = Path::new(name);
    let mut files = if name == "toybox" {
        Files::Embedded(toybox::FILES)
    } else if path.is_file() {
        single_file(name, path)?
    } else if path.is_dir() {
        Files::Folder(path.to_owned())
    } else {
        return Err(not_there(name));
    };
    if let Some(folder) = tokenizer {
        files = files.with_tokenizer(tokenizer_folder(folder)?);
    } else if path.is_file() && !files.contains("tokenizer/vocab.json") && !files.contains("tokenizer/tokenizer.json") {
        let beside = path.with_file_name("tokenizer");
        if holds_tokenizer(&beside) {
            files = files.with_tokenizer(beside);
        }
    }
    Ok(files)
}

/// A whole model in one file.
fn single_file(name: &str, path: &Path) -> Result<Files> {
    pickle::refuse(name, path)?;
    let file = SingleFile::open(path).map_err(|error| match is_invalid(&error) {
        true => invalid(format!("--model {error:#}")),
        false => error.context("--model"),
    })?;
    if let Some(notice) = file.notice() {
        report::note(notice);
    }
    Ok(Files::Single(Arc::new(file)))
}

/// The folder itself, or the `tokenizer/` of a model folder.
fn tokenizer_folder(folder: &Path) -> Result<PathBuf> {
    for folder in [folder.to_owned(), folder.join("tokenizer")] {
        if holds_tokenizer(&folder) {
            return Ok(folder);
        }
    }
    Err(invalid(format!(
        "--tokenizer {}: holds neither vocab.json and merges.txt nor tokenizer.json; name a folder that does",
        folder.display()
    )))
}

fn holds_tokenizer(folder: &Path) -> bool {
    let has = |name: &str| folder.join(name).is_file();
    has("vocab.json") && has("merges.txt") || has("tokenizer.json")
}

fn not_there(name: &str) -> anyhow::Error {
    let wrong = |cause: String| invalid(format!("--model {name}: {cause}"));
    if let Some((repository, revision)) = hub_name(name) {
        let revision = revision.map_or(String::new(), |revision| format!(" --revision {revision}"));
        return wrong(format!(
            "no such folder, and jedi does not download models yet; fetch it with `hf download {repository}{revision} \
             --local-dir FOLDER` (from Python's huggingface_hub) and give --model FOLDER"
        ));
    }
    wrong("no such folder; check the path".into())
}

/// `owner/name` and the revision of a name on the hub; None for a path.
fn hub_name(name: &str) -> Option<(&str, Option<&str>)> {
    let name = name.strip_prefix("hf:").unwrap_or(name);
    let (repository, revision) = match name.split_once('@') {
        Some((repository, revision)) => (repository, Some(revision)),
        None => (name, None),
    };
    let (owner, model) = repository.split_once('/')?;
    let is_word = |word: &str| {
        !word.is_empty() && !word.starts_with('.') && word.chars().all(|c| c.is_alphanumeric() || "-_.".contains(c))
    };
    (is_word(owner) && is_word(model)).then_some((repository, revision))
}

/// The guidance scale that the user asked for, or else the model's own (`guidance_scale` in its `jedi.json`), or else 3.
pub fn guidance_scale(asked: Option<f64>, files: &Files) -> Result<f64> {
    const DEFAULT: f64 = 3.0;
    if let Some(scale) = asked {
        return Ok(scale);
    }
    if !files.contains("jedi.json") {
        return Ok(DEFAULT);
    }
    let info: serde_json::Value = files.json("jedi.json")?;
    Ok(info["guidance_scale"].as_f64().unwrap_or(DEFAULT))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::model::write::write_tensors;

    fn refusal(name: &str) -> String {
        let error = open(name, None).unwrap_err();
        assert!(is_invalid(&error), "{error}");
        error.to_string()
    }

    #[test]
    fn a_name_of_the_hub_is_told_from_a_path() {
        assert_eq!(hub_name("hf:owner/model@v1"), Some(("owner/model", Some("v1"))));
        assert_eq!(hub_name("owner/sd-v1.4"), Some(("owner/sd-v1.4", None)));
        for path in ["model", "./model", "../model", "/owner/model", "a/b/c", "hf:model"] {
            assert_eq!(hub_name(path), None, "{path}");
        }
    }

    #[test]
    fn what_cannot_be_opened_is_refused_with_the_way_out() {
        assert!(refusal("owner/model").contains("hf download owner/model --local-dir"));
        assert!(refusal("hf:owner/model@v1").contains("--revision v1"));
        assert!(refusal("no-such-model").contains("no such folder; check the path"));
    }

    #[test]
    fn a_file_that_is_no_whole_model_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("some.safetensors");
        for (tensor, reason) in [
            ("down_blocks.0.resnets.0.conv1.weight", "is one part of a diffusers folder"),
            ("lora_unet_down_blocks_0.lora_up.weight", "is a LoRA"),
            ("conditioner.embedders.0.transformer.x", "is Stable Diffusion XL"),
            ("layers.0.weight", "holds no tensor of a Stable Diffusion model"),
            ("model.diffusion_model.joint_blocks.0.x", "not Stable Diffusion 1 or 2"),
            ("first_stage_model.encoder.x", "laid out in another way"),
        ] {
            let one = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
            write_tensors(&file, &[(tensor.to_owned(), one)].into(), &[]).unwrap();
            let message = refusal(file.to_str().unwrap());
            assert!(message.starts_with("--model ") && message.contains(reason), "{tensor}: {message}");
        }
        std::fs::write(&file, "hello").unwrap();
        let error = format!("{:#}", open(file.to_str().unwrap(), None).unwrap_err());
        assert!(error.contains("some.safetensors: not a readable safetensors file"), "{error}");
    }

    #[test]
    fn a_tokenizer_folder_without_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = open("toybox", Some(folder.path())).unwrap_err();
        assert!(is_invalid(&error) && error.to_string().contains("holds neither vocab.json"), "{error}");
    }

    #[test]
    fn a_folder_that_lacks_parts_is_refused_with_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().to_str().unwrap();
        for file in ["unet/config.json", "tokenizer/tokenizer.json"] {
            let path = folder.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        }
        let message = refusal(name);
        assert!(message.contains("no vae/config.json, no text_encoder/config.json, no scheduler/"), "{message}");
        assert!(!message.contains("no unet") && !message.contains("no tokenizer"), "{message}");
        assert!(open_parts(name, None, &[Part::Unet]).is_ok());
    }
}

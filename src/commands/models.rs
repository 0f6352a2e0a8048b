//! The name of a model to its files: a folder, the hub's `owner/name`, or `toybox`.

use std::path::Path;

use anyhow::Result;

use crate::invalid::invalid;
use crate::model::{Files, toybox};

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
}

/// The files of a whole model.
pub fn open(name: &str) -> Result<Files> {
    open_parts(name, Part::ALL)
}

/// The files of a model of which only `parts` are needed.
pub fn open_parts(name: &str, parts: &[Part]) -> Result<Files> {
    let wrong = |cause: String| Err(invalid(format!("--model {name}: {cause}")));
    if name == "toybox" {
        return Ok(Files::Embedded(toybox::FILES));
    }
    let path = Path::new(name);
    if path.is_file() {
        return wrong(
            "is a file, and jedi reads model folders in the diffusers layout; for a single-file checkpoint, make one \
             with diffusers: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
                .into(),
        );
    }
    if path.is_dir() {
        let files = Files::Folder(path.to_owned());
        let is_there = |part: &Part| part.files().iter().any(|file| files.contains(file));
        let missing: Vec<&str> = parts.iter().filter(|part| !is_there(part)).map(|part| part.files()[0]).collect();
        if missing.is_empty() {
            return Ok(files);
        }
        let index = if files.contains("model_index.json") { "" } else { " (nor is there a model_index.json)" };
        return wrong(format!("is no whole model folder (diffusers layout): no {}{index}", missing.join(", no ")));
    }
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
    use super::*;
    use crate::invalid::is_invalid;

    fn refusal(name: &str) -> String {
        let error = open(name).unwrap_err();
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
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sd.ckpt");
        std::fs::write(&file, "").unwrap();
        assert!(refusal(file.to_str().unwrap()).contains("from_single_file"));
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
        assert!(open_parts(name, &[Part::Unet]).is_ok());
    }
}

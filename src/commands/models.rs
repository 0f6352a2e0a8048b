//! The name of a model to its files: a folder, a single file, the hub's `owner/name`, or `toybox`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow};

use super::{downloads, pickle};
use crate::invalid::{invalid, is_invalid};
pub use crate::model::Part;
use crate::model::family::has_two_text_encoders;
use crate::model::hub::{commit_of_snapshot, gguf_of};
use crate::model::{Files, HubName, SingleFile, toybox};
use crate::report;

/// The files of a whole model; those of its tokenizer in the folder `tokenizer` where one is given.
pub fn open(name: &str, tokenizer: Option<&Path>) -> Result<Files> {
    open_parts(name, tokenizer, Part::ALL)
}

/// The files of a model of which only `parts` are needed.
pub fn open_parts(name: &str, tokenizer: Option<&Path>, parts: &[Part]) -> Result<Files> {
    open_for("--model", name, tokenizer, parts)
}

/// [`open_parts`] of a model that `option` names, a flag or a setting.
pub fn open_for(option: &str, name: &str, tokenizer: Option<&Path>, parts: &[Part]) -> Result<Files> {
    let files = find(option, name, tokenizer, parts)?;
    let second = |part: &Part| Some((*part, part.second_files()?, part.second_in_words()));
    let mut needed: Vec<_> = parts.iter().map(|part| (*part, part.files(), part.in_words())).collect();
    if has_two_text_encoders(&files)? {
        needed.extend(parts.iter().filter_map(second));
    }
    needed.retain(|(_, one_of, _)| !one_of.iter().any(|file| files.contains(file)));
    if needed.is_empty() {
        return Ok(files);
    }
    let wrong = |cause: String| Err(invalid(format!("{option} {name}: {cause}")));
    if Path::new(name).is_file() {
        if needed.iter().all(|(part, ..)| *part == Part::Tokenizer) {
            let from = "the `tokenizer/` of any Stable Diffusion folder or a copy of openai/clip-vit-large-patch14 (vocab.json, \
                        merges.txt)";
            let beside = "beside the file as `tokenizer/`";
            let way_out = match option.starts_with("--") {
                true => format!("give --tokenizer DIR, {from}, or put it {beside}"),
                false => format!("put {from} {beside}"),
            };
            return wrong(format!("a single file has no tokenizer; {way_out}"));
        }
        // A tokenizer that is given is for both text encoders.
        let has_tokenizer = Part::Tokenizer.files().iter().any(|file| files.contains(file));
        needed.retain(|(part, ..)| *part != Part::Tokenizer || !has_tokenizer);
        let missing: Vec<&str> = needed.iter().map(|(_, _, words)| *words).collect();
        return wrong(format!("is no whole model: it lacks {}", missing.join(", ")));
    }
    let index = if files.contains("model_index.json") { "" } else { " (nor is there a model_index.json)" };
    let missing: Vec<&str> = needed.iter().map(|(_, one_of, _)| one_of[0]).collect();
    wrong(format!("is no whole model folder (diffusers layout): no {}{index}", missing.join(", no ")))
}

/// The files of a network in transformers' layout: a folder, or the hub's `owner/name`. `option` is what named it.
pub fn open_network(option: &str, name: &str) -> Result<Files> {
    let path = Path::new(name);
    if path.is_file() {
        return Err(invalid(format!(
            "{option} {name}: is a file; name its folder, with config.json and model.safetensors"
        )));
    }
    let folder = if path.is_dir() { path.to_owned() } else { from_hub(option, name, &[Part::Network])? };
    let files = Files::Folder(folder);
    match files.contains("config.json") {
        true => Ok(files),
        false => Err(invalid(format!("{option} {name}: is no network in transformers' layout: no config.json"))),
    }
}

fn find(option: &str, name: &str, tokenizer: Option<&Path>, parts: &[Part]) -> Result<Files> {
    let path = Path::new(name);
    let mut files = if name == "toybox" {
        Files::Embedded(toybox::FILES)
    } else if path.is_file() {
        single_file(option, name, path)?
    } else if path.is_dir() {
        Files::Folder(path.to_owned())
    } else {
        Files::Folder(from_hub(option, name, parts)?)
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

/// Whether it can be a model's name at all: a path that is there, or a name as the hub has them.
pub fn is_name(name: &str) -> bool {
    Path::new(name).exists() || HubName::parse(name).is_some()
}

/// A language model's GGUF file: itself, the only one in a folder, or one of a model on the hub. `option` is what named it.
pub fn language_model(option: &str, name: &str) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.is_file() {
        return Ok(path.to_owned());
    }
    let is_folder = path.is_dir();
    let folder = if is_folder { path.to_owned() } else { from_hub(option, name, &[Part::Gguf])? };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&folder)? {
        files.push(entry?.file_name().to_string_lossy().into_owned());
    }
    let n_files = files.iter().filter(|file| file.ends_with(".gguf")).count();
    // A cache may hold more sizes than the one that was downloaded now.
    match gguf_of(&files).filter(|_| n_files == 1 || !is_folder) {
        Some(file) => Ok(folder.join(file)),
        None => Err(invalid(format!("{option} {name}: holds {n_files} .gguf files; name one file"))),
    }
}

/// A whole model in one file.
fn single_file(option: &str, name: &str, path: &Path) -> Result<Files> {
    pickle::refuse(option, name, path)?;
    let file = SingleFile::open(path).map_err(|error| match is_invalid(&error) {
        true => invalid(format!("{option} {error:#}")),
        false => error.context(option.to_owned()),
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

/// The folder of a model on the hub, downloaded as far as it is needed. `option` is what named it.
pub fn from_hub(option: &str, name: &str, parts: &[Part]) -> Result<PathBuf> {
    let Some(on_hub) = HubName::parse(name) else {
        let way_out = match name.strip_prefix("hf:") {
            Some(_) => "is no name of a model on the hub; give hf:OWNER/NAME, or hf:OWNER/NAME@REVISION",
            None => "no such folder; check the path, or give OWNER/NAME for a model on the hub",
        };
        return Err(invalid(format!("{option} {name}: {way_out}")));
    };
    downloads::folder(&on_hub, parts).map_err(|error| {
        let nor_here = if name.starts_with("hf:") { "" } else { " (nor is there a folder of this name)" };
        let message = format!("{option} {error:#}{nor_here}");
        if is_invalid(&error) { invalid(message) } else { anyhow!(message) }
    })
}

/// The name by which a model is found again as it is now: a model on the hub by the commit that it was read from, any other by
/// its own name.
pub fn lasting_name(name: &str, files: &Files) -> String {
    let folder = match files {
        Files::Folder(folder) => folder,
        Files::WithTokenizer(model, _) | Files::WithLoras(model, _) => return lasting_name(name, model),
        Files::Embedded(_) | Files::Single(_) => return name.to_owned(),
    };
    let prefix = if name.starts_with("hf:") { "hf:" } else { "" };
    match (HubName::parse(name), commit_of_snapshot(folder)) {
        (Some(on_hub), Some(commit)) => format!("{prefix}{}@{commit}", on_hub.repository),
        _ => name.to_owned(),
    }
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
    fn what_is_neither_there_nor_a_name_of_the_hub_is_refused_with_the_way_out() {
        assert!(refusal("no-such-model").contains("no such folder; check the path"));
        assert!(refusal("hf:model").contains("give hf:OWNER/NAME"));
    }

    #[test]
    fn a_model_on_the_hub_is_named_by_its_commit() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let cached = Files::Folder(format!("/cache/models--a--b/snapshots/{commit}").into());
        assert_eq!(lasting_name("a/b", &cached), format!("a/b@{commit}"));
        assert_eq!(lasting_name("hf:a/b@main", &cached), format!("hf:a/b@{commit}"));
        assert_eq!(lasting_name("a/b", &cached.with_tokenizer("/t".into())), format!("a/b@{commit}"));
        assert_eq!(lasting_name("a/b", &Files::Folder("a/b".into())), "a/b");
        assert_eq!(lasting_name("toybox", &Files::Embedded(toybox::FILES)), "toybox");
    }

    #[test]
    fn a_file_that_is_no_whole_model_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("some.safetensors");
        for (tensor, reason) in [
            ("down_blocks.0.resnets.0.conv1.weight", "is one part of a diffusers folder"),
            ("lora_unet_down_blocks_0.lora_up.weight", "is a LoRA"),
            ("conditioner.embedders.0.model.x", "is Stable Diffusion XL's refiner"),
            ("layers.0.weight", "holds no tensor of a Stable Diffusion model"),
            ("model.diffusion_model.joint_blocks.0.x", "not Stable Diffusion 1, 2 or XL"),
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
        // Stable Diffusion XL's, by its U-Net, by its index, or by one of the second parts.
        let write = |file: &str, text: &str| {
            std::fs::create_dir_all(folder.path().join(file).parent().unwrap()).unwrap();
            std::fs::write(folder.path().join(file), text).unwrap();
        };
        let says_second = |message: &str| {
            assert!(message.contains("no text_encoder_2/config.json, no tokenizer_2/vocab.json"), "{message}");
        };
        write("unet/config.json", r#"{"addition_embed_type": "text_time"}"#);
        says_second(&refusal(name));
        write("unet/config.json", "{}");
        write("model_index.json", r#"{"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}"#);
        says_second(&refusal(name));
        write("model_index.json", r#"{"text_encoder_2": [null, null]}"#);
        assert!(!refusal(name).contains("_2/"));
        write("text_encoder_2/config.json", "{}");
        assert!(refusal(name).ends_with("no scheduler/scheduler_config.json, no tokenizer_2/vocab.json"));
    }
}

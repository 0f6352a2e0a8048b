//! Which files of a repository a model needs: configs, tokenizers, and of the weights one spelling, the same that
//! [`crate::model::Files`] reads.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use crate::model::Part;
use crate::model::files::{inside, weights_stem};

/// What tells a JeDi model from the others; few repositories have it.
pub const JEDI: &str = "jedi.json";
const MODEL_INDEX: &str = "model_index.json";

/// Of a language model that is there in several sizes, the first of these in its name: four bits lose little and fit most
/// machines.
const QUANTISATIONS: [&str; 3] = ["q4_k_m", "q8_0", "f16"];

/// The files of a tokenizer that are read, or handed on by `jedi convert`.
const TOKENIZER: [&str; 5] =
    ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];

/// The component that a language model's one file is.
const GGUF: &str = "gguf";

/// What stands beside a network at the top of its folder: how pictures are prepared, how words are cut.
const BESIDE: [&str; 4] = ["preprocessor_config.json", "tokenizer.json", "vocab.txt", "tokenizer_config.json"];

/// What a model needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needed {
    /// To be downloaded, in this order.
    pub files: Vec<String>,
    /// Not listed, though a model cannot do without them.
    pub missing: Vec<String>,
}

/// Looks for `parts` among the files `listed`. `read` gives the contents of one of these: lists of shards have to be read to
/// know what to download.
pub fn needed(listed: &[String], parts: &[Part], read: &mut dyn FnMut(&str) -> Result<Vec<u8>>) -> Result<Needed> {
    let mut search = Search { listed, read, found: Needed::default() };
    for file in [MODEL_INDEX, JEDI] {
        search.take_if_listed(file);
    }
    let components = search.components(parts)?;
    for component in &components {
        match component.as_str() {
            "scheduler" => search.take("scheduler/scheduler_config.json".into()),
            "" => {
                for file in BESIDE {
                    search.take_if_listed(file);
                }
                search.take_network("")?;
            }
            GGUF => search.take_language_model(),
            tokenizer if tokenizer.starts_with("tokenizer") => search.take_tokenizer(tokenizer),
            network => search.take_network(network)?,
        }
    }
    let mut found = search.found;
    // Small files first: what is wrong with them shows before gigabytes have come.
    found.files.sort_by_key(|file| file.ends_with(".safetensors") || file.ends_with(".gguf"));
    Ok(found)
}

/// The one of these files, at the top of a folder, that a language model is read from.
pub fn gguf_of(files: &[String]) -> Option<&str> {
    let mut files: Vec<&String> = files.iter().filter(|file| file.ends_with(".gguf") && !file.contains('/')).collect();
    files.sort();
    let of_size = |size: &&str| files.iter().find(|file| file.to_lowercase().contains(*size));
    QUANTISATIONS.iter().find_map(of_size).or(files.first()).map(|file| file.as_str())
}

struct Search<'a> {
    listed: &'a [String],
    read: &'a mut dyn FnMut(&str) -> Result<Vec<u8>>,
    found: Needed,
}

impl Search<'_> {
    fn is_listed(&self, file: &str) -> bool {
        self.listed.iter().any(|listed| listed == file)
    }

    fn take_if_listed(&mut self, file: &str) -> bool {
        let is_listed = self.is_listed(file);
        if is_listed {
            self.found.files.push(file.to_owned());
        }
        is_listed
    }

    fn take(&mut self, file: String) {
        if !self.take_if_listed(&file) {
            self.found.missing.push(file);
        }
    }

    /// The folders of the parts. A second text encoder (Stable Diffusion XL) is there if the index of the model names it.
    fn components(&mut self, parts: &[Part]) -> Result<Vec<String>> {
        let index: Option<BTreeMap<String, serde_json::Value>> = match self.is_listed(MODEL_INDEX) {
            true => Some(self.json(MODEL_INDEX)?),
            false => None,
        };
        let has_second = |component: &str| match &index {
            Some(index) => index.get(component).is_some_and(|class| !class[0].is_null()),
            None => self.listed.iter().any(|file| file.starts_with(&format!("{component}/"))),
        };
        let mut components = Vec::new();
        for part in parts {
            let (first, second) = match part {
                Part::Unet => ("unet", None),
                Part::Vae => ("vae", None),
                Part::TextEncoder => ("text_encoder", Some("text_encoder_2")),
                Part::Tokenizer => ("tokenizer", Some("tokenizer_2")),
                Part::Scheduler => ("scheduler", None),
                Part::Network => ("", None),
                Part::Gguf => (GGUF, None),
            };
            components.push(first.to_owned());
            components.extend(second.filter(|second| has_second(second)).map(str::to_owned));
        }
        Ok(components)
    }

    fn take_tokenizer(&mut self, folder: &str) {
        let is_there = |file: &str| self.is_listed(&format!("{folder}/{file}"));
        let is_whole = is_there("vocab.json") && is_there("merges.txt") || is_there("tokenizer.json");
        for file in TOKENIZER {
            self.take_if_listed(&format!("{folder}/{file}"));
        }
        if !is_whole {
            self.found.missing.push(format!("{folder}/vocab.json and merges.txt, or tokenizer.json"));
        }
    }

    fn take_language_model(&mut self) {
        match gguf_of(self.listed).map(str::to_owned) {
            // A part of a file that was cut up.
            Some(file) if file.contains("-of-0") => self.found.missing.push("one whole .gguf file".into()),
            Some(file) => self.take(file),
            None => self.found.missing.push(".gguf file".into()),
        }
        self.take_if_listed("tokenizer.json");
    }

    fn take_network(&mut self, folder: &str) -> Result<()> {
        self.take(inside(folder, "config.json"));
        let stem = weights_stem(folder);
        for variant in ["", ".fp16"] {
            if self.take_if_listed(&inside(folder, &format!("{stem}{variant}.safetensors"))) {
                return Ok(());
            }
            let index = inside(folder, &format!("{stem}.safetensors.index{variant}.json"));
            if self.take_if_listed(&index) {
                let ShardIndex { weight_map } = self.json(&index)?;
                let mut shards: Vec<String> = weight_map.into_values().map(|shard| inside(folder, &shard)).collect();
                shards.sort();
                shards.dedup();
                shards.into_iter().for_each(|shard| self.take(shard));
                return Ok(());
            }
        }
        self.found.missing.push(inside(folder, &format!("{stem}.safetensors")));
        Ok(())
    }

    fn json<T: serde::de::DeserializeOwned>(&mut self, file: &str) -> Result<T> {
        serde_json::from_slice(&(self.read)(file)?)
            .with_context(|| format!("{file}: is not the JSON that it should be"))
    }
}

#[derive(serde::Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SD: [&str; 12] = [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ];

    fn search(listed: &[&str], parts: &[Part], contents: &[(&str, &str)]) -> Needed {
        let listed: Vec<String> = listed.iter().map(|file| file.to_string()).collect();
        let mut read = |file: &str| {
            let known = contents.iter().find(|(name, _)| *name == file);
            Ok(known.map_or("{}", |(_, text)| text).as_bytes().to_vec())
        };
        needed(&listed, parts, &mut read).unwrap()
    }

    #[test]
    fn only_what_the_parts_need_is_taken_and_the_rest_is_named() {
        let vae = search(&SD, &[Part::Vae], &[]);
        let files = ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"];
        assert_eq!(vae, Needed { files: files.map(str::to_owned).into(), missing: vec![] });
        let text = search(&SD, &[Part::TextEncoder, Part::Tokenizer], &[]);
        let files = [
            "model_index.json",
            "text_encoder/config.json",
            "tokenizer/vocab.json",
            "tokenizer/merges.txt",
            "text_encoder/model.safetensors",
        ];
        assert_eq!(text, Needed { files: files.map(str::to_owned).into(), missing: vec![] });
        assert_eq!(search(&SD, Part::ALL, &[]).missing, ["unet/diffusion_pytorch_model.safetensors"]);
        assert_eq!(search(&["tokenizer/vocab.json"], &[Part::Tokenizer], &[]).missing.len(), 1);
    }

    #[test]
    fn of_a_network_at_the_top_its_words_and_its_preparation_are_taken_too() {
        let listed = [
            "README.md",
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "pytorch_model.bin",
            "vocab.txt",
        ];
        let found = search(&listed, &[Part::Network], &[]);
        let files = ["preprocessor_config.json", "vocab.txt", "config.json", "model.safetensors"];
        assert_eq!(found, Needed { files: files.map(str::to_owned).into(), missing: vec![] });
        assert_eq!(search(&["pytorch_model.bin"], &[Part::Network], &[]).missing, ["config.json", "model.safetensors"]);
    }

    #[test]
    fn half_precision_is_taken_where_there_is_no_other() {
        let weights = |listed: &[&str], index: &str| search(listed, &[Part::Unet], &[(index, SHARDS)]);
        const SHARDS: &str = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}"#;
        let half = "unet/diffusion_pytorch_model.fp16.safetensors";
        assert_eq!(weights(&["unet/config.json", half], "").files, ["unet/config.json", half]);
        for index in [
            "unet/diffusion_pytorch_model.safetensors.index.json",
            "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        ] {
            let both = [index, "unet/1.safetensors", "unet/2.safetensors"];
            let found = weights(&[&["unet/config.json"], &both[..]].concat(), index);
            assert_eq!((&found.files[1..], found.missing.len()), (&both.map(str::to_owned)[..], 0));
            let found = weights(&["unet/config.json", index, "unet/2.safetensors"], index);
            assert_eq!(found.missing, ["unet/1.safetensors"]);
        }
    }

    #[test]
    fn a_network_by_itself_lies_at_the_top() {
        const SHARDS: &str = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        let index = "model.safetensors.index.json";
        let listed = [
            "config.json",
            "pytorch_model.bin",
            "tokenizer.json",
            index,
            "1.safetensors",
            "2.safetensors",
            "README.md",
        ];
        let found = search(&listed, &[Part::Network], &[(index, SHARDS)]);
        let files = ["tokenizer.json", "config.json", index, "1.safetensors", "2.safetensors"];
        assert_eq!(found, Needed { files: files.map(str::to_owned).into(), missing: vec![] });
        let found = search(&["config.json", "pytorch_model.bin"], &[Part::Network], &[]);
        assert_eq!(found.missing, ["model.safetensors"]);
    }

    #[test]
    fn of_a_language_model_one_size_is_taken() {
        let found = |listed: &[&str]| search(listed, &[Part::Gguf], &[]);
        let sizes = ["M-Q2_K.gguf", "M-Q4_K_M.gguf", "M-Q8_0.gguf", "README.md"];
        assert_eq!(found(&sizes), Needed { files: vec!["M-Q4_K_M.gguf".into()], missing: vec![] });
        assert_eq!(found(&sizes[2..]).files, ["M-Q8_0.gguf"]);
        assert_eq!(found(&["other.gguf", "tokenizer.json"]).files, ["tokenizer.json", "other.gguf"]);
        assert_eq!(found(&["M-q4_k_m-00001-of-00002.gguf"]).missing, ["one whole .gguf file"]);
        assert_eq!(found(&["README.md"]).missing, [".gguf file"]);
    }

    #[test]
    fn shards_that_are_not_listed_are_never_asked_for() {
        let index = "unet/diffusion_pytorch_model.safetensors.index.json";
        let found = search(
            &["unet/config.json", index],
            &[Part::Unet],
            &[(index, r#"{"weight_map": {"a": "../../../../etc/passwd"}}"#)],
        );
        assert_eq!((found.files.len(), found.missing.len()), (2, 1));
    }

    #[test]
    fn the_second_text_encoder_is_needed_if_the_index_names_it() {
        let listed = ["model_index.json", "text_encoder/config.json", "text_encoder/model.safetensors"];
        let index = |class: &str| format!(r#"{{"text_encoder_2": {class}, "_class_name": "X"}}"#);
        let missing =
            |class: &str| search(&listed, &[Part::TextEncoder], &[("model_index.json", &index(class))]).missing;
        let second = ["text_encoder_2/config.json", "text_encoder_2/model.safetensors"];
        assert_eq!(missing(r#"["transformers", "CLIPTextModelWithProjection"]"#), second);
        assert!(missing("[null, null]").is_empty());
    }
}

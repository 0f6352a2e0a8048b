//! The files of a model (in a folder, in one file, or inside the binary) by their names in the diffusers layout, and the
//! weights in them.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use serde::de::DeserializeOwned;

use super::ldm::{TextKind, tokenizer_config};
use super::lora_file::LoraFile;
use super::params::Params;
use super::single_file::SingleFile;
use super::text::TextConfig;
use super::weight_file::WeightFile;
pub use super::weight_file::read_safetensors;
use super::weights::Weights;
use crate::device::Runtime;

/// Where the files of a model are.
#[derive(Clone, Debug)]
pub enum Files {
    /// A folder in the diffusers layout.
    Folder(PathBuf),
    /// Name inside the folder, contents.
    Embedded(&'static [(&'static str, &'static [u8])]),
    /// One `.safetensors` file in Stable Diffusion's own naming.
    Single(Arc<SingleFile>),
    /// A model and the folder of its tokenizer, which lies elsewhere.
    WithTokenizer(Box<Files>, PathBuf),
    /// A model with adapters merged into its weights, each so many times.
    WithLoras(Box<Files>, Arc<Vec<(LoraFile, f64)>>),
}

impl Files {
    /// The same model with the tokenizer in `folder`.
    pub fn with_tokenizer(self, folder: PathBuf) -> Self {
        Self::WithTokenizer(Box::new(self), folder)
    }

    /// The same model with adapters merged into it, each so many times; they must be for layers that it has.
    pub fn with_loras(self, loras: Vec<(LoraFile, f64)>) -> Result<Self> {
        let has = |component: &&str| self.contains(&format!("{component}/config.json"));
        let components = ["unet", "text_encoder", "text_encoder_2"].into_iter().filter(has);
        let components =
            components.map(|name| Ok((name, self.weights(name)?))).collect::<Result<Vec<(&str, Weights)>>>()?;
        loras.iter().try_for_each(|(lora, _)| lora.check(&components))?;
        Ok(Self::WithLoras(Box::new(self), Arc::new(loras)))
    }

    /// Whether the file is there.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::Folder(folder) => folder.join(name).is_file(),
            Self::Embedded(files) => files.iter().any(|(known, _)| *known == name),
            Self::Single(file) => file.text(name).is_some(),
            Self::WithTokenizer(model, tokenizer) => match place(model, name) {
                Place::Model => model.contains(name),
                Place::Tokenizer(own) => tokenizer.join(own).is_file(),
                Place::Built => true,
                Place::Nowhere => false,
            },
            Self::WithLoras(model, _) => model.contains(name),
        }
    }

    /// The file's path for people.
    pub fn describe(&self, name: &str) -> String {
        match self {
            Self::Folder(folder) => folder.join(name).display().to_string(),
            Self::Embedded(_) => format!("embedded model: {name}"),
            Self::Single(file) => format!("{}: {name}", file.path().display()),
            Self::WithTokenizer(model, tokenizer) => match place(model, name) {
                Place::Tokenizer(own) => tokenizer.join(own).display().to_string(),
                Place::Model | Place::Built | Place::Nowhere => model.describe(name),
            },
            Self::WithLoras(model, _) => model.describe(name),
        }
    }

    /// A file as it is.
    pub fn bytes(&self, name: &str) -> Result<Cow<'static, [u8]>> {
        match self {
            Self::Folder(folder) => {
                let path = folder.join(name);
                let bytes = std::fs::read(&path).with_context(|| {
                    format!("{}: cannot be read; a model folder needs it (diffusers layout)", path.display())
                })?;
                Ok(Cow::Owned(bytes))
            }
            Self::Embedded(files) => match files.iter().find(|(known, _)| *known == name) {
                Some((_, bytes)) => Ok(Cow::Borrowed(bytes)),
                None => bail!("embedded model: no file {name}"),
            },
            Self::Single(file) => {
                let text = file.text(name);
                Ok(Cow::Owned(text.with_context(|| format!("{}: is not in the file", self.describe(name)))?.into()))
            }
            Self::WithTokenizer(model, tokenizer) => match place(model, name) {
                Place::Tokenizer(own) => Self::Folder(tokenizer.clone()).bytes(own),
                Place::Model | Place::Nowhere => model.bytes(name),
                Place::Built => {
                    let config: TextConfig = model.json(SECOND_CONFIG)?;
                    let config = tokenizer_config(TextKind::XlOpenClip, config.max_position_embeddings);
                    Ok(Cow::Owned(serde_json::to_vec_pretty(&config)?))
                }
            },
            Self::WithLoras(model, _) => model.bytes(name),
        }
    }

    /// A file of UTF-8 text.
    pub fn text(&self, name: &str) -> Result<String> {
        String::from_utf8(self.bytes(name)?.into_owned())
            .with_context(|| format!("{}: not a text file", self.describe(name)))
    }

    /// A JSON file as `T`; errors name the file.
    pub fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        serde_json::from_slice(&self.bytes(name)?).with_context(|| self.describe(name))
    }

    /// The parameters of a component (`unet`, `vae`, `text_encoder`) where and how the networks run.
    pub fn params(&self, component: &str, runtime: &Runtime, is_trainable: bool) -> Result<Params> {
        Ok(Params::stored(self.weights(component)?, &runtime.device, runtime.dtype, is_trainable))
    }

    /// All tensors of a component (`unet`, `vae`, `text_encoder`) on the CPU in the file's dtype, and the file's name.
    pub fn tensors(&self, component: &str) -> Result<(BTreeMap<String, Tensor>, String)> {
        let weights = self.weights(component)?;
        Ok((weights.load_all()?, weights.origin().to_owned()))
    }

    /// The tensors of a component (`unet`, `vae`, `text_encoder`) by the names that diffusers gives them; none is read yet.
    /// An empty name is a network at the top of a folder, as transformers writes it.
    pub fn weights(&self, component: &str) -> Result<Weights> {
        match self {
            Self::Single(file) => return file.weights(component),
            Self::WithTokenizer(model, _) => return model.weights(component),
            Self::WithLoras(model, loras) => {
                let mut weights = model.weights(component)?;
                for (lora, strength) in loras.iter() {
                    lora.merge_into(&mut weights, component, *strength)?;
                }
                return Ok(weights);
            }
            Self::Folder(_) | Self::Embedded(_) => {}
        }
        let stem = weights_stem(component);
        for variant in ["", ".fp16"] {
            let single = inside(component, &format!("{stem}{variant}.safetensors"));
            if self.contains(&single) {
                return self.weights_in(std::slice::from_ref(&single), &single);
            }
            let index = inside(component, &format!("{stem}.safetensors.index{variant}.json"));
            if self.contains(&index) {
                let index_json: ShardIndex = self.json(&index)?;
                let shards: BTreeSet<String> =
                    index_json.weight_map.into_values().map(|shard| inside(component, &shard)).collect();
                return self.weights_in(&Vec::from_iter(shards), &index);
            }
        }
        let folder = self.describe(&inside(component, ""));
        for pickle in [format!("{stem}.bin"), "pytorch_model.bin".into()].map(|file| inside(component, &file)) {
            if self.contains(&pickle) {
                bail!(
                    "{}: is a Python pickle, which jedi does not open; load the model in Python and write it again with \
                     save_pretrained(FOLDER, safe_serialization=True)",
                    self.describe(&pickle)
                );
            }
        }
        bail!("{folder}: no {stem}.safetensors, {stem}.fp16.safetensors or index beside it")
    }

    fn weights_in(&self, names: &[String], origin: &str) -> Result<Weights> {
        let mut tensors = BTreeMap::new();
        for name in names {
            let file = match self {
                Self::Embedded(files) => match files.iter().find(|(known, _)| known == name) {
                    Some((_, bytes)) => WeightFile::embedded(bytes).with_context(|| self.describe(name))?,
                    None => bail!("embedded model: no file {name}"),
                },
                Self::Folder(folder) => WeightFile::open(&folder.join(name))?,
                Self::Single(_) | Self::WithTokenizer(..) | Self::WithLoras(..) => {
                    unreachable!("their weights are asked for elsewhere")
                }
            };
            tensors.extend(file.tensors());
        }
        // A buffer that older transformers wrote among the weights; it holds 0, 1, 2, ….
        tensors.retain(|name, _| !name.ends_with("position_ids"));
        Ok(Weights::new(self.describe(origin), tensors))
    }
}

/// Of a model with a second text encoder (Stable Diffusion XL).
const SECOND_CONFIG: &str = "text_encoder_2/config.json";

/// Where a file of a model is to be found that is given a tokenizer from elsewhere.
enum Place<'a> {
    Model,
    /// By its name in the tokenizer's own folder.
    Tokenizer(&'a str),
    /// It is written as it is asked for.
    Built,
    Nowhere,
}

/// The words are the given tokenizer's, for both text encoders where there are two. How a text is filled up the model says, if
/// it does; if not, the given tokenizer for the first, while Stable Diffusion XL's second has a way of its own.
fn place<'a>(model: &Files, name: &'a str) -> Place<'a> {
    let Some((folder, own)) = name.split_once('/') else { return Place::Model };
    let is_second = folder == "tokenizer_2" && model.contains(SECOND_CONFIG);
    if folder != "tokenizer" && !is_second {
        return Place::Model;
    }
    let (config, special_tokens) = ("tokenizer_config.json", "special_tokens_map.json");
    if own != config && own != special_tokens {
        return Place::Tokenizer(own);
    }
    if model.contains(&format!("{folder}/{config}")) {
        return Place::Model;
    }
    match (is_second, own == config) {
        (false, _) => Place::Tokenizer(own),
        (true, true) => Place::Built,
        (true, false) => Place::Nowhere,
    }
}

/// The name of a component's weight file, without suffix.
pub fn weights_stem(component: &str) -> &'static str {
    match component {
        "" => "model",
        text if text.starts_with("text_encoder") => "model",
        _ => "diffusion_pytorch_model",
    }
}

/// The name of a component's file; of a network at the top of its folder, the file's own.
pub fn inside(component: &str, file: &str) -> String {
    if component.is_empty() { file.to_owned() } else { format!("{component}/{file}") }
}

#[derive(serde::Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

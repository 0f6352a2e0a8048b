//! The files of a model (in a folder, in one file, or inside the binary) by their names in the diffusers layout, and the
//! weights in them.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use serde::de::DeserializeOwned;

use super::lora_file::LoraFile;
use super::params::Params;
use super::single_file::SingleFile;
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

/// How a tokenizer pads. Where the model itself says so, its word counts, whatever tokenizer it is given.
const TOKENIZER_CONFIG: &str = "tokenizer/tokenizer_config.json";
/// Says the same in older files.
const SPECIAL_TOKENS: &str = "tokenizer/special_tokens_map.json";

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
            Self::WithTokenizer(model, tokenizer) => match in_tokenizer(model, name) {
                Some(own) => tokenizer.join(own).is_file(),
                None => model.contains(name),
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
            Self::WithTokenizer(model, tokenizer) => match in_tokenizer(model, name) {
                Some(own) => tokenizer.join(own).display().to_string(),
                None => model.describe(name),
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
            Self::WithTokenizer(model, tokenizer) => match in_tokenizer(model, name) {
                Some(own) => Self::Folder(tokenizer.clone()).bytes(own),
                None => model.bytes(name),
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
            let single = format!("{component}/{stem}{variant}.safetensors");
            if self.contains(&single) {
                return self.weights_in(std::slice::from_ref(&single), &single);
            }
            let index = format!("{component}/{stem}.safetensors.index{variant}.json");
            if self.contains(&index) {
                let index_json: ShardIndex = self.json(&index)?;
                let shards: BTreeSet<String> =
                    index_json.weight_map.into_values().map(|shard| format!("{component}/{shard}")).collect();
                return self.weights_in(&Vec::from_iter(shards), &index);
            }
        }
        let folder = self.describe(&format!("{component}/"));
        for pickle in [format!("{component}/{stem}.bin"), format!("{component}/pytorch_model.bin")] {
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

/// The name inside the tokenizer's own folder of a file that is to be found there.
fn in_tokenizer<'a>(model: &Files, name: &'a str) -> Option<&'a str> {
    let own = name.strip_prefix("tokenizer/")?;
    let tells_padding = name == TOKENIZER_CONFIG || name == SPECIAL_TOKENS;
    (!tells_padding || !model.contains(TOKENIZER_CONFIG)).then_some(own)
}

/// The name of a component's weight file, without suffix.
pub fn weights_stem(component: &str) -> &'static str {
    if component.starts_with("text_encoder") { "model" } else { "diffusion_pytorch_model" }
}

#[derive(serde::Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

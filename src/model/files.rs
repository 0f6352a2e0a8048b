//! The files of a model, in a folder or inside the binary, and the tensors in them.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor, safetensors::MmapedSafetensors};
use serde::de::DeserializeOwned;

use super::params::Params;
use crate::device::Runtime;

/// Where the files of a model are.
#[derive(Clone, Debug)]
pub enum Files {
    /// A folder in the diffusers layout.
    Folder(PathBuf),
    /// Name inside the folder, contents.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

impl Files {
    /// Whether the file is there.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::Folder(folder) => folder.join(name).is_file(),
            Self::Embedded(files) => files.iter().any(|(known, _)| *known == name),
        }
    }

    /// The file's path for people.
    pub fn describe(&self, name: &str) -> String {
        match self {
            Self::Folder(folder) => folder.join(name).display().to_string(),
            Self::Embedded(_) => format!("embedded model: {name}"),
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
        let (tensors, origin) = self.tensors(component)?;
        Ok(Params::checkpoint(tensors, origin, &runtime.device, runtime.dtype, is_trainable))
    }

    /// All tensors of a component (`unet`, `vae`, `text_encoder`) on the CPU in the file's dtype, and the file's name.
    pub fn tensors(&self, component: &str) -> Result<(BTreeMap<String, Tensor>, String)> {
        let stem = weights_stem(component);
        for variant in ["", ".fp16"] {
            let single = format!("{component}/{stem}{variant}.safetensors");
            if self.contains(&single) {
                return Ok((self.tensors_of(std::slice::from_ref(&single))?, self.describe(&single)));
            }
            let index = format!("{component}/{stem}.safetensors.index{variant}.json");
            if self.contains(&index) {
                let index_json: ShardIndex = self.json(&index)?;
                let shards: BTreeSet<String> =
                    index_json.weight_map.into_values().map(|shard| format!("{component}/{shard}")).collect();
                return Ok((self.tensors_of(&Vec::from_iter(shards))?, self.describe(&index)));
            }
        }
        bail!(
            "{}: no {stem}.safetensors, {stem}.fp16.safetensors or index beside it",
            self.describe(&format!("{component}/"))
        )
    }

    fn tensors_of(&self, names: &[String]) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        for name in names {
            match self {
                Self::Folder(folder) => tensors.extend(read_safetensors(&folder.join(name))?),
                Self::Embedded(_) => {
                    let loaded = candle_core::safetensors::load_buffer(&self.bytes(name)?, &Device::Cpu);
                    tensors.extend(loaded.with_context(|| self.describe(name))?);
                }
            }
        }
        // A buffer that older transformers wrote among the weights; it holds 0, 1, 2, ….
        tensors.retain(|name, _| !name.ends_with("position_ids"));
        Ok(tensors)
    }
}

/// The name of a component's weight file, without suffix.
pub fn weights_stem(component: &str) -> &'static str {
    if component.starts_with("text_encoder") { "model" } else { "diffusion_pytorch_model" }
}

#[derive(serde::Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

/// Reads every tensor of a `.safetensors` file through a memory map.
pub fn read_safetensors(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let describe = || format!("{}: not a readable safetensors file", path.display());
    // SAFETY: as every user of mapped files, we rely on nobody rewriting the file meanwhile; jedi itself only renames.
    let file = unsafe { MmapedSafetensors::new(path) }.with_context(describe)?;
    let names: Vec<String> = file.tensors().into_iter().map(|(name, _)| name).collect();
    names
        .into_iter()
        .map(|name| {
            let tensor = file.load(&name, &Device::Cpu).with_context(describe)?;
            Ok((name, tensor))
        })
        .collect()
}

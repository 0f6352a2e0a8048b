//! Networks of transformers' layout as models of the pipeline: which one it is, what it takes, and what is still missing of it.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::commands::{downloads, models};
use crate::invalid::invalid;
use crate::model::hub::commit_of_snapshot;
use crate::model::{Files, HubName, Part};
use crate::sha256::{sha256_hex, sha256_of_file};
use crate::synth::tool::Model;

/// Memory that a picture on its way through a network takes at most, in bytes.
const ON_ITS_WAY: u64 = 2_000_000_000;

/// The network that `option` names, and its files unless only `planned`: then nothing is downloaded.
pub fn network(option: &str, name: &str, version: u32, is_planned: bool) -> Result<(Model, Option<Files>)> {
    let mut model = Model { name: name.to_owned(), version, ..Model::default() };
    if let (true, false, Some(on_hub)) = (is_planned, Path::new(name).is_dir(), HubName::parse(name)) {
        let plan = downloads::plan(&on_hub, &[Part::Network]).with_context(|| option.to_owned())?;
        (model.hash, model.disk_bytes, model.missing_bytes) = (plan.commit, plan.n_bytes, plan.n_missing);
        model.memory_bytes = plan.n_bytes + ON_ITS_WAY;
        return Ok((model, None));
    }
    let files = models::open_network(option, name)?;
    let Files::Folder(folder) = &files else {
        return Err(invalid(format!("{option} {name}: is no folder")));
    };
    let mut hashes = String::new();
    let mut entries = std::fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let (path, file) = (entry.path(), entry.file_name().display().to_string());
        if !path.is_file() || ![".safetensors", ".json", ".txt"].iter().any(|suffix| file.ends_with(suffix)) {
            continue;
        }
        model.disk_bytes += std::fs::metadata(&path)?.len();
        if commit_of_snapshot(folder).is_none() {
            hashes += &format!("{file} {}\n", sha256_of_file(&path)?);
        }
    }
    model.hash = commit_of_snapshot(folder).map_or_else(|| sha256_hex(hashes.as_bytes()), str::to_owned);
    model.memory_bytes = model.disk_bytes + ON_ITS_WAY;
    Ok((model, Some(files)))
}

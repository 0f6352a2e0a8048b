//! `--lora`: adapters that are merged into the model.

use anyhow::{Context as _, Result};

use super::record::RecordedLora;
use crate::invalid::invalid;
use crate::model::Files;
use crate::model::lora_file::LoraFile;
use crate::sha256::sha256_of_file;

/// The model with the adapters merged; fills in the files' hashes, or holds the files to them.
pub fn merged(model: Files, loras: &mut [RecordedLora]) -> Result<Files> {
    if loras.is_empty() {
        return Ok(model);
    }
    let mut opened = vec![];
    for lora in loras {
        let name = lora.path.display();
        if !lora.path.is_file() {
            return Err(invalid(format!("--lora {name}: no such file; check the path")));
        }
        let sha256 = sha256_of_file(&lora.path)?;
        if !lora.sha256.is_empty() && lora.sha256 != sha256 {
            return Err(invalid(format!(
                "--from: {name} is not the file any more that the picture was made with; bring that back, or give this one \
                 with --lora"
            )));
        }
        opened.push((LoraFile::open(&lora.path).context("--lora")?, lora.weight));
        lora.sha256 = sha256;
    }
    model.with_loras(opened).context("--lora")
}

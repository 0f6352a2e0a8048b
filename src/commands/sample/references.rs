//! The reference pictures that the user names.

use anyhow::{Context as _, Result};
use image::RgbImage;

use crate::cli::{self, SampleArgs};
use crate::data::{self, load_reference};
use crate::invalid::invalid;
use crate::report;
use crate::sha256::sha256_hex;

/// A reference as the user gave it.
pub struct Shown {
    pub image: RgbImage,
    pub caption: Option<String>,
    pub path: String,
    pub sha256: String,
}

pub fn read_references(args: &SampleArgs) -> Result<Vec<Shown>> {
    let fit = match args.fit {
        cli::Fit::Crop => data::Fit::Crop,
        cli::Fit::Pad => data::Fit::Pad,
    };
    let read = |reference: &cli::Reference| {
        let path = reference.image.display().to_string();
        if !reference.image.exists() {
            return Err(invalid(format!("--ref {path}: no such file; check the path")));
        }
        let (image, notices) = load_reference(&reference.image, fit)?;
        for notice in notices {
            report::warn(format!("{path}: {notice}"));
        }
        let bytes = std::fs::read(&reference.image).with_context(|| path.clone())?;
        Ok(Shown { image, caption: reference.caption.clone(), path, sha256: sha256_hex(&bytes) })
    };
    args.references.iter().map(read).collect()
}

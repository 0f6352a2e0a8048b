//! The reference pictures that are asked for, each read once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context as _, Result};
use image::RgbImage;

use super::asked::AskedReference;
use super::plan::Wish;
use crate::cli;
use crate::data::{self, load_reference};
use crate::invalid::invalid;
use crate::report;
use crate::sha256::sha256_hex;

/// A reference as it is used.
#[derive(Clone)]
pub struct Shown {
    pub picture: Rc<Picture>,
    pub caption: Option<String>,
    pub path: PathBuf,
}

/// Square, of the size that is sampled.
pub struct Picture {
    pub image: RgbImage,
    /// Of the file.
    pub sha256: String,
}

/// Refuses files that are not there, before anything large is loaded.
pub fn check_there(wishes: &[Wish]) -> Result<()> {
    let named = wishes.iter().flat_map(|wish| wish.asked.refs.iter().flatten().map(move |reference| (wish, reference)));
    let Some((wish, missing)) = named.into_iter().find(|(_, reference)| !reference.image.exists()) else {
        return Ok(());
    };
    let path = missing.image.display();
    let origin = wish.origin.as_ref().map_or(String::new(), |origin| format!("{origin}: "));
    Err(invalid(match &missing.sha256 {
        None => format!("{origin}--ref {path}: no such file; check the path"),
        Some(_) => format!("--from: its reference {path} is not there; give the file with --ref"),
    }))
}

/// Reads pictures, each once for each size.
pub struct Shelf {
    fit: data::Fit,
    pictures: HashMap<(PathBuf, usize), Rc<Picture>>,
}

impl Shelf {
    /// An empty one.
    pub fn new(fit: cli::Fit) -> Self {
        let fit = match fit {
            cli::Fit::Crop => data::Fit::Crop,
            cli::Fit::Pad => data::Fit::Pad,
        };
        Self { fit, pictures: HashMap::new() }
    }

    /// A reference of `size` pixels; of an earlier picture's it is made sure that it is the same file.
    pub fn shown(&mut self, asked: &AskedReference, size: usize) -> Result<Shown> {
        let picture = self.picture(&asked.image, size)?;
        if asked.sha256.as_ref().is_some_and(|sha256| *sha256 != picture.sha256) {
            return Err(invalid(format!(
                "--from: {} is not the file any more that the picture was made with; bring that back, or give this one \
                 with --ref",
                asked.image.display()
            )));
        }
        Ok(Shown { picture, caption: asked.caption.clone(), path: asked.image.clone() })
    }

    fn picture(&mut self, path: &Path, size: usize) -> Result<Rc<Picture>> {
        let key = (path.to_owned(), size);
        if let Some(known) = self.pictures.get(&key) {
            return Ok(known.clone());
        }
        let (image, notices) = load_reference(path, self.fit)?;
        for notice in notices {
            report::warn(format!("{}: {notice}", path.display()));
        }
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        let image = data::resized(&image, size as u32);
        let picture = Rc::new(Picture { image, sha256: sha256_hex(&bytes) });
        self.pictures.insert(key, picture.clone());
        Ok(picture)
    }
}

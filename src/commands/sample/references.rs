//! The reference pictures that are asked for, each read once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context as _, Result};
use image::RgbImage;

use super::asked::{AskedMask, AskedReference};
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
    pub weight: f64,
    /// White where the subject is, and its file.
    pub mask: Option<(Rc<Picture>, PathBuf)>,
}

/// Square, of the size that is sampled.
pub struct Picture {
    pub image: RgbImage,
    /// Of the file.
    pub sha256: String,
}

/// Refuses files that are not there, before anything large is loaded.
pub fn check_there(wishes: &[Wish]) -> Result<()> {
    let missing = |flag: &str, path: &Path, wish: &Wish, is_recorded: bool| {
        let origin = wish.origin.as_ref().map_or(String::new(), |origin| format!("{origin}: "));
        let path = path.display();
        Err(invalid(match is_recorded {
            false => format!("{origin}{flag} {path}: no such file; check the path"),
            true => format!("--from: {path} is not there; give the file with {flag}"),
        }))
    };
    for wish in wishes {
        for reference in wish.asked.refs.iter().flatten() {
            if !reference.image.exists() {
                return missing("--ref", &reference.image, wish, reference.sha256.is_some());
            }
            if let Some(mask) = reference.mask.as_ref().filter(|mask| !mask.path.exists()) {
                return missing("--ref-mask", &mask.path, wish, mask.sha256.is_some());
            }
        }
    }
    Ok(())
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
        let picture = self.known_picture(&asked.image, asked.sha256.as_ref(), size)?;
        let mask = match &asked.mask {
            None => None,
            Some(AskedMask { path, sha256 }) => {
                let mask = self.known_picture(path, sha256.as_ref(), size)?;
                if mask.image.pixels().all(|pixel| pixel.0.iter().all(|value| *value < 128)) {
                    let name = path.display();
                    return Err(invalid(format!(
                        "--ref-mask {name}: is black all over; paint the subject white, or leave the mask out"
                    )));
                }
                Some((mask, path.clone()))
            }
        };
        let (caption, path) = (asked.caption.clone(), asked.image.clone());
        Ok(Shown { picture, caption, path, weight: asked.weight.unwrap_or(1.0), mask })
    }

    /// A picture; where it is known what it must be, it is made sure of.
    fn known_picture(&mut self, path: &Path, expected: Option<&String>, size: usize) -> Result<Rc<Picture>> {
        let picture = self.picture(path, size)?;
        if expected.is_some_and(|sha256| *sha256 != picture.sha256) {
            return Err(invalid(format!(
                "--from: {} is not the file any more that the picture was made with; bring that back, or give this one \
                 with --ref",
                path.display()
            )));
        }
        Ok(picture)
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

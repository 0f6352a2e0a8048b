//! A set of pictures of one subject, in memory.

use std::path::Path;

use anyhow::{Context, Result};
use image::{GrayImage, RgbImage};

use super::members::{Members, is_picture, members_from_set};
use super::resized;
use crate::whole_file::write_whole;

/// n square pictures of one subject with their captions.
#[derive(Clone, Debug, Default)]
pub struct ImageSet {
    /// Name of the set in its data set (file name without suffixes).
    pub key: String,
    /// Squares of one size.
    pub images: Vec<RgbImage>,
    /// One a picture.
    pub captions: Vec<String>,
    /// Where the subject is (255), one a picture; empty where nobody knows.
    pub masks: Vec<GrayImage>,
    /// What else is known: subject, class, source, seeds, scores, boxes; `Null` where nothing is.
    pub metadata: serde_json::Value,
}

impl ImageSet {
    /// Pictures and masks with `side` pixels a side.
    pub fn resized(mut self, side: u32) -> Self {
        self.images.iter_mut().for_each(|image| *image = resized(image, side));
        self.masks.iter_mut().for_each(|mask| *mask = resized(mask, side));
        self
    }
}

/// Writes a set into an existing folder as `<key>.png` (a strip), `<key>.txt` and the rest that it has. A set whose
/// picture is there is whole.
pub fn write_strip(set: &ImageSet, folder: &Path) -> Result<()> {
    let members = members_from_set(set).with_context(|| format!("set {}", set.key))?;
    write_members(&set.key, &members, folder)
}

/// Writes a sample's files, the picture last: readers find a sample by its picture.
pub fn write_members(key: &str, members: &Members, folder: &Path) -> Result<()> {
    let (pictures, rest): (Vec<_>, Vec<_>) = members.iter().partition(|(suffix, _)| is_picture(suffix));
    for (suffix, bytes) in rest.into_iter().chain(pictures) {
        write_whole(&folder.join(format!("{key}.{suffix}")), bytes)?;
    }
    Ok(())
}

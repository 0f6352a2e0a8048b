//! The pictures of a set that is drawn from a clip or an object.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use image::RgbImage;

use crate::data::deal::Content;
use crate::data::decode;
use crate::data::header::{START_BYTES, upright_size};
use crate::data::video::{Ffmpeg, VideoFile};

/// The pictures of a set, not decoded.
pub enum Drawn {
    /// Name and bytes of each.
    Files(Vec<(String, Vec<u8>)>),
    /// Those shown at so many seconds of a video, which may be a file for this purpose alone.
    Frames { video: PathBuf, seconds: Vec<f64>, size: (u32, u32), _written: Option<VideoFile> },
}

impl Drawn {
    /// How many there are.
    pub fn n_images(&self) -> usize {
        match self {
            Drawn::Files(files) => files.len(),
            Drawn::Frames { seconds, .. } => seconds.len(),
        }
    }

    /// Widths and heights.
    pub fn sizes(&self) -> Result<Vec<(u32, u32)>> {
        let files = match self {
            Drawn::Frames { seconds, size, .. } => return Ok(vec![*size; seconds.len()]),
            Drawn::Files(files) => files,
        };
        files.iter().map(|(name, bytes)| upright_size(bytes).with_context(|| name.clone())).collect()
    }

    /// Them as they are stored.
    pub fn decoded(&self, ffmpeg: Option<&Ffmpeg>) -> Result<Vec<RgbImage>> {
        match self {
            Drawn::Files(files) => {
                files.iter().map(|(name, bytes)| Ok(decode(bytes).with_context(|| name.clone())?.image)).collect()
            }
            Drawn::Frames { video, seconds, .. } => {
                let ffmpeg = ffmpeg.context("is a video")?;
                seconds.iter().map(|&at| ffmpeg.frame(video, at)).collect()
            }
        }
    }

    /// Fingerprints what they follow from.
    pub fn content(&self, mut content: Content) -> Result<String> {
        match self {
            Drawn::Files(files) => files.iter().for_each(|(_, bytes)| content.part(bytes)),
            Drawn::Frames { video, seconds, .. } => {
                content.part(&fs::read(video)?);
                seconds.iter().for_each(|at| content.part(&at.to_le_bytes()));
            }
        }
        Ok(content.finish())
    }
}

/// How many things lie so far apart in a length, at most `images`, at least 1.
pub fn n_apart(length: f64, apart: f64, images: usize) -> usize {
    let most = if apart > 0.0 { (length / apart) as usize } else { usize::MAX };
    images.min(most).max(1)
}

/// Width and height of the upright picture in a file.
pub fn size_of_file(path: &Path) -> Result<(u32, u32)> {
    let mut start = vec![];
    fs::File::open(path)?.take(START_BYTES).read_to_end(&mut start)?;
    match upright_size(&start) {
        Err(_) if start.len() as u64 == START_BYTES => upright_size(&fs::read(path)?),
        size => size,
    }
}

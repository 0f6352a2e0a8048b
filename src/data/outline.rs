//! What the files of a set promise before a picture of it is decoded: headers, captions and JSON are read, by the same rules
//! as in `members`. With it a whole data set is checked before the work begins.

use anyhow::{Context, Result, ensure};

use super::Layout;
use super::header::{START_BYTES, upright_size};
use super::members::{caption_texts, check_mask_names, loose_pictures, metadata, one_picture, strip_length};

/// A set without its pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetOutline {
    /// The sample's place, for messages.
    pub label: String,
    /// Pictures of the set.
    pub n_images: usize,
    /// One a picture.
    pub captions: Vec<String>,
}

/// Reads one of a sample's files by its ending, all of it or its first bytes.
pub type ReadMember<'a> = &'a dyn Fn(&str, Option<u64>) -> Result<Vec<u8>>;

/// The outline of the sample that has files of these endings. Errors name the file by its ending; the caller puts `label`
/// in front.
pub fn outline(label: &str, suffixes: &[&str], layout: Layout, read: ReadMember) -> Result<SetOutline> {
    let loose = if layout == Layout::Sets { loose_pictures(suffixes)? } else { vec![] };
    for suffix in &loose {
        picture_size(suffix, read)?;
    }
    let n_images = if loose.is_empty() {
        let suffix = one_picture(suffixes)?;
        let (width, height) = picture_size(suffix, read)?;
        match layout {
            Layout::Sets => strip_length(width, height).with_context(|| format!(".{suffix}"))? as usize,
            Layout::Single => 1,
        }
    } else {
        loose.len()
    };
    let text = |suffix: &str| match suffixes.contains(&suffix) {
        true => read(suffix, None).map(Some).with_context(|| format!(".{suffix}")),
        false => Ok(None),
    };
    let captions = caption_texts(text("txt")?.as_deref(), n_images, layout)?;
    check_mask_names(suffixes, n_images)?;
    metadata(text("json")?.as_deref())?;
    Ok(SetOutline { label: label.to_owned(), n_images, captions })
}

fn picture_size(suffix: &str, read: ReadMember) -> Result<(u32, u32)> {
    let size = || {
        let start = read(suffix, Some(START_BYTES))?;
        ensure!(!start.is_empty(), "the file is empty; copy or download it again");
        match upright_size(&start) {
            Ok(size) => Ok(size),
            // A long colour profile may stand before the size.
            Err(_) if start.len() as u64 == START_BYTES => upright_size(&read(suffix, None)?),
            Err(error) => Err(error),
        }
    };
    size().with_context(|| format!(".{suffix}"))
}

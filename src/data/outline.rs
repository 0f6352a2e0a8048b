//! What the files of a set promise before a picture of it is decoded: headers, captions and JSON are read, by the same rules
//! as in `members`. With it a whole data set is checked before the work begins.

use anyhow::{Context, Result, ensure};

use super::header::{START_BYTES, upright_size};
use super::members::{caption_texts, check_mask_names, loose_pictures, metadata, one_picture, strip_length};
use super::{Layout, Rules};

/// A set without its pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetOutline {
    /// The sample's place, for messages.
    pub label: String,
    /// Pictures of the set.
    pub n_images: usize,
    /// One a picture.
    pub captions: Vec<String>,
    /// Width and height of each picture as it is stored; empty where only decoding would tell.
    pub sizes: Vec<(u32, u32)>,
    /// Why the rules of the source pass it over; None: they do not.
    pub unwanted: Option<String>,
}

/// Reads one of a sample's files by its ending, all of it or its first bytes.
pub type ReadMember<'a> = &'a dyn Fn(&str, Option<u64>) -> Result<Vec<u8>>;

/// The outline of the sample `key` that has files of these endings; its label is the key. Errors name the file by its ending.
pub fn outline(key: &str, suffixes: &[&str], layout: Layout, rules: &Rules, read: ReadMember) -> Result<SetOutline> {
    let loose = if layout == Layout::Sets { loose_pictures(suffixes)? } else { vec![] };
    let sizes = if loose.is_empty() {
        let suffix = one_picture(suffixes)?;
        let (width, height) = picture_size(suffix, read)?;
        match layout {
            Layout::Sets => {
                let n_images = strip_length(width, height).with_context(|| format!(".{suffix}"))?;
                vec![(width, width); n_images as usize]
            }
            Layout::Single => vec![(width, height)],
        }
    } else {
        loose.iter().map(|suffix| picture_size(suffix, read)).collect::<Result<_>>()?
    };
    let n_images = sizes.len();
    let text = |suffix: &str| match suffixes.contains(&suffix) {
        true => read(suffix, None).map(Some).with_context(|| format!(".{suffix}")),
        false => Ok(None),
    };
    let json = metadata(text("json")?.as_deref())?;
    let from_file = || caption_texts(text("txt")?.as_deref(), n_images, layout);
    let captions = rules.caption.captions(key, &json, n_images, from_file)?;
    check_mask_names(suffixes, n_images)?;
    let unwanted = rules.reason_against(&sizes, &json);
    Ok(SetOutline { label: key.to_owned(), n_images, captions, sizes, unwanted })
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

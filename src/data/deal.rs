//! What passes between a source of sets and those who train on them: what a step wants of a set, and what it gets.

use anyhow::Result;
use image::{GrayImage, RgbImage};
use sha2::{Digest, Sha256};

use super::ImageSet;

/// What a step wants of a set.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// At least so many pictures.
    pub n_images: usize,
    /// Which cut of the set; 0 is the plain one.
    pub variant: u64,
    /// Whether pictures with this [`DealtSet::content`] need not be decoded; None: all are, and no content is told.
    pub is_known: Option<&'a dyn Fn(&str) -> bool>,
    /// Whether masks are wanted, which are decoded with the pictures, known or not.
    pub masks: bool,
}

/// What a step gets.
#[derive(Debug)]
pub enum Dealt {
    /// A set to train on.
    Set(DealtSet),
    /// Nothing is wrong with it, but the rules of its source pass it over; why.
    PassedOver(String),
    /// It holds only so many pictures.
    TooSmall(usize),
}

/// A set to train on.
#[derive(Debug)]
pub struct DealtSet {
    /// One a picture.
    pub captions: Vec<String>,
    /// Squares of one size; None where they are known.
    pub images: Option<Vec<RgbImage>>,
    /// Where the subject is (255), one a picture, of their size; empty where nobody knows, or wants to.
    pub masks: Vec<GrayImage>,
    /// SHA-256 of all that these pixels follow from; empty where nobody asked.
    pub content: String,
}

impl DealtSet {
    /// Pictures of the set.
    pub fn n_images(&self) -> usize {
        self.captions.len()
    }
}

/// Changes where the same files give other pixels: known pixels are then made anew.
const PIXELS_VERSION: u32 = 1;

/// Deals a set that is there already.
pub fn deal_whole(set: ImageSet, wanted: Wanted) -> Dealt {
    let ImageSet { images, captions, masks, .. } = set;
    let masks = if wanted.masks { masks } else { vec![] };
    if images.len() < wanted.n_images {
        return Dealt::TooSmall(images.len());
    }
    let (mut content, mut is_known) = (String::new(), false);
    if let Some(known) = wanted.is_known {
        let mut digest = Content::new("pixels");
        for image in &images {
            digest.part(&image.width().to_le_bytes());
            digest.part(image.as_raw());
        }
        content = digest.finish();
        is_known = known(&content);
    }
    Dealt::Set(DealtSet { captions, images: (!is_known).then_some(images), masks, content })
}

/// Pictures of one size, and where the subject is in each; no masks where nobody knows, or wants to.
pub struct Squares {
    /// In the set's order.
    pub images: Vec<RgbImage>,
    /// One a picture, or none.
    pub masks: Vec<GrayImage>,
}

/// Deals what `decode` makes of files: not called where `content` is known and no masks are wanted.
pub fn deal_decoded(
    captions: Vec<String>,
    wanted: Wanted,
    content: impl FnOnce() -> Result<String>,
    decode: impl FnOnce() -> Result<Squares>,
) -> Result<Dealt> {
    let content = wanted.is_known.map(|known| content().map(|content| (known(&content), content))).transpose()?;
    let (is_known, content) = content.unwrap_or_default();
    if is_known && !wanted.masks {
        return Ok(Dealt::Set(DealtSet { captions, images: None, masks: vec![], content }));
    }
    let Squares { images, masks } = decode()?;
    Ok(Dealt::Set(DealtSet { captions, images: Some(images), masks, content }))
}

/// Fingerprints what pixels follow from.
pub struct Content(Sha256);

impl Content {
    /// `rules`: all that is not bytes of files.
    pub fn new(rules: &str) -> Self {
        let mut content = Self(Sha256::new());
        content.part(&PIXELS_VERSION.to_le_bytes());
        content.part(rules.as_bytes());
        content
    }

    /// Adds bytes; where one part ends and the next begins counts.
    pub fn part(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    /// 64 hexadecimal digits.
    pub fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_set_comes_without_pictures_and_a_small_one_not_at_all() {
        let set = || ImageSet {
            images: vec![RgbImage::new(4, 4), RgbImage::new(4, 4)],
            captions: vec!["a".into(), "b".into()],
            ..Default::default()
        };
        let wanted = |n_images| Wanted { n_images, variant: 0, is_known: None, masks: false };
        let Dealt::Set(plain) = deal_whole(set(), wanted(2)) else { panic!() };
        assert!(plain.images.is_some() && plain.content.is_empty() && plain.n_images() == 2);
        assert!(matches!(deal_whole(set(), wanted(3)), Dealt::TooSmall(2)));
        let contents = std::cell::RefCell::new(vec![]);
        let knows = |content: &str| {
            contents.borrow_mut().push(content.to_owned());
            true
        };
        let Dealt::Set(known) = deal_whole(set(), Wanted { is_known: Some(&knows), ..wanted(2) }) else { panic!() };
        assert!(known.images.is_none() && known.content == contents.borrow()[0]);
        let mut other = set();
        other.images[1].put_pixel(3, 3, image::Rgb([0, 0, 1]));
        let Dealt::Set(other) = deal_whole(other, Wanted { is_known: Some(&knows), ..wanted(2) }) else { panic!() };
        assert_ne!(known.content, other.content);
    }

    #[test]
    fn where_parts_end_counts() {
        let of = |parts: &[&[u8]]| {
            let mut content = Content::new("r");
            parts.iter().for_each(|part| content.part(part));
            content.finish()
        };
        assert_ne!(of(&[b"ab", b"c"]), of(&[b"a", b"bc"]));
        assert_eq!(of(&[b"ab"]).len(), 64);
    }
}

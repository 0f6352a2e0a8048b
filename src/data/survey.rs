//! What a source holds: counts, set sizes, captions, what its rules pass over and what is broken.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashSet};
use std::hash::{Hash as _, Hasher as _};

use anyhow::Result;
use image::RgbImage;
use rayon::prelude::*;

use super::deal::{Dealt, Wanted};
use super::outline::SetOutline;
use super::sources::SetSource;

/// How closely a source is looked at.
#[derive(Clone, Copy, Debug)]
pub struct SurveySettings {
    /// Decode all pictures; else headers, captions and JSON alone are read.
    pub decodes: bool,
    /// Sets whose pictures are kept, evenly over the source (fewer where some are broken).
    pub n_shown: usize,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Survey {
    /// Samples in the source.
    pub n_samples: usize,
    /// Sets that training would be dealt, by their number of pictures.
    pub set_sizes: BTreeMap<usize, usize>,
    /// Shorter sides of their pictures in pixels, as they are stored, sorted.
    pub short_sides: Vec<u32>,
    /// Their captions.
    pub captions: CaptionSurvey,
    /// Samples that the source's rules pass over: place and reason.
    pub passed_over: Vec<String>,
    /// Samples and shards that cannot be read: place, cause and way out.
    pub broken: Vec<String>,
    /// Samples that are missing because a shard cannot be read, about.
    pub n_lost: usize,
    /// Sets to look at.
    pub shown: Vec<ShownSet>,
}

/// Of all captions.
#[derive(Debug, Default)]
pub struct CaptionSurvey {
    /// One a picture.
    pub n_captions: usize,
    /// Without a word.
    pub n_empty: usize,
    /// Different texts.
    pub n_different: usize,
    /// Words of all.
    pub n_words: usize,
    /// Words of the longest, and the set that it is in.
    pub longest: Option<(usize, String)>,
}

/// A set with its pictures.
#[derive(Debug)]
pub struct ShownSet {
    /// Its place.
    pub label: String,
    /// Squares of the source's size.
    pub images: Vec<RgbImage>,
    /// One a picture.
    pub captions: Vec<String>,
}

enum Seen {
    Fine(SetOutline, Option<ShownSet>),
    PassedOver(String),
    Broken(String),
}

/// Looks at all samples of a source; `on_sample` hears of each.
pub fn survey(source: &dyn SetSource, settings: SurveySettings, on_sample: &(dyn Fn() + Sync)) -> Survey {
    let n_samples = source.n_sets();
    let every = n_samples.div_ceil(settings.n_shown.max(1)).max(1);
    let look = |set_idx: usize| {
        let is_shown = settings.n_shown > 0 && set_idx.is_multiple_of(every);
        let seen = seen(source, set_idx, settings.decodes, is_shown);
        on_sample();
        seen.unwrap_or_else(|error| Seen::Broken(format!("{error:#}")))
    };
    let all: Vec<Seen> = (0..n_samples).into_par_iter().map(look).collect();
    let mut survey = Survey { n_samples, ..Default::default() };
    for fault in source.faults() {
        survey.broken.push(fault.message.clone());
        survey.n_lost += fault.n_lost;
    }
    let mut texts = HashSet::new();
    for seen in all {
        match seen {
            Seen::Fine(set, shown) => {
                survey.add(&set, &mut texts);
                survey.shown.extend(shown);
            }
            Seen::PassedOver(told) => survey.passed_over.push(told),
            Seen::Broken(told) => survey.broken.push(told),
        }
    }
    survey.captions.n_different = texts.len();
    survey.short_sides.sort_unstable();
    survey
}

fn seen(source: &dyn SetSource, set_idx: usize, decodes: bool, is_shown: bool) -> Result<Seen> {
    let outline = source.outline(set_idx)?;
    if let Some(SetOutline { label, unwanted: Some(reason), .. }) = &outline {
        return Ok(Seen::PassedOver(format!("{label}: {reason}")));
    }
    let outline = match (outline, decodes || is_shown) {
        (Some(outline), false) => return Ok(Seen::Fine(outline, None)),
        (outline, _) => outline,
    };
    let label = outline.as_ref().map_or_else(|| format!("set {set_idx}"), |outline| outline.label.clone());
    let set = match source.deal(set_idx, Wanted { n_images: 1, variant: 0, is_known: None, masks: false })? {
        Dealt::Set(set) => set,
        Dealt::PassedOver(reason) => return Ok(Seen::PassedOver(format!("{label}: {reason}"))),
        Dealt::TooSmall(_) => return Ok(Seen::Broken(format!("{label}: holds no pictures"))),
    };
    let images = set.images.unwrap_or_default();
    let sizes = outline.map_or_else(|| images.iter().map(RgbImage::dimensions).collect(), |outline| outline.sizes);
    // A video's frames are counted only here.
    let n_images = images.len();
    let captions = set.captions;
    let outline = SetOutline { label: label.clone(), n_images, captions: captions.clone(), sizes, unwanted: None };
    Ok(Seen::Fine(outline, is_shown.then_some(ShownSet { label, images, captions })))
}

impl Survey {
    /// Sets that training would be dealt.
    pub fn n_sets(&self) -> usize {
        self.set_sizes.values().sum()
    }

    /// Their pictures.
    pub fn n_images(&self) -> usize {
        self.set_sizes.iter().map(|(n_images, n_sets)| n_images * n_sets).sum()
    }

    fn add(&mut self, set: &SetOutline, texts: &mut HashSet<u64>) {
        *self.set_sizes.entry(set.n_images).or_default() += 1;
        self.short_sides.extend(set.sizes.iter().map(|&(width, height)| width.min(height)));
        for caption in &set.captions {
            let n_words = caption.split_whitespace().count();
            let captions = &mut self.captions;
            captions.n_captions += 1;
            captions.n_words += n_words;
            captions.n_empty += usize::from(n_words == 0);
            if captions.longest.as_ref().is_none_or(|(most, _)| n_words > *most) {
                captions.longest = Some((n_words, set.label.clone()));
            }
            // Of hundreds of millions of captions only these eight bytes are kept.
            let mut hasher = DefaultHasher::new();
            caption.hash(&mut hasher);
            texts.insert(hasher.finish());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::data::{DatasetSettings, DatasetSource, Rules, ScoreFilter};

    /// A strip that does not shrink to nothing when it is compressed.
    fn picture(n: u32) -> RgbImage {
        RgbImage::from_fn(8, 8 * n, |x, y| {
            image::Rgb([x * 31 + y * 17, x * y * 7, (x * 53) ^ (y * 29)].map(|v| v as u8))
        })
    }

    #[test]
    fn everything_is_counted_and_what_is_wrong_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let write = |key: &str, n: u32, txt: &str, score: f64| {
            let path = folder.path().join(key);
            picture(n).save(path.with_extension("png")).unwrap();
            fs::write(path.with_extension("txt"), txt).unwrap();
            fs::write(path.with_extension("json"), format!("{{\"score\": {score}}}")).unwrap();
        };
        write("a", 2, "one<|split|>two", 0.5);
        write("b", 3, "one<|split|>two words<|split|>", 0.5);
        write("c", 2, "only one", 0.5);
        write("d", 2, "a copy<|split|>a copy", 0.99);
        write("e", 2, "cut<|split|>off", 0.5);
        let png = fs::read(folder.path().join("e.png")).unwrap();
        fs::write(folder.path().join("e.png"), &png[..png.len() * 2 / 3]).unwrap();
        let filters = vec![ScoreFilter { key: "score".into(), min: None, max: Some(0.9) }];
        let settings =
            DatasetSettings { size: 4, rules: Rules { filters, ..Default::default() }, ..Default::default() };
        let source = DatasetSource::with_settings(folder.path().to_str().unwrap(), settings).unwrap();
        let n_heard = AtomicUsize::new(0);
        let look = |decodes| {
            let heard = || {
                n_heard.fetch_add(1, Ordering::Relaxed);
            };
            survey(&source, SurveySettings { decodes, n_shown: if decodes { 9 } else { 0 } }, &heard)
        };
        let found = look(true);
        assert_eq!((found.n_samples, found.n_sets(), found.n_images()), (5, 2, 5));
        assert_eq!(found.set_sizes, [(2, 1), (3, 1)].into());
        assert_eq!(found.short_sides, [8; 5]);
        let captions = &found.captions;
        assert_eq!((captions.n_captions, captions.n_empty, captions.n_different, captions.n_words), (5, 1, 4, 5));
        assert!(captions.longest.as_ref().is_some_and(|(words, label)| *words == 2 && label.ends_with("/b")));
        assert!(found.passed_over.len() == 1 && found.passed_over[0].ends_with("/d: score 0.99 is above 0.9"));
        assert!(
            found.broken[0].contains("/c: .txt: 1 captions for 2 pictures") && found.broken[1].contains("/e: .png: ")
        );
        assert_eq!((found.broken.len(), found.shown.len()), (2, 2));
        assert_eq!((found.shown[1].images.len(), found.shown[1].images[0].dimensions()), (3, (4, 4)));
        assert_eq!(n_heard.load(Ordering::Relaxed), 5);
        // Headers alone do not tell of the cut.
        let quick = look(false);
        assert_eq!((quick.n_sets(), quick.broken.len(), quick.shown.len()), (3, 1, 0));
    }
}

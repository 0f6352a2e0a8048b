//! Where training sets come from.

use anyhow::{Context, Result, ensure};
use image::RgbImage;

use super::cut::{Region, marked};
use super::dataset::{Dataset, Fault};
use super::deal::{Content, Dealt, Wanted, deal_decoded, deal_whole};
use super::members::{Members, is_picture, mask, pictures};
use super::order::Runs;
use super::outline::outline;
use super::{ImageSet, Layout, Rules, SetOutline};
use crate::rng::Rng;

/// A numbered collection of sets; reading one depends on its number alone.
pub trait SetSource: Send + Sync {
    /// How many sets there are.
    fn n_sets(&self) -> usize;

    /// Set number `set_idx`, square pictures of one size.
    fn read(&self, set_idx: usize) -> Result<ImageSet>;

    /// What set number `set_idx` promises, told without decoding it; None where sets are made when asked for, and nothing
    /// can be wrong with them.
    fn outline(&self, _set_idx: usize) -> Result<Option<SetOutline>> {
        Ok(None)
    }

    /// Set number `set_idx` to train on, as the rules of the source say.
    fn deal(&self, set_idx: usize, wanted: Wanted) -> Result<Dealt> {
        Ok(deal_whole(self.read(set_idx)?, wanted))
    }

    /// Different cuts of a set that [`SetSource::deal`] gives: 1 where there is only the plain one, 0 without end.
    fn variants(&self) -> u64 {
        1
    }

    /// How the sets lie on the disk.
    fn runs(&self) -> Runs {
        Runs::default()
    }

    /// What could not be read when the source was opened.
    fn faults(&self) -> &[Fault] {
        &[]
    }
}

/// Sets from a folder or from shards, resized.
pub struct DatasetSource {
    dataset: Dataset,
    settings: DatasetSettings,
}

/// How the samples of a data set become training sets.
#[derive(Clone, Debug, Default)]
pub struct DatasetSettings {
    /// What a sample is.
    pub layout: Layout,
    /// Side of the training pictures in pixels.
    pub size: u32,
    /// Captions, filters, cuts.
    pub rules: Rules,
    /// Different cuts of each set; 0 a new one each time. Without effect where nothing varies.
    pub variants: u64,
    /// Shards that are shuffled together; 0: all.
    pub shuffle_window: usize,
}

impl DatasetSource {
    /// Opens `place` (see [`Dataset::open`]) to take everything as it is; pictures will have `size` pixels a side.
    pub fn open(place: &str, layout: Layout, size: u32) -> Result<Self> {
        Self::with_settings(place, DatasetSettings { layout, size, ..Default::default() })
    }

    /// Opens `place`.
    pub fn with_settings(place: &str, settings: DatasetSettings) -> Result<Self> {
        ensure!(settings.size > 0, "{place}: the image size must be at least 1");
        Ok(Self { dataset: Dataset::open(place, settings.layout)?, settings })
    }

    fn dealt(&self, set_idx: usize, wanted: Wanted) -> Result<Dealt> {
        let members = self.dataset.members(set_idx)?;
        let DatasetSettings { layout, rules, .. } = &self.settings;
        let suffixes: Vec<&str> = members.keys().map(String::as_str).collect();
        let read = |suffix: &str, limit: Option<u64>| {
            let bytes = &members[suffix];
            Ok(bytes[..bytes.len().min(limit.unwrap_or(u64::MAX) as usize)].to_vec())
        };
        let SetOutline { n_images, captions, unwanted, .. } =
            outline(self.dataset.name(set_idx).0, &suffixes, *layout, rules, &read)?;
        if let Some(reason) = unwanted {
            return Ok(Dealt::PassedOver(reason));
        }
        if n_images < wanted.n_images {
            return Ok(Dealt::TooSmall(n_images));
        }
        let variant = wanted.variant;
        let content = || Ok(self.content(&members, set_idx, variant));
        deal_decoded(captions, wanted, content, || self.squares(&members, set_idx, variant))
    }

    /// What the pixels of a set follow from.
    fn content(&self, members: &Members, set_idx: usize, variant: u64) -> String {
        let DatasetSettings { layout, size, rules, .. } = &self.settings;
        // The draws of a cut follow from the number of the set too; without one it plays no part.
        let draw = if variant == 0 { String::new() } else { format!("{} {set_idx} {variant}", rules.cut.name()) };
        let mut content = Content::new(&format!("{layout:?} {size} {draw}"));
        for (suffix, bytes) in members {
            if is_picture(suffix) || variant != 0 && suffix.ends_with(".mask.png") {
                content.part(suffix.as_bytes());
                content.part(bytes);
            }
        }
        content.finish()
    }

    fn squares(&self, members: &Members, set_idx: usize, variant: u64) -> Result<Vec<RgbImage>> {
        let DatasetSettings { layout, size, rules, .. } = &self.settings;
        let mut rng = (variant != 0).then(|| Rng::new(variant, "cut", set_idx as u64));
        let mut squares = vec![];
        for (picture, regions) in pictures(members, *layout)? {
            for region in regions {
                let subject = match rng.is_some() {
                    true => subject(members, squares.len(), region)?,
                    false => None,
                };
                squares.push(rules.cut.square(&picture, region, subject, rng.as_mut(), *size));
            }
        }
        Ok(squares)
    }
}

/// Where picture `idx`, which is `region` of its file, shows the subject, as far as its mask tells.
fn subject(members: &Members, idx: usize, region: Region) -> Result<Option<Region>> {
    let Some(mask) = mask(members, idx)? else { return Ok(None) };
    ensure!(
        mask.dimensions() == (region.width, region.height),
        ".{idx}.mask.png: {}×{} pixels for a picture of {}×{}; make them equal",
        mask.width(),
        mask.height(),
        region.width,
        region.height
    );
    Ok(marked(&mask).map(|marked| Region { x: marked.x + region.x, y: marked.y + region.y, ..marked }))
}

impl SetSource for DatasetSource {
    fn n_sets(&self) -> usize {
        self.dataset.n_samples()
    }

    fn read(&self, set_idx: usize) -> Result<ImageSet> {
        Ok(self.dataset.read_by(set_idx, &self.settings.rules)?.resized(self.settings.size))
    }

    fn outline(&self, set_idx: usize) -> Result<Option<SetOutline>> {
        self.dataset.outline(set_idx, &self.settings.rules).map(Some)
    }

    fn deal(&self, set_idx: usize, wanted: Wanted) -> Result<Dealt> {
        self.dealt(set_idx, wanted).with_context(|| self.dataset.name(set_idx).1)
    }

    fn variants(&self) -> u64 {
        if self.settings.rules.cut.is_plain() { 1 } else { self.settings.variants }
    }

    fn runs(&self) -> Runs {
        Runs { lengths: self.dataset.shard_lengths().to_vec(), window: self.settings.shuffle_window }
    }

    fn faults(&self) -> &[Fault] {
        self.dataset.faults()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use image::RgbImage;

    use super::*;

    #[test]
    fn single_pictures_become_sets_of_one_at_the_asked_size() {
        let folder = tempfile::tempdir().unwrap();
        for (idx, (width, height)) in [(40, 20), (20, 40), (8, 8)].into_iter().enumerate() {
            let path = folder.path().join(format!("{idx:09}"));
            RgbImage::from_pixel(width, height, image::Rgb([90; 3])).save(path.with_extension("jpg")).unwrap();
            fs::write(path.with_extension("txt"), format!("caption {idx}")).unwrap();
        }
        let source = DatasetSource::open(folder.path().to_str().unwrap(), Layout::Single, 12).unwrap();
        assert_eq!(source.n_sets(), 3);
        for idx in 0..3 {
            let set = source.read(idx).unwrap();
            assert_eq!((set.images.len(), set.images[0].dimensions()), (1, (12, 12)));
            assert_eq!(set.captions, [format!("caption {idx}")]);
        }
    }
}

//! Where training sets come from.

use anyhow::{Context, Result, ensure};
use image::{DynamicImage, GrayImage};

use super::cut::{Region, marked};
use super::dataset::{Dataset, Fault};
use super::deal::{Content, Dealt, Squares, Wanted, deal_decoded, deal_whole};
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
        deal_decoded(captions, wanted, content, || self.squares(&members, set_idx, wanted))
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

    fn squares(&self, members: &Members, set_idx: usize, wanted: Wanted) -> Result<Squares> {
        let DatasetSettings { layout, size, rules, .. } = &self.settings;
        let mut rng = (wanted.variant != 0).then(|| Rng::new(wanted.variant, "cut", set_idx as u64));
        let (mut images, mut masks) = (vec![], vec![]);
        for (picture, regions) in pictures(members, *layout)? {
            for region in regions {
                let mask = match rng.is_some() || wanted.masks {
                    true => fitting_mask(members, images.len(), region)?,
                    false => None,
                };
                let subject = mask.as_ref().and_then(marked);
                let there = subject.map(|in_it| Region { x: in_it.x + region.x, y: in_it.y + region.y, ..in_it });
                // The same draws cut the mask alike.
                let mut mask_rng = rng.clone();
                images.push(rules.cut.square(&picture, region, there, rng.as_mut(), *size));
                if let Some(mask) = mask.filter(|_| wanted.masks) {
                    let mask = DynamicImage::ImageLuma8(mask).into_rgb8();
                    let cut = rules.cut.square(&mask, Region::all(&mask), subject, mask_rng.as_mut(), *size);
                    masks.push(DynamicImage::ImageRgb8(cut).into_luma8());
                }
            }
        }
        Ok(Squares { images, masks })
    }
}

/// The mask of picture `idx`, which is `region` of its file, as large as that; None: there is none.
fn fitting_mask(members: &Members, idx: usize, region: Region) -> Result<Option<GrayImage>> {
    let Some(mask) = mask(members, idx)? else { return Ok(None) };
    ensure!(
        mask.dimensions() == (region.width, region.height),
        ".{idx}.mask.png: {}×{} pixels for a picture of {}×{}; make them equal",
        mask.width(),
        mask.height(),
        region.width,
        region.height
    );
    Ok(Some(mask))
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

    #[test]
    fn a_mask_is_cut_as_its_picture_is() {
        let folder = tempfile::tempdir().unwrap();
        // White where the subject is, so that picture and mask are the same in every cut.
        let white = |x: u32, y: u32| if (9..20).contains(&x) && (5..30).contains(&(y % 32)) { 255 } else { 0 };
        let strip = RgbImage::from_fn(32, 64, |x, y| image::Rgb([white(x, y); 3]));
        strip.save(folder.path().join("a.png")).unwrap();
        for idx in 0..2 {
            let mask = GrayImage::from_fn(32, 32, |x, y| image::Luma([white(x, y)]));
            mask.save(folder.path().join(format!("a.{idx}.mask.png"))).unwrap();
        }
        fs::write(folder.path().join("a.txt"), "one<|split|>two").unwrap();
        let cut = crate::data::Cut { crop: 0.5, flip: true };
        let rules = Rules { cut, ..Default::default() };
        let settings = DatasetSettings { size: 16, rules, variants: 0, ..Default::default() };
        let source = DatasetSource::with_settings(folder.path().to_str().unwrap(), settings).unwrap();
        let dealt = |variant, masks, is_known: Option<&dyn Fn(&str) -> bool>| {
            let wanted = Wanted { n_images: 2, variant, is_known, masks };
            let Dealt::Set(set) = source.deal(0, wanted).unwrap() else { panic!("a set") };
            set
        };
        let mut seen = vec![];
        for variant in 0..6 {
            let set = dealt(variant, true, None);
            let images = set.images.unwrap();
            for (image, mask) in images.iter().zip(&set.masks) {
                assert!(image.pixels().zip(mask.pixels()).all(|(pixel, mask)| pixel.0[0].abs_diff(mask.0[0]) <= 1));
            }
            assert_eq!((set.masks.len(), dealt(variant, false, None).masks.len()), (2, 0));
            seen.push(images);
        }
        assert!((1..6).any(|variant| seen[variant] != seen[0]));
        // Known pictures come all the same where their masks are wanted.
        let known = |_: &str| true;
        assert_eq!(dealt(1, true, Some(&known)).masks.len(), 2);
        assert!(dealt(1, false, Some(&known)).images.is_none());
    }
}

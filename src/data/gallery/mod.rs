//! Sets that are drawn from something longer: the frames of a clip, apart in time, or some of the views of an object. One clip
//! or object is a folder of pictures or a video file; its caption stands beside or in it.

mod drawn;
mod items;
#[cfg(test)]
mod tests;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use image::RgbImage;

use self::drawn::{Drawn, n_apart, size_of_file};
use self::items::{Item, collect};
use super::cut::Region;
use super::dataset::{Dataset, Fault};
use super::deal::{Content, Dealt, Squares, Wanted, deal_decoded};
use super::members::metadata;
use super::order::Runs;
use super::shards::tars_in;
use super::sources::SetSource;
use super::video::{Ffmpeg, VideoFacts, VideoFile, is_video};
use super::{ImageSet, Layout, Rules, SetOutline};
use crate::rng::Rng;

/// Clips or objects.
pub struct GallerySource {
    items: Vec<Item>,
    /// Videos in tars.
    tars: Option<Dataset>,
    ffmpeg: Option<Ffmpeg>,
    settings: GallerySettings,
}

/// How sets are drawn from clips or objects.
#[derive(Clone, Debug)]
pub struct GallerySettings {
    /// What the pictures are.
    pub kind: GalleryKind,
    /// Pictures of a set; fewer where a clip is short.
    pub images: usize,
    /// Least distance of two pictures of a set: frames in a folder, seconds in a video.
    pub apart: f64,
    /// Side of the training pictures in pixels.
    pub size: u32,
    /// Captions, filters, cuts.
    pub rules: Rules,
    /// Different sets of each clip or object; 0 a new one each time.
    pub variants: u64,
    /// Shards that are shuffled together; 0: all.
    pub shuffle_window: usize,
}

/// What the pictures of a folder are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GalleryKind {
    /// Frames in the order of their names, or a video.
    Clips,
    /// Renders of one object from all sides, in no order.
    Views,
}

impl GallerySource {
    /// Opens a folder with a folder (at any depth) or a video for each clip or object, or tars of videos.
    pub fn open(place: &str, settings: GallerySettings) -> Result<Self> {
        let path = Path::new(place);
        ensure!(settings.size > 0, "{place}: the image size must be at least 1");
        let is_folder = path.is_dir() && tars_in(path).with_context(|| format!("{place}: cannot be read"))?.is_empty();
        let mut items = vec![];
        let mut tars = None;
        if is_folder {
            collect(path, settings.kind, 0, &mut items).with_context(|| format!("{place}: cannot be read"))?;
        } else {
            ensure!(
                settings.kind == GalleryKind::Clips,
                "{place}: views are read from folders, one an object; give one"
            );
            let dataset = Dataset::open_files(place, Layout::Single, is_video)?;
            items.extend((0..dataset.n_samples()).map(Item::InTar));
            tars = Some(dataset);
        }
        if items.is_empty() {
            bail!(
                "{place}: holds no {}",
                match settings.kind {
                    GalleryKind::Clips => "clips; a clip is a folder of frames, or a video, with its caption beside it",
                    GalleryKind::Views =>
                        "objects; an object is a folder of pictures, with its caption beside or in it",
                }
            );
        }
        let needs_ffmpeg = items.iter().any(|item| !matches!(item, Item::Folder { .. }));
        let ffmpeg = needs_ffmpeg.then(|| Ffmpeg::find(place)).transpose()?;
        Ok(Self { items, tars, ffmpeg, settings })
    }

    fn tars(&self) -> &Dataset {
        self.tars.as_ref().expect("there are samples of tars only where there are tars")
    }

    /// The place of an item, and the name that captions may use.
    fn name(&self, idx: usize) -> (String, String) {
        let path = match &self.items[idx] {
            Item::InTar(sample) => {
                let (key, label) = self.tars().name(*sample);
                return (label, key.to_owned());
            }
            Item::Folder { path, .. } | Item::Video(path) => path,
        };
        (path.display().to_string(), path.file_stem().unwrap_or_default().to_string_lossy().into_owned())
    }

    /// The text file (`txt`) or the JSON (`json`) of an item.
    fn text(&self, idx: usize, suffix: &str) -> Result<Option<Vec<u8>>> {
        let places = match &self.items[idx] {
            Item::InTar(sample) => return Ok(self.tars().members(*sample)?.remove(suffix)),
            Item::Video(path) => vec![path.with_extension(suffix)],
            Item::Folder { path, .. } => {
                let inside = if suffix == "txt" { "caption.txt" } else { "metadata.json" };
                let beside = format!("{}.{suffix}", path.file_name().unwrap_or_default().to_string_lossy());
                vec![path.join(inside), path.with_file_name(beside)]
            }
        };
        match places.iter().find(|path| path.exists()) {
            Some(path) => fs::read(path).map(Some).with_context(|| format!("{}: cannot be read", path.display())),
            None => Ok(None),
        }
    }

    /// The captions of a set of so many pictures, and the JSON.
    fn captions(&self, idx: usize, n_images: usize) -> Result<(Vec<String>, serde_json::Value)> {
        let rules = &self.settings.rules;
        let json =
            if rules.need_json() { metadata(self.text(idx, "json")?.as_deref())? } else { serde_json::Value::Null };
        let from_file = || {
            let bytes = self.text(idx, "txt")?.context(
                "the caption is missing; put it beside the folder or video as its name and .txt, or choose another caption rule",
            )?;
            let text = String::from_utf8(bytes).context("the caption is not UTF-8")?;
            Ok(vec![text.trim().to_owned(); n_images])
        };
        Ok((rules.caption.captions(&self.name(idx).1, &json, n_images, from_file)?, json))
    }

    /// Draws the pictures of a set.
    fn drawn(&self, idx: usize, variant: u64) -> Result<Drawn> {
        let mut rng = (variant != 0).then(|| Rng::new(variant, "pictures of a set", idx as u64));
        match &self.items[idx] {
            Item::Folder { path, pictures } => {
                let read = |name: &String| {
                    let bytes = fs::read(path.join(name)).with_context(|| format!("{name}: cannot be read"))?;
                    Ok((name.clone(), bytes))
                };
                Ok(Drawn::Files(self.picked(pictures, rng.as_mut()).into_iter().map(read).collect::<Result<_>>()?))
            }
            Item::Video(path) => self.frames(path.clone(), None, rng.as_mut()),
            Item::InTar(sample) => {
                let members = self.tars().members(*sample)?;
                let (ending, bytes) = members.iter().find(|(suffix, _)| is_video(suffix)).context("holds no video")?;
                let written = VideoFile::write(bytes, ending)?;
                self.frames(written.path().to_owned(), Some(written), rng.as_mut())
            }
        }
    }

    /// The middles of equal parts of a video, or with `rng` another place of each part.
    fn frames(&self, video: PathBuf, written: Option<VideoFile>, rng: Option<&mut Rng>) -> Result<Drawn> {
        let VideoFacts { duration, size } = self.ffmpeg()?.look(&video)?;
        let n = n_apart(duration, self.settings.apart, self.settings.images);
        let phase = rng.map_or(0.5, Rng::uniform);
        let seconds = (0..n).map(|k| (k as f64 + phase) * duration / n as f64).collect();
        Ok(Drawn::Frames { video, seconds, size, _written: written })
    }

    fn picked<'a>(&self, pictures: &'a [String], rng: Option<&mut Rng>) -> Vec<&'a String> {
        let (n_all, images) = (pictures.len(), self.settings.images);
        match (self.settings.kind, rng) {
            (GalleryKind::Clips, rng) => {
                let n = n_apart(n_all as f64, self.settings.apart, images);
                let (phase, width) = (rng.map_or(0.5, Rng::uniform), n_all as f64 / n as f64);
                (0..n).map(|k| &pictures[((k as f64 + phase) * width) as usize]).collect()
            }
            (GalleryKind::Views, Some(rng)) => {
                let mut order: Vec<&String> = pictures.iter().collect();
                rng.shuffle(&mut order);
                order.truncate(images);
                order
            }
            // All around, not neighbours.
            (GalleryKind::Views, None) => {
                let n = images.min(n_all);
                (0..n).map(|k| &pictures[k * n_all / n]).collect()
            }
        }
    }

    fn ffmpeg(&self) -> Result<&Ffmpeg> {
        self.ffmpeg.as_ref().context("is a video that was no video when the data was opened")
    }

    fn squares(&self, pictures: &[RgbImage], idx: usize, variant: u64) -> Vec<RgbImage> {
        let (size, cut) = (self.settings.size, &self.settings.rules.cut);
        let mut rng = (variant != 0).then(|| Rng::new(variant, "cut", idx as u64));
        pictures.iter().map(|picture| cut.square(picture, Region::all(picture), None, rng.as_mut(), size)).collect()
    }

    fn dealt(&self, idx: usize, wanted: Wanted) -> Result<Dealt> {
        let variant = wanted.variant;
        let drawn = self.drawn(idx, variant)?;
        let n_images = drawn.n_images();
        if n_images < wanted.n_images {
            return Ok(Dealt::TooSmall(n_images));
        }
        let (captions, json) = self.captions(idx, n_images)?;
        if let Some(reason) = self.settings.rules.reason_against(&drawn.sizes()?, &json) {
            return Ok(Dealt::PassedOver(reason));
        }
        let content = || {
            let cut = if variant == 0 { String::new() } else { self.settings.rules.cut.name() };
            drawn.content(Content::new(&format!("gallery {} {cut} {idx} {variant}", self.settings.size)))
        };
        let decode = || {
            let images = self.squares(&drawn.decoded(self.ffmpeg.as_ref())?, idx, variant);
            Ok(Squares { images, masks: vec![] })
        };
        deal_decoded(captions, wanted, content, decode)
    }
}

impl SetSource for GallerySource {
    fn n_sets(&self) -> usize {
        self.items.len()
    }

    fn read(&self, set_idx: usize) -> Result<ImageSet> {
        let (label, key) = self.name(set_idx);
        let read = || -> Result<ImageSet> {
            let drawn = self.drawn(set_idx, 0)?;
            let (captions, metadata) = self.captions(set_idx, drawn.n_images())?;
            let images = self.squares(&drawn.decoded(self.ffmpeg.as_ref())?, set_idx, 0);
            Ok(ImageSet { key, images, captions, masks: vec![], metadata })
        };
        read().context(label)
    }

    /// Of a video without a look at it: as many pictures as asked for, no sizes.
    fn outline(&self, set_idx: usize) -> Result<Option<SetOutline>> {
        let (label, _) = self.name(set_idx);
        let outline = || -> Result<SetOutline> {
            let sizes = match &self.items[set_idx] {
                Item::Folder { path, pictures } => {
                    let size = |name: &String| size_of_file(&path.join(name)).with_context(|| name.clone());
                    self.picked(pictures, None).into_iter().map(size).collect::<Result<Vec<_>>>()?
                }
                _ => vec![],
            };
            let n_images = if sizes.is_empty() { self.settings.images } else { sizes.len() };
            let (captions, json) = self.captions(set_idx, n_images)?;
            let unwanted = self.settings.rules.reason_against(&sizes, &json);
            Ok(SetOutline { label: label.clone(), n_images, captions, sizes, unwanted })
        };
        outline().with_context(|| label.clone()).map(Some)
    }

    fn deal(&self, set_idx: usize, wanted: Wanted) -> Result<Dealt> {
        self.dealt(set_idx, wanted).with_context(|| self.name(set_idx).0)
    }

    fn variants(&self) -> u64 {
        self.settings.variants
    }

    fn runs(&self) -> Runs {
        let lengths = self.tars.as_ref().map_or(vec![], |tars| tars.shard_lengths().to_vec());
        Runs { lengths, window: self.settings.shuffle_window }
    }

    fn faults(&self) -> &[Fault] {
        self.tars.as_ref().map_or(&[], Dataset::faults)
    }
}

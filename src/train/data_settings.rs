//! The `[data]` table of a training config: one source in short form, or several that are mixed.

use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::data::{CaptionRule, ScoreFilter};
use crate::invalid::invalid;

/// What a source is called that draws its sets itself.
pub const TOYBOX: &str = "toybox";

/// Where the pictures come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Short for one entry of `sources`: `toybox` (drawn as needed), or a folder, a `.tar` or a pattern such as
    /// `{00000..00099}.tar`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// Files: what a sample is.
    #[serde(default)]
    pub layout: DataLayout,
    /// Toybox: how many different sets there are.
    #[serde(default = "default_sets")]
    pub sets: usize,
    /// Toybox: pictures a set.
    #[serde(default = "default_images")]
    pub images: usize,
    /// Toybox: seed of the sets.
    #[serde(default)]
    pub seed: u64,
    /// Side of the training pictures in pixels.
    #[serde(default = "default_size")]
    pub size: u32,
    /// Share of a source's samples that may be broken (skipped, counted, named) before the run ends; counted among those met,
    /// or among the first thousand; 0: none.
    #[serde(default = "default_bad", skip_serializing_if = "is_default_bad")]
    pub max_bad_fraction: f64,
    /// Threads that read and decode ahead of the step, on each process; 0: half of the CPUs that it has for itself.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub workers: usize,
    /// Folder that keeps latents, and the texts of an encoder that is not trained, from start to start, of several runs too;
    /// none: each start encodes anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Most that this run writes into `cache`, of latents and of texts each, in GB (10⁹ bytes); 0: no bound.
    #[serde(default, skip_serializing_if = "is_no_bound")]
    pub cache_gb: f64,
    /// Several sources, mixed by their weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<SourceConfig>,
}

/// One of the `[[data.sources]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// `toybox`, or a folder, a `.tar` or a pattern such as `{00000..00099}.tar`.
    pub source: String,
    /// What messages call it; empty: `source`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Files: what a sample is.
    #[serde(default)]
    pub layout: DataLayout,
    /// Its share of the training images, over the sum of all weights.
    #[serde(default = "one")]
    pub weight: f64,
    /// Images of a set, drawn evenly; none: `joint.set_sizes`, and 1 for layout `single`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_sizes: Option<Vec<usize>>,
    /// Where captions come from: `"file"`, `{ json = "key" }` or `{ template = "a photo of a {class}" }`.
    #[serde(default)]
    pub caption: CaptionRule,
    /// Samples with a picture whose shorter side has fewer pixels are passed over; 0: none.
    #[serde(default)]
    pub min_side: u32,
    /// Samples with a picture whose longer side is more than so many shorter sides are passed over; 0: none.
    #[serde(default)]
    pub max_aspect: f64,
    /// Least side of the random square that is cut from each picture, as a share of the largest square's side; where masks
    /// show the subject, it stays in. 1: the largest square in the middle.
    #[serde(default = "one")]
    pub crop: f64,
    /// Every second picture is mirrored.
    #[serde(default)]
    pub flip: bool,
    /// Different cuts of each set (crops, mirrored or not, frames, views); 0: a new one each time, which no cache keeps; 1:
    /// always the plain one. Without effect where nothing varies.
    #[serde(default)]
    pub variants: u64,
    /// Toybox, clips and views: pictures of a set.
    #[serde(default = "default_images")]
    pub images: usize,
    /// Clips: least distance of two chosen frames, in frames of a folder or seconds of a video.
    #[serde(default = "one")]
    pub apart: f64,
    /// Shards whose samples are shuffled together, so that a slow disk is read nearly in sequence; 0: all.
    #[serde(default)]
    pub shuffle_window: usize,
    /// Toybox: how many different sets there are.
    #[serde(default = "default_sets")]
    pub sets: usize,
    /// Toybox: seed of the sets.
    #[serde(default)]
    pub seed: u64,
    /// All must let a sample through: `{ key = "scores.clip", min = 0.7, max = 0.97 }`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<ScoreFilter>,
}

/// How the pictures of a sample lie in its files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataLayout {
    /// Strips or loose sets.
    #[default]
    Sets,
    /// One picture a sample (img2dataset).
    Single,
    /// Folders of frames, or videos: frames apart in time.
    Clips,
    /// Folders of renders of one object: any of them.
    Views,
}

fn default_sets() -> usize {
    16_384
}
fn default_images() -> usize {
    4
}
fn default_size() -> u32 {
    64
}
fn default_bad() -> f64 {
    0.01
}
fn one() -> f64 {
    1.0
}
fn is_default_bad(value: &f64) -> bool {
    *value == default_bad()
}
fn is_zero(value: &usize) -> bool {
    *value == 0
}
fn is_no_bound(value: &f64) -> bool {
    *value == 0.0
}

impl SourceConfig {
    /// `source` with nothing else said.
    pub fn plain(source: &str) -> Self {
        Self {
            source: source.to_owned(),
            name: String::new(),
            layout: DataLayout::default(),
            weight: 1.0,
            set_sizes: None,
            caption: CaptionRule::default(),
            min_side: 0,
            max_aspect: 0.0,
            crop: 1.0,
            flip: false,
            variants: 0,
            images: default_images(),
            apart: 1.0,
            shuffle_window: 0,
            sets: default_sets(),
            seed: 0,
            filters: vec![],
        }
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        if self.name.is_empty() { &self.source } else { &self.name }
    }

    /// Images of a set where the objective wants these.
    pub fn set_sizes<'a>(&'a self, others: &'a [usize]) -> &'a [usize] {
        match (&self.set_sizes, self.layout) {
            (Some(sizes), _) => sizes,
            (None, DataLayout::Single) => &[1],
            (None, _) => others,
        }
    }

    fn validate(&self, joint_sizes: &[usize]) -> Result<()> {
        let name = self.name();
        let wrong = |what: String| Err(invalid(format!("data.sources {name}: {what}")));
        if self.source.is_empty() {
            return Err(invalid("data.sources: an entry has an empty source; give `toybox`, a folder or tars"));
        }
        if !(self.weight.is_finite() && self.weight >= 0.0) {
            return wrong(format!("weight = {}: must be a number that is not below 0", self.weight));
        }
        if !(self.crop > 0.0 && self.crop <= 1.0) {
            return wrong(format!("crop = {}: is a share, so it must lie in (0, 1]", self.crop));
        }
        if !(self.max_aspect == 0.0 || self.max_aspect >= 1.0) {
            return wrong(format!("max_aspect = {}: must be at least 1, or 0 for no limit", self.max_aspect));
        }
        if !(self.apart.is_finite() && self.apart >= 0.0) {
            return wrong(format!("apart = {}: must be a number that is not below 0", self.apart));
        }
        for filter in &self.filters {
            if filter.min.is_none() && filter.max.is_none() {
                return wrong(format!("the filter on {} has neither min nor max", filter.key));
            }
        }
        let plain = Self::plain(&self.source);
        let is_drawn_set = self.source == TOYBOX;
        let is_gallery = matches!(self.layout, DataLayout::Clips | DataLayout::Views);
        for (option, is_set, applies) in [
            ("layout", self.layout != plain.layout, !is_drawn_set),
            ("caption", self.caption != plain.caption, !is_drawn_set),
            ("filters", !self.filters.is_empty(), !is_drawn_set),
            ("min_side", self.min_side != 0, !is_drawn_set),
            ("max_aspect", self.max_aspect != 0.0, !is_drawn_set),
            ("crop", self.crop != 1.0, !is_drawn_set),
            ("flip", self.flip, !is_drawn_set),
            ("variants", self.variants != 0, !is_drawn_set),
            ("shuffle_window", self.shuffle_window != 0, !is_drawn_set && self.layout != DataLayout::Views),
            ("images", self.images != plain.images, is_drawn_set || is_gallery),
            ("apart", self.apart != plain.apart, self.layout == DataLayout::Clips),
            ("sets", self.sets != plain.sets, is_drawn_set),
            ("seed", self.seed != 0, is_drawn_set),
        ] {
            if is_set && !applies {
                let kind =
                    if is_drawn_set { "the toybox".into() } else { format!("layout {:?}", self.layout).to_lowercase() };
                return wrong(format!("{option} means nothing for {kind}; remove it"));
            }
        }
        if self.sets == 0 || self.images == 0 {
            return wrong("sets and images must be at least 1".into());
        }
        let n_needed = self.set_sizes(joint_sizes).iter().copied().max().unwrap_or(0);
        if (is_drawn_set || is_gallery) && self.images < n_needed {
            return wrong(format!("images = {}: its set sizes ask for {n_needed} pictures a set", self.images));
        }
        Ok(())
    }
}

impl DataConfig {
    /// All sources, the short form as one of them.
    pub fn all_sources(&self) -> Vec<SourceConfig> {
        if !self.sources.is_empty() {
            return self.sources.clone();
        }
        let Self { source, layout, sets, images, seed, .. } = self;
        vec![SourceConfig { layout: *layout, sets: *sets, images: *images, seed: *seed, ..SourceConfig::plain(source) }]
    }

    /// Refuses values that no run can have; `joint_sizes` are the set sizes of sources that have none of their own.
    pub fn validate(&self, joint_sizes: &[usize]) -> Result<()> {
        for (name, value) in
            [("data.size", u64::from(self.size)), ("data.sets", self.sets as u64), ("data.images", self.images as u64)]
        {
            if value == 0 {
                return Err(invalid(format!("{name} = 0: must be at least 1")));
            }
        }
        if !(0.0..=1.0).contains(&self.max_bad_fraction) {
            let value = self.max_bad_fraction;
            return Err(invalid(format!("data.max_bad_fraction = {value}: is a share, so it must lie in [0, 1]")));
        }
        if !(0.0..f64::INFINITY).contains(&self.cache_gb) {
            return Err(invalid(format!("data.cache_gb = {}: must lie in [0, inf)", self.cache_gb)));
        }
        match (self.source.is_empty(), self.sources.is_empty()) {
            (true, true) => return Err(invalid("data.source: missing; give one, or [[data.sources]]")),
            (false, false) => {
                return Err(invalid("data.source: is there beside [[data.sources]]; make it one of them"));
            }
            (true, false) => {}
            // The options of the other kind are there with their defaults, and have always been let pass.
            (false, true) => {
                let n_needed = joint_sizes.iter().copied().max().unwrap_or(0);
                let needs_images =
                    self.source == TOYBOX || matches!(self.layout, DataLayout::Clips | DataLayout::Views);
                if needs_images && self.images < n_needed {
                    return Err(invalid(format!(
                        "data.images = {}: joint.set_sizes asks for {n_needed} pictures a set",
                        self.images
                    )));
                }
            }
        }
        self.sources.iter().try_for_each(|source| source.validate(joint_sizes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIXED: &str = "
        size = 512
        cache = 'latents'
        [[sources]]
        source = 's3/{00000..00099}.tar'
        name = 's3'
        weight = 2
        crop = 0.8
        filters = [{ key = 'scores.clip', min = 0.7, max = 0.97 }]
        [[sources]]
        source = 'webvid'
        layout = 'clips'
        apart = 1.5
        caption = { json = 'page.title' }
        [[sources]]
        source = 'laion/{00000..00009}.tar'
        layout = 'single'
        shuffle_window = 4
        [[sources]]
        source = 'toybox'
        sets = 100
    ";

    #[test]
    fn several_sources_are_read_and_written_back() {
        let data: DataConfig = toml::from_str(MIXED).unwrap();
        data.validate(&[2, 3, 4]).unwrap();
        let sources = data.all_sources();
        let names: Vec<&str> = sources.iter().map(SourceConfig::name).collect();
        assert_eq!(names, ["s3", "webvid", "laion/{00000..00009}.tar", "toybox"]);
        assert_eq!((sources[0].weight, sources[1].weight), (2.0, 1.0));
        assert_eq!((sources[2].set_sizes(&[2, 3]), sources[3].set_sizes(&[2, 3])), (&[1][..], &[2, 3][..]));
        let again: DataConfig = toml::from_str(&toml::to_string(&data).unwrap()).unwrap();
        assert_eq!(again, data);
    }

    #[test]
    fn the_short_form_is_one_source_and_is_written_as_it_was() {
        let text = "source = \"toybox\"\nlayout = \"sets\"\nsets = 6\nimages = 4\nseed = 3\nsize = 16\n";
        let data: DataConfig = toml::from_str(text).unwrap();
        let [source] = &data.all_sources()[..] else { panic!() };
        assert_eq!((source.sets, source.seed, source.images), (6, 3, 4));
        // Runs that were begun before there were more settings go on: their config.toml reads the same.
        assert_eq!(toml::to_string(&data).unwrap(), text);
    }

    #[test]
    fn options_that_mean_nothing_are_refused() {
        let refusal = |change: fn(&mut DataConfig)| {
            let mut data: DataConfig = toml::from_str(MIXED).unwrap();
            change(&mut data);
            data.validate(&[2, 4]).unwrap_err().to_string()
        };
        assert!(refusal(|d| d.sources[3].flip = true).contains("toybox: flip means nothing for the toybox"));
        assert!(refusal(|d| d.sources[0].apart = 2.0).contains("s3: apart means nothing for layout sets"));
        assert!(refusal(|d| d.sources[1].images = 3).contains("webvid: images = 3: its set sizes ask for 4"));
        assert!(refusal(|d| d.sources[0].weight = f64::NAN).contains("s3: weight = NaN"));
        assert!(refusal(|d| d.sources[0].crop = 0.0).contains("s3: crop = 0"));
        assert!(
            refusal(|d| d.sources[0].filters[0] = ScoreFilter { key: "a".into(), ..Default::default() })
                .contains("neither")
        );
        assert!(refusal(|d| d.source = "toybox".into()).starts_with("data.source: is there beside"));
        assert!(refusal(|d| d.sources.clear()).starts_with("data.source: missing"));
        assert!(refusal(|d| d.max_bad_fraction = 2.0).starts_with("data.max_bad_fraction = 2"));
    }
}

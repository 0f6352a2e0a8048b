//! A set on its way through the stages: what has been found out about it (`Record`, which ends up in the set's JSON) and its
//! pictures. One draft is one attempt at one set number: one object, one collage.

use image::{GrayImage, RgbImage};
use serde::{Deserialize, Serialize};

use super::stage::{Area, Cutout, Prompts, Stage, Truth};
use crate::rng::Rng;

/// A set on its way.
#[derive(Clone, Debug)]
pub struct Draft {
    /// What is known of it.
    pub record: Record,
    /// The whole collage.
    pub collage: Option<RgbImage>,
    /// What really is in the collage, where its painter knows.
    pub truth: Option<GrayImage>,
    /// One a thing found, as `record.instances`.
    pub cutouts: Vec<Cutout>,
    /// One a picture of each set, as `record.sets`.
    pub pictures: Vec<Vec<Picture>>,
}

/// A picture of a set on its way.
#[derive(Clone, Debug)]
pub struct Picture {
    /// As composed, or restyled.
    pub image: RgbImage,
    /// 255 where the thing is.
    pub mask: GrayImage,
}

/// What is known of a draft, stage by stage.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Number of the set.
    pub number: u64,
    /// From 0; each attempt has other random numbers.
    pub attempt: u64,
    /// Of the whole run.
    pub seed: u64,
    /// What is to be seen.
    pub object: String,
    /// None before the first stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompts: Option<Prompts>,
    /// Subjects of the things that really are in the collage, where its painter knows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub true_subjects: Vec<u64>,
    /// Things cut out.
    #[serde(default)]
    pub instances: Vec<Found>,
    /// Things found and not used, with the reason.
    #[serde(default)]
    pub dropped: Vec<Dropped>,
    /// Similarity of every two instances.
    #[serde(default)]
    pub pairs: Vec<Pair>,
    /// The sets made of this collage, largest subject first.
    #[serde(default)]
    pub sets: Vec<SetRecord>,
    /// Why there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rejection: Option<Rejection>,
}

/// A thing cut out of the collage.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Found {
    /// The rectangle around its mask, in the collage.
    pub area: Area,
    /// The detector's.
    pub score: f32,
    /// What the detector took it for.
    pub phrase: String,
    /// The segmenter's.
    pub mask_score: f32,
    /// Number of the connected component that it belongs to; None before the affinity stage, and for copies left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub component: Option<usize>,
    /// Number, from 0, of the true thing that it is, at an overlap (IoU) of more than 0.8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub true_thing: Option<usize>,
}

/// A thing found and not used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dropped {
    /// Where it is.
    pub area: Area,
    /// Why; few different ones, to be counted.
    pub reason: String,
}

/// How alike two instances are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    /// Numbers of the instances.
    pub of: [usize; 2],
    /// By the model that tells subjects apart.
    pub identity: f32,
    /// By the model that tells copies; None without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<f32>,
}

/// One set of a draft.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetRecord {
    /// One a picture.
    pub pictures: Vec<PictureRecord>,
    /// Of every two final pictures, `of` counting pictures; filled by the last stage.
    #[serde(default)]
    pub pairs: Vec<Pair>,
}

/// One picture of a set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PictureRecord {
    /// Which instance it shows.
    pub instance: usize,
    /// The scene that it was painted from.
    pub prompt: String,
    /// Of the noise.
    pub seed: u64,
    /// Where the instance was pasted.
    pub area: Area,
    /// None: as composed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub style: Option<String>,
    /// Filled by the caption stage.
    #[serde(default)]
    pub caption: String,
}

/// Why a draft became no set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rejection {
    /// Where.
    pub stage: Stage,
    /// Why; few different ones, to be counted.
    pub reason: String,
    /// What was the matter this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

impl Draft {
    /// Attempt `attempt` at set `number` of a run with `seed`.
    pub fn new(seed: u64, number: u64, attempt: u64, object: String) -> Self {
        let record = Record { number, attempt, seed, object, ..Record::default() };
        Self { record, collage: None, truth: None, cutouts: vec![], pictures: vec![] }
    }

    /// The random numbers of this attempt for `purpose`.
    pub fn rng(&self, purpose: &str) -> Rng {
        // More than 2¹⁶ attempts at a set are not allowed by the settings.
        Rng::new(self.record.seed, purpose, self.record.number << 16 | self.record.attempt)
    }

    /// Gives it up.
    pub fn reject(&mut self, stage: Stage, reason: &str, detail: Option<String>) {
        self.record.rejection = Some(Rejection { stage, reason: reason.to_owned(), detail });
    }

    /// Whether it is still on its way.
    pub fn is_alive(&self) -> bool {
        self.record.rejection.is_none()
    }

    /// Takes a painted collage in.
    pub fn set_truth(&mut self, truth: Option<Truth>) {
        if let Some(truth) = truth {
            self.record.true_subjects = truth.subjects;
            self.truth = Some(truth.labels);
        }
    }
}

/// The pictures of the drafts' sets with their records, in order: what compose, stylise and caption walk over.
pub fn pictures_of(drafts: &[Draft]) -> Vec<(usize, usize, usize)> {
    let mut places = vec![];
    for (draft_idx, draft) in drafts.iter().enumerate().filter(|(_, draft)| draft.is_alive()) {
        for (set_idx, set) in draft.record.sets.iter().enumerate() {
            places.extend((0..set.pictures.len()).map(|picture_idx| (draft_idx, set_idx, picture_idx)));
        }
    }
    places
}

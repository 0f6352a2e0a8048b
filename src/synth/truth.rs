//! What a stage found against what really is in the collage, where its painter knows: the figures that say whether the
//! pipeline can be trusted.

use std::collections::BTreeMap;

use image::GrayImage;
use serde::{Deserialize, Serialize};

use super::draft::{Draft, Record};
use super::stage::Area;

/// From this overlap (IoU) on a thing counts as found.
const FOUND_FROM: f64 = 0.8;

/// Counts over many collages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TruthCounts {
    /// Things that really are there.
    pub things: usize,
    /// Those of them that were found, with an IoU of more than 0.8.
    pub things_found: usize,
    /// Instances cut out.
    pub instances: usize,
    /// Those of them that are none of the things, or one that was found before.
    pub instances_false: usize,
    /// Pairs of found things.
    pub pairs: usize,
    /// Those that the connected components join, or part, rightly.
    pub pairs_right: usize,
    /// Pairs of different subjects among them.
    pub pairs_of_two: usize,
    /// Those that were parted.
    pub pairs_of_two_parted: usize,
    /// Sets written.
    pub sets: usize,
    /// Those that show one subject alone.
    pub sets_pure: usize,
}

impl TruthCounts {
    /// The counts of one draft; all zero where nobody knows the truth.
    pub fn of(record: &Record) -> Self {
        let mut counts = Self::default();
        if record.true_subjects.is_empty() {
            return counts;
        }
        let subject = |instance: usize| {
            let thing = record.instances[instance].true_thing?;
            record.true_subjects.get(thing).copied()
        };
        counts.things = record.true_subjects.len();
        counts.instances = record.instances.len();
        counts.things_found = record.instances.iter().filter(|found| found.true_thing.is_some()).count();
        counts.instances_false = counts.instances - counts.things_found;
        for pair in &record.pairs {
            let [a, b] = pair.of;
            let (Some(subject_a), Some(subject_b)) = (subject(a), subject(b)) else { continue };
            let (in_a, in_b) = (record.instances[a].component, record.instances[b].component);
            // Copies are left out of all components; they are neither joined nor parted.
            let (Some(in_a), Some(in_b)) = (in_a, in_b) else { continue };
            counts.pairs += 1;
            counts.pairs_right += usize::from((subject_a == subject_b) == (in_a == in_b));
            if subject_a != subject_b {
                counts.pairs_of_two += 1;
                counts.pairs_of_two_parted += usize::from(in_a != in_b);
            }
        }
        if record.rejection.is_none() {
            for set in &record.sets {
                let mut subjects: Vec<_> = set.pictures.iter().map(|picture| subject(picture.instance)).collect();
                subjects.dedup();
                counts.sets += 1;
                counts.sets_pure += usize::from(subjects.len() == 1 && subjects[0].is_some());
            }
        }
        counts
    }

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            things: self.things + other.things,
            things_found: self.things_found + other.things_found,
            instances: self.instances + other.instances,
            instances_false: self.instances_false + other.instances_false,
            pairs: self.pairs + other.pairs,
            pairs_right: self.pairs_right + other.pairs_right,
            pairs_of_two: self.pairs_of_two + other.pairs_of_two,
            pairs_of_two_parted: self.pairs_of_two_parted + other.pairs_of_two_parted,
            sets: self.sets + other.sets,
            sets_pure: self.sets_pure + other.sets_pure,
        }
    }
}

/// Notes which true thing each instance is.
pub fn true_things(draft: &mut Draft) {
    let Some(labels) = &draft.truth else { return };
    let mut sizes: BTreeMap<u8, usize> = BTreeMap::new();
    labels.pixels().for_each(|pixel| *sizes.entry(pixel.0[0]).or_default() += 1);
    let mut taken = vec![];
    for (found, cutout) in draft.record.instances.iter_mut().zip(&draft.cutouts) {
        let thing = best_thing(labels, &sizes, found.area, &cutout.mask).filter(|thing| !taken.contains(thing));
        taken.extend(thing);
        found.true_thing = thing;
    }
}

fn best_thing(labels: &GrayImage, sizes: &BTreeMap<u8, usize>, area: Area, mask: &GrayImage) -> Option<usize> {
    let mut shared: BTreeMap<u8, usize> = BTreeMap::new();
    let mut n_mask = 0;
    for (x, y, _) in mask.enumerate_pixels().filter(|(_, _, pixel)| pixel.0[0] > 127) {
        n_mask += 1;
        *shared.entry(labels.get_pixel(area.left + x, area.top + y).0[0]).or_default() += 1;
    }
    let iou = |label: u8, both: usize| both as f64 / (n_mask + sizes[&label] - both) as f64;
    let things = shared.into_iter().filter(|&(label, _)| label > 0).map(|(label, both)| (label, iou(label, both)));
    let (label, iou) = things.max_by(|a, b| a.1.total_cmp(&b.1))?;
    (iou > FOUND_FROM).then_some(usize::from(label) - 1)
}

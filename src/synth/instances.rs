//! Stage 3: the things in a collage, detected, thinned out, cut out. (The paper's "instance segmentation" is a detector and a
//! segmenter too.)

use anyhow::Result;
use image::{GrayImage, imageops};
use serde::{Deserialize, Serialize};

use super::draft::{Draft, Dropped, Found};
use super::patience::{Patience, answers};
use super::settings::Common;
use super::stage::{Area, Cutout, DetectAsk, Detection, SegmentAsk, Stage};
use super::tool::Tools;
use super::truth::true_things;

/// Goes up when this stage answers otherwise from the same models.
pub const VERSION: u32 = 1;

/// The instances' settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InstanceSettings {
    /// `plain-ground`, or Grounding DINO: its folder, or its name on the hub (`IDEA-Research/grounding-dino-tiny`).
    pub detector: String,
    /// `plain-ground`, or SAM in the same way (`facebook/sam-vit-base`).
    pub segmenter: String,
    /// Detections below this score are dropped.
    pub min_score: f64,
    /// Smallest share of the collage's area that a detection's rectangle takes.
    pub min_share: f64,
    /// Largest such share.
    pub max_share: f64,
    /// Detections that come this near to the collage's edge, in pixels, are taken for cut off; 0: edges do not matter.
    pub edge_px: u32,
    /// Of two detections that overlap (IoU) by more, the less sure one is dropped.
    pub max_overlap: f64,
    /// Smallest share of its rectangle that a mask fills.
    pub min_fill: f64,
    /// The surest so many are used.
    pub max_instances: usize,
}

impl Default for InstanceSettings {
    fn default() -> Self {
        Self {
            detector: "plain-ground".into(),
            segmenter: "plain-ground".into(),
            min_score: 0.3,
            min_share: 0.01,
            max_share: 0.5,
            edge_px: 1,
            max_overlap: 0.5,
            min_fill: 0.2,
            max_instances: 12,
        }
    }
}

/// Finds and cuts out.
pub fn run(settings: &InstanceSettings, common: &Common, tools: &mut Tools, drafts: &mut [Draft]) -> Result<()> {
    let patience = Patience::with(common, drafts);
    let mut alive: Vec<&mut Draft> = drafts.iter_mut().filter(|draft| draft.is_alive()).collect();
    detect(settings, patience, tools, &mut alive)?;
    alive.retain(|draft| draft.is_alive());
    segment(settings, patience, tools, &mut alive)?;
    for draft in alive.into_iter().filter(|draft| draft.is_alive()) {
        true_things(draft);
        let n_found = draft.record.instances.len();
        if n_found < common.min_images {
            draft.reject(Stage::Instances, "too few instances", Some(format!("{n_found} of {}", common.min_images)));
        }
    }
    Ok(())
}

fn detect(settings: &InstanceSettings, patience: Patience, tools: &mut Tools, alive: &mut [&mut Draft]) -> Result<()> {
    let asks: Vec<DetectAsk> = alive
        .iter()
        .filter_map(|draft| Some(DetectAsk { image: draft.collage.as_ref()?, phrase: &draft.record.object }))
        .collect();
    let name = tools.detect.model.name.clone();
    let tool = tools.detect.get()?;
    let found = answers(&name, patience, &asks, &mut |asks| tool.detections(asks))?;
    for (draft, answer) in alive.iter_mut().zip(found) {
        match answer {
            Ok(detections) => {
                let size = draft.collage.as_ref().map_or((0, 0), |collage| collage.dimensions());
                let (kept, dropped) = thinned(settings, size, detections);
                draft.record.dropped = dropped;
                draft.record.instances = kept
                    .into_iter()
                    .map(|Detection { area, score, phrase }| Found { area, score, phrase, ..Found::default() })
                    .collect();
            }
            Err(error) => draft.reject(Stage::Instances, "the detector failed", Some(format!("{error:#}"))),
        }
    }
    Ok(())
}

/// What is kept of the detections in a picture of `size`, surest first; what is not, and why.
fn thinned(
    settings: &InstanceSettings,
    size: (u32, u32),
    mut detections: Vec<Detection>,
) -> (Vec<Detection>, Vec<Dropped>) {
    // Equal scores in reading order, so that nothing depends on the detector's.
    let place = |area: &Area| (area.top, area.left, area.width, area.height);
    detections.sort_by(|a, b| b.score.total_cmp(&a.score).then(place(&a.area).cmp(&place(&b.area))));
    let whole = f64::from(size.0) * f64::from(size.1);
    let (mut kept, mut dropped): (Vec<Detection>, Vec<Dropped>) = (vec![], vec![]);
    for detection in detections {
        let area = detection.area;
        let share = area.pixels() / whole;
        let edge = settings.edge_px;
        let is_near_edge = edge > 0
            && (area.left < edge
                || area.top < edge
                || area.left + area.width + edge > size.0
                || area.top + area.height + edge > size.1);
        let reason = if f64::from(detection.score) < settings.min_score {
            "unsure"
        } else if share < settings.min_share {
            "too small"
        } else if share > settings.max_share {
            "too large"
        } else if is_near_edge {
            "cut off by the edge"
        } else if kept.iter().any(|other| area.overlap(&other.area) > settings.max_overlap) {
            "found twice"
        } else if kept.len() >= settings.max_instances {
            "more than max_instances"
        } else {
            kept.push(detection);
            continue;
        };
        dropped.push(Dropped { area, reason: reason.to_owned() });
    }
    (kept, dropped)
}

fn segment(settings: &InstanceSettings, patience: Patience, tools: &mut Tools, alive: &mut [&mut Draft]) -> Result<()> {
    let areas: Vec<Vec<Area>> =
        alive.iter().map(|draft| draft.record.instances.iter().map(|found| found.area).collect()).collect();
    let asks: Vec<SegmentAsk> = alive
        .iter()
        .zip(&areas)
        .filter_map(|(draft, areas)| Some(SegmentAsk { image: draft.collage.as_ref()?, areas }))
        .collect();
    let name = tools.segment.model.name.clone();
    let tool = tools.segment.get()?;
    let found = answers(&name, patience, &asks, &mut |asks| tool.segments(asks))?;
    for (draft, answer) in alive.iter_mut().zip(found) {
        let segments = match answer {
            Ok(segments) => segments,
            Err(error) => {
                draft.reject(Stage::Instances, "the segmenter failed", Some(format!("{error:#}")));
                continue;
            }
        };
        let Some(collage) = &draft.collage else { continue };
        let mut kept = vec![];
        for (found, segment) in std::mem::take(&mut draft.record.instances).into_iter().zip(segments) {
            let area = bounds(&segment.mask);
            let fill = area.map_or(0.0, |area| covered(&segment.mask) / area.pixels());
            let Some(area) = area.filter(|_| fill >= settings.min_fill) else {
                draft.record.dropped.push(Dropped { area: found.area, reason: "hardly anything cut out".into() });
                continue;
            };
            let Area { left, top, width, height } = area;
            draft.cutouts.push(Cutout {
                image: imageops::crop_imm(collage, left, top, width, height).to_image(),
                mask: imageops::crop_imm(&segment.mask, left, top, width, height).to_image(),
            });
            kept.push(Found { area, mask_score: segment.score, ..found });
        }
        draft.record.instances = kept;
    }
    Ok(())
}

/// The rectangle around what is white in a mask; None where nothing is.
fn bounds(mask: &GrayImage) -> Option<Area> {
    let white = || mask.enumerate_pixels().filter(|(_, _, pixel)| pixel.0[0] > 127);
    let (left, right) = (white().map(|(x, ..)| x).min()?, white().map(|(x, ..)| x).max()?);
    let (top, bottom) = (white().map(|(_, y, _)| y).min()?, white().map(|(_, y, _)| y).max()?);
    Some(Area { left, top, width: right - left + 1, height: bottom - top + 1 })
}

fn covered(mask: &GrayImage) -> f64 {
    mask.pixels().filter(|pixel| pixel.0[0] > 127).count() as f64
}

impl Area {
    /// How many pixels it holds.
    pub fn pixels(&self) -> f64 {
        f64::from(self.width) * f64::from(self.height)
    }

    /// Intersection over union.
    pub fn overlap(&self, other: &Self) -> f64 {
        let shared =
            |a: u32, a_len: u32, b: u32, b_len: u32| f64::from((a + a_len).min(b + b_len)) - f64::from(a.max(b));
        let width = shared(self.left, self.width, other.left, other.width).max(0.0);
        let height = shared(self.top, self.height, other.top, other.height).max(0.0);
        let both = width * height;
        both / (self.pixels() + other.pixels() - both)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(left: u32, top: u32, side: u32, score: f32) -> Detection {
        Detection { area: Area { left, top, width: side, height: side }, score, phrase: "cat".into() }
    }

    #[test]
    fn every_reason_to_drop_a_detection_has_its_name() {
        let settings = InstanceSettings { max_instances: 2, ..InstanceSettings::default() };
        let detections = vec![
            at(10, 10, 20, 0.9),
            at(12, 10, 20, 0.8),
            at(50, 50, 20, 0.7),
            at(50, 10, 20, 0.6),
            at(0, 40, 20, 0.55),
            at(80, 80, 20, 0.54),
            at(1, 1, 98, 0.5),
            at(70, 30, 5, 0.45),
            at(10, 60, 20, 0.1),
        ];
        let (kept, dropped) = thinned(&settings, (100, 100), detections);
        assert_eq!(kept.iter().map(|d| d.area.left).collect::<Vec<_>>(), [10, 50]);
        let reasons: Vec<&str> = dropped.iter().map(|d| d.reason.as_str()).collect();
        let edge = "cut off by the edge";
        assert_eq!(reasons, ["found twice", "more than max_instances", edge, edge, "too large", "too small", "unsure"]);
    }

    #[test]
    fn overlap_is_intersection_over_union() {
        let area = |left, width| Area { left, top: 0, width, height: 4 };
        assert_eq!(area(0, 4).overlap(&area(2, 4)), 8.0 / 24.0);
        assert_eq!(area(0, 4).overlap(&area(4, 4)), 0.0);
        assert_eq!(area(3, 4).overlap(&area(3, 4)), 1.0);
    }
}

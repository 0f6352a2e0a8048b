//! The networks of [`crate::vision`] in the stages instances, affinity and score: Grounding DINO finds, SAM cuts out, CLIP or
//! DINO compares. Each ask goes through alone: numbers that went through beside others could differ in the last bit, and
//! a threshold would make sets of it.

use anyhow::{Result, anyhow};

use super::stage::{Answers, Area, Cutout, DetectAsk, Detection, Detector, Embedder, Segment, SegmentAsk, Segmenter};
use crate::vision::{Finding, ImageEmbedder, ObjectDetector, ObjectSegmenter, Thresholds, on_grey_square};

/// Goes up when the answers change.
pub const VERSION: u32 = 1;

/// The network always gives hundreds of boxes; what scores less is no finding to anybody. The stage's own threshold is higher.
const LIMITS: Thresholds = Thresholds { score: 0.05, word: 0.05 };

impl Detector for ObjectDetector {
    fn detections(&mut self, asks: &[DetectAsk]) -> Answers<Vec<Detection>> {
        asks.iter().map(|ask| detections(self, ask)).collect()
    }
}

fn detections(detector: &ObjectDetector, ask: &DetectAsk) -> Result<Vec<Detection>> {
    let found = detector.find(&[ask.image], &[ask.phrase], LIMITS)?;
    let detection = |Finding { edges, score, phrase }: Finding| {
        let phrase = if phrase.is_empty() { ask.phrase.to_owned() } else { phrase };
        Some(Detection { area: area(edges, ask.image.dimensions())?, score, phrase })
    };
    Ok(found.into_iter().flatten().filter_map(detection).collect())
}

/// The whole pixels between edges, as far as they lie in a picture of this width and height; None where none do.
fn area(edges: [f32; 4], (width, height): (u32, u32)) -> Option<Area> {
    let within = |edge: f32, side: u32| edge.round().clamp(0.0, side as f32) as u32;
    let ([left, right], [top, bottom]) =
        ([edges[0], edges[2]].map(|edge| within(edge, width)), [edges[1], edges[3]].map(|edge| within(edge, height)));
    let is_empty = right <= left || bottom <= top;
    (!is_empty).then(|| Area { left, top, width: right - left, height: bottom - top })
}

impl Segmenter for ObjectSegmenter {
    fn segments(&mut self, asks: &[SegmentAsk]) -> Answers<Vec<Segment>> {
        let edges = |area: &Area| {
            let Area { left, top, width, height } = *area;
            [left, top, left + width, top + height].map(|edge| edge as f32)
        };
        let segments = |ask: &SegmentAsk| {
            if ask.areas.is_empty() {
                return Ok(vec![]);
            }
            let masks = self.masks(ask.image, &ask.areas.iter().map(edges).collect::<Vec<_>>())?;
            Ok(masks.into_iter().map(|found| Segment { mask: found.mask, score: found.score }).collect())
        };
        asks.iter().map(segments).collect()
    }
}

/// Things are compared alone on grey, not with their grounds.
impl Embedder for ImageEmbedder {
    fn embeddings(&mut self, asks: &[Cutout]) -> Answers<Vec<f32>> {
        let vector = |ask: &Cutout| {
            let vectors = self.vectors(&[on_grey_square(&ask.image, &ask.mask)])?;
            vectors.into_iter().next().ok_or_else(|| anyhow!("no vector of a picture"))
        };
        asks.iter().map(vector).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_whole_pixels_inside_the_picture() {
        let of = |edges| area(edges, (100, 50));
        assert_eq!(of([9.6, 4.4, 20.5, 30.0]), Some(Area { left: 10, top: 4, width: 11, height: 26 }));
        assert_eq!(of([-3.0, -1.0, 140.0, 51.0]), Some(Area { left: 0, top: 0, width: 100, height: 50 }));
        assert_eq!([of([20.0, 4.0, 20.3, 30.0]), of([101.0, 4.0, 120.0, 30.0]), of([f32::NAN; 4])], [None, None, None]);
    }
}

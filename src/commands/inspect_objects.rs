//! `jedi inspect objects`: what a phrase names in a picture, found, cut out and drawn.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use serde_json::json;

use super::inspect::read_picture;
use super::models;
use crate::cli::InspectObjectsArgs;
use crate::data::write_png;
use crate::device::Runtime;
use crate::model::grounding_dino::Stages;
use crate::model::write::write_tensors;
use crate::report;
use crate::vision::detector::{Answer, together};
use crate::vision::draw::{colour_name, drawn};
use crate::vision::{Finding, Mask, ObjectDetector, ObjectSegmenter, Thresholds};

pub fn run(args: &InspectObjectsArgs) -> Result<()> {
    let picture = read_picture(&args.image)?;
    let runtime = Runtime::open(args.device.name())?;
    let detector = ObjectDetector::load(&models::open_network("--model", &args.model)?, &runtime)?;
    let segmenter = match &args.segmenter {
        Some(name) => Some(ObjectSegmenter::load(&models::open_network("--segmenter", name)?, &runtime)?),
        None => None,
    };
    let tokens = detector.tokens(&together(&args.phrases))?;
    let stages = detector.stages(&[&picture], std::slice::from_ref(&tokens))?;
    let answer = Answer { logits: &stages.logits.get(0)?, boxes: &stages.boxes.get(0)?, tokens: &tokens };
    let thresholds = Thresholds { score: args.threshold as f32, word: args.word_threshold as f32 };
    let mut findings = answer.findings(picture.dimensions(), thresholds, detector.words())?;
    findings.sort_by(|a, b| b.score.total_cmp(&a.score));
    let boxes: Vec<[f32; 4]> = findings.iter().map(|finding| finding.edges).collect();
    let masks = match &segmenter {
        Some(segmenter) if !boxes.is_empty() => Some(segmenter.masks(&picture, &boxes)?),
        _ => None,
    };
    if let Some(outputs) = &args.outputs {
        let mut named = named(stages, &tokens)?;
        named.insert("pixels".into(), detector.pixels(&picture)?);
        named.insert("edges".into(), Tensor::from_vec(boxes.concat(), (boxes.len(), 4), &Device::Cpu)?);
        if let Some(masks) = &masks {
            named.extend(named_masks(masks, &picture)?);
        }
        write_tensors(outputs, &named, &[])?;
    }
    if findings.is_empty() {
        report::note(format!("nothing scores above --threshold {}; a lower one shows more", args.threshold));
    }
    write_png(&args.out, &drawn(&picture, &findings, masks.as_deref()))?;
    for (number, finding) in findings.iter().enumerate() {
        report::result(line(number, finding, masks.as_ref().map(|masks| &masks[number]), args.json))?;
    }
    report::note(format!("{}: the picture with what was found", args.out.display()));
    Ok(())
}

fn line(number: usize, finding: &Finding, mask: Option<&Mask>, as_json: bool) -> String {
    let [left, top, right, bottom] = finding.edges;
    let n_pixels = mask.map(|mask| mask.mask.pixels().filter(|pixel| pixel.0[0] > 127).count());
    if as_json {
        let mut object = json!({
            "phrase": finding.phrase, "score": finding.score, "box": finding.edges, "colour": colour_name(number),
        });
        if let (Some(mask), Some(n_pixels)) = (mask, n_pixels) {
            object["mask_pixels"] = n_pixels.into();
            object["mask_score"] = mask.score.into();
        }
        return object.to_string();
    }
    let mut line = format!(
        "{:.3}  {left:.1},{top:.1} to {right:.1},{bottom:.1}  {}  ({})",
        finding.score,
        if finding.phrase.is_empty() { "no word alone" } else { &finding.phrase },
        colour_name(number)
    );
    if let (Some(mask), Some(n_pixels)) = (mask, n_pixels) {
        line.push_str(&format!("  mask {n_pixels} px, {:.3}", mask.score));
    }
    line
}

/// 1 where a thing is.
fn named_masks(masks: &[Mask], picture: &RgbImage) -> Result<[(String, Tensor); 2]> {
    let pixels = masks.iter().flat_map(|mask| mask.mask.pixels().map(|pixel| pixel.0[0] / 255)).collect::<Vec<u8>>();
    let shape = (masks.len(), picture.height() as usize, picture.width() as usize);
    let scores: Vec<f32> = masks.iter().map(|mask| mask.score).collect();
    let scores = Tensor::from_vec(scores, masks.len(), &Device::Cpu)?;
    Ok([("masks".into(), Tensor::from_vec(pixels, shape, &Device::Cpu)?), ("mask_scores".into(), scores)])
}

/// For other programs.
fn named(stages: Stages, tokens: &[u32]) -> Result<BTreeMap<String, Tensor>> {
    let tokens = Tensor::from_slice(tokens, (1, tokens.len()), &Device::Cpu)?.to_dtype(DType::I64)?;
    let chosen: Vec<i64> = stages.chosen.concat().into_iter().map(i64::from).collect();
    let chosen = Tensor::from_vec(chosen, (1, stages.chosen[0].len()), &Device::Cpu)?;
    let mut named = BTreeMap::from([
        ("tokens", tokens),
        ("text", stages.text),
        ("enhanced_picture", stages.enhanced_picture),
        ("enhanced_text", stages.enhanced_text),
        ("chosen", chosen),
        ("chosen_boxes", stages.chosen_boxes),
        ("queries", stages.queries),
        ("logits", stages.logits),
        ("boxes", stages.boxes),
    ])
    .into_iter()
    .map(|(name, tensor)| Ok((name.to_owned(), tensor.contiguous()?)))
    .collect::<Result<BTreeMap<_, _>>>()?;
    named.extend((0..).zip(stages.maps).map(|(i, map)| (format!("map.{i}"), map)));
    Ok(named)
}

//! Grounding DINO against transformers, stage by stage; preparation of pictures and texts, and what becomes of answers.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use jedi::device::Runtime;
use jedi::model::Files;
use jedi::model::grounding_dino::{GroundingDino, GroundingDinoConfig, Stages};
use jedi::model::weights::Weights;
use jedi::vision::Thresholds;
use jedi::vision::detector::Answer;
use jedi::vision::prepare::{Family, Preparation, Size};
use jedi::vision::words::Words;
use serde::Deserialize;

use crate::compare::{Comparison, values};
use crate::drawn;
use crate::golden::{Golden, path};

/// The stages of a golden's network on the pictures and texts that all share.
fn run(case: &Golden) -> Stages {
    let config: GroundingDinoConfig = case.fact("config");
    let shapes: BTreeMap<String, Vec<usize>> = case.fact("shapes");
    let weights = Weights::in_memory("drawn", drawn::tensors(&shapes));
    let network = GroundingDino::new(&config, weights, &Runtime::cpu()).unwrap();
    let ids: Vec<Vec<u32>> = case.tensor("input_ids").to_dtype(DType::U32).unwrap().to_vec2().unwrap();
    let lengths: Vec<usize> = case.fact("lengths");
    let texts: Vec<Vec<u32>> = ids.iter().zip(&lengths).map(|(ids, length)| ids[..*length].to_vec()).collect();
    assert!(lengths[0] != lengths[1], "no text is padded");
    network.forward(Golden::open("grounding-plain").tensor("pixels"), &texts).unwrap()
}

/// The logits of each picture's own tokens; those of padding must be −∞.
fn compare_answers(case: &Golden, found: &Stages, comparison: &mut Comparison) {
    let tolerance = case.fact("tolerance");
    let chosen: Vec<Vec<u32>> = case.tensor("chosen").to_dtype(DType::U32).unwrap().to_vec2().unwrap();
    assert_eq!(found.chosen, chosen);
    comparison.tensor("boxes", &found.boxes, case.tensor("boxes"), tolerance);
    let lengths: Vec<usize> = case.fact("lengths");
    for (i, length) in lengths.into_iter().enumerate() {
        let own = found.logits.get(i).unwrap();
        let padding = own.narrow(1, length, own.dim(1).unwrap() - length).unwrap();
        let padding: Vec<f32> = padding.flatten_all().unwrap().to_vec1().unwrap();
        assert!(padding.iter().all(|logit| *logit == f32::NEG_INFINITY));
        let name = format!("logits.{i}");
        comparison.tensor(&name, &own.narrow(1, 0, length).unwrap(), case.tensor(&name), tolerance);
    }
}

#[test]
fn every_stage_is_transformers() {
    let case = Golden::open("grounding-plain");
    let found = run(&case);
    let mut comparison = Comparison::default();
    let mut compare = |name: &str, found: &Tensor| {
        comparison.tensor(name, found, case.tensor(name), case.fact("tolerance"));
    };
    for (i, map) in found.maps.iter().enumerate() {
        compare(&format!("map.{i}"), map);
    }
    compare("text", &found.text);
    compare("enhanced_picture", &found.enhanced_picture);
    compare("enhanced_text", &found.enhanced_text);
    compare("chosen_scores", &found.chosen_scores);
    compare("chosen_boxes", &found.chosen_boxes);
    compare("queries", &found.queries);
    assert_eq!(found.maps.len(), 2);
    compare_answers(&case, &found, &mut comparison);
    comparison.finish();
}

#[test]
fn heads_of_their_own_for_each_layer_are_transformers() {
    let case = Golden::open("grounding-own-heads");
    let mut comparison = Comparison::default();
    compare_answers(&case, &run(&case), &mut comparison);
    comparison.finish();
}

#[derive(Deserialize)]
struct Limits {
    threshold: f32,
    text_threshold: f32,
    phrases: Vec<String>,
}

#[test]
fn findings_are_transformers() {
    let case = Golden::open("grounding-answers");
    let words = Words::read(&Files::Folder(path("tiny-grounding"))).unwrap();
    let tokens: Vec<u32> = case.fact("ids");
    let answer = Answer {
        logits: &case.tensor("logits").get(0).unwrap(),
        boxes: &case.tensor("boxes").get(0).unwrap(),
        tokens: &tokens,
    };
    let mut comparison = Comparison::default();
    for name in ["low", "high"] {
        let limits: Limits = case.fact(name);
        let thresholds = Thresholds { score: limits.threshold, word: limits.text_threshold };
        let found = answer.findings((517, 333), thresholds, &words).unwrap();
        let phrases: Vec<String> = found.iter().map(|finding| finding.phrase.clone()).collect();
        assert_eq!(phrases, limits.phrases, "{name}");
        let scores: Vec<f64> = found.iter().map(|finding| finding.score.into()).collect();
        let edges: Vec<f64> = found.iter().flat_map(|finding| finding.edges.map(f64::from)).collect();
        for (what, found) in [("scores", scores), ("boxes", edges)] {
            let what = format!("{name}.{what}");
            comparison.values(&what, &found, &values(case.tensor(&what)), (1e-6, 0.0));
        }
    }
    comparison.finish();
}

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
}

/// From both files that a tokenizer comes in.
#[test]
fn tokens_of_phrases_are_transformers() {
    let alone = tempfile::tempdir().unwrap();
    std::fs::copy(path("tiny-grounding/vocab.txt"), alone.path().join("vocab.txt")).unwrap();
    let texts: Vec<Text> = Golden::open("grounding-answers").fact("texts");
    for folder in [path("tiny-grounding"), alone.path().to_owned()] {
        let words = Words::read(&Files::Folder(folder.clone())).unwrap();
        for Text { text, ids } in &texts {
            assert_eq!(&words.tokens(text).unwrap(), ids, "{text:?} by {folder:?}");
        }
    }
}

#[test]
fn pictures_are_prepared_as_transformers_does() {
    let case = Golden::open("grounding-pictures");
    let usual = Family::GroundingDino.usual();
    assert_eq!(Preparation::read(&Files::Folder(path("tiny-grounding")), Family::GroundingDino).unwrap(), usual);
    let sizes: Vec<[[u32; 2]; 2]> = case.fact("sizes");
    for [[width, height], new] in sizes {
        assert_eq!(usual.resized((width, height)), new.into(), "{width}×{height}");
    }
    let small = Preparation { size: Some(Size::Between(24, 40)), ..usual };
    let mut comparison = Comparison::default();
    for (name, expected) in &case.tensors {
        let (width, height) = name.split_once('x').unwrap();
        let picture = drawn::picture(width.parse().unwrap(), height.parse().unwrap());
        let found = small.tensor(&picture, &Device::Cpu).unwrap().get(0).unwrap();
        // One level of 255 that is off would be 1.6e-3.
        comparison.tensor(name, &found, expected, 1e-6);
    }
    comparison.finish();
}

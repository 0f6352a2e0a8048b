//! BLIP and BLIP-2 against transformers, from the folders that it writes: pixels, features, scores, and what greedy and beam
//! search find.

use candle_core::Device;
use image::RgbImage;
use jedi::device::Runtime;
use jedi::model::Files;
use jedi::model::blip::{Blip, Blip2, Blip2Config, BlipConfig, Network, Search};
use jedi::synth::BlipCaptioner;
use jedi::vision::prepare::{Family, Preparation, Size};
use serde::Deserialize;

use crate::compare::Comparison;
use crate::golden::{Golden, path};

#[derive(Deserialize)]
struct Case {
    prompt: String,
    beams: usize,
    length_exponent: f64,
    ids: String,
    captions: Vec<String>,
}

const NEW_TOKENS: usize = 12;

fn files(model: &str) -> Files {
    Files::Folder(path(model))
}

fn pictures(case: &Golden) -> Vec<RgbImage> {
    let picture = |index: usize| {
        let tensor = case.tensor(&format!("picture.{index}"));
        let (height, width, _) = tensor.dims3().unwrap();
        let values: Vec<i64> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        let bytes = values.into_iter().map(|value| u8::try_from(value).unwrap()).collect();
        RgbImage::from_raw(width as u32, height as u32, bytes).unwrap()
    };
    (0..3).map(picture).collect()
}

fn ids(case: &Golden, name: &str) -> Vec<Vec<u32>> {
    let rows: Vec<Vec<i64>> = case.tensor(name).to_vec2().unwrap();
    rows.into_iter().map(|row| row.into_iter().map(|id| u32::try_from(id).unwrap()).collect()).collect()
}

fn search(case: &Case) -> Search {
    Search { beams: case.beams, max_new_tokens: NEW_TOKENS, length_exponent: case.length_exponent }
}

/// What both searches find is transformers', token by token and as text.
fn check_searches(model: &str, golden: &Golden) {
    let cases: Vec<Case> = golden.fact("cases");
    let (end, n_prefix): (u32, usize) = (golden.fact("end"), golden.fact("n_prefix"));
    let network = Network::load(&files(model), &Runtime::cpu()).unwrap();
    let captioner = BlipCaptioner::load(&files(model), &Runtime::cpu()).unwrap();
    let (pixels, shown) = (golden.tensor("pixels"), pictures(golden));
    // Without the start token, which the network knows, and BERT's last one.
    let photo = ids(golden, "prompt").remove(0);
    let photo = if n_prefix == 0 { &photo[1..photo.len() - 1] } else { &photo[1..] };
    let mut n_ended = 0;
    for case in &cases {
        let what = format!("{model}, prompt {}, {} beams, length^{}", case.prompt, case.beams, case.length_exponent);
        let (prompt, text) = if case.prompt == "photo" { (photo, "a photo of") } else { (&[][..], "") };
        let found = network.generate(pixels, prompt, search(case)).unwrap();
        for (index, (found, row)) in found.iter().zip(ids(golden, &case.ids)).enumerate() {
            // Behind the end transformers fills with other tokens.
            let new = &row[n_prefix + 1 + prompt.len()..];
            let expected = new.split_inclusive(|&id| id == end).next().unwrap();
            assert_eq!(found, expected, "{what}, picture {index}");
            n_ended += usize::from(expected.len() < NEW_TOKENS);
        }
        let texts: Vec<String> =
            shown.iter().map(|picture| captioner.text(picture, text, search(case)).unwrap()).collect();
        assert_eq!(texts, case.captions, "{what}");
    }
    assert!(cases.len() >= 12 && n_ended >= 8, "{} cases, {n_ended} texts that end", cases.len());
}

fn check_pixels(golden: &Golden, comparison: &mut Comparison) {
    let pictures = pictures(golden);
    for (index, picture) in pictures.iter().enumerate() {
        let expected = golden.tensor("pixels").narrow(0, index, 1).unwrap();
        let side = expected.dim(2).unwrap() as u32;
        let preparation = Preparation { size: Some(Size::Exact(side, side)), ..Family::Blip.usual() };
        let found = preparation.tensor(picture, &Device::Cpu).unwrap();
        // One of 256 steps is 4e-3 of the largest value: the same bytes, but for how they are scaled.
        comparison.tensor(&format!("pixels of picture {index}"), &found, &expected, 2e-7);
    }
}

#[test]
fn blip2_is_transformers() {
    let golden = Golden::open("blip2-cases");
    let tolerance = golden.fact("tolerance");
    let mut comparison = Comparison::default();
    check_pixels(&golden, &mut comparison);
    let files = files("blip2");
    let config = Blip2Config::from_json(&files.json("config.json").unwrap()).unwrap();
    let blip = Blip2::new(&config, files.params("", &Runtime::cpu(), false).unwrap()).unwrap();
    let pixels = golden.tensor("pixels");
    let features = blip.features(pixels).unwrap();
    comparison.tensor("vision", &features, golden.tensor("vision"), tolerance);
    comparison.tensor("queries", &blip.queries(&features).unwrap(), golden.tensor("queries"), tolerance);
    let embedded = blip.embedded(pixels, &ids(&golden, "prompt")[0]).unwrap();
    let prefix = embedded.narrow(1, 0, config.num_query_tokens).unwrap();
    comparison.tensor("prefix", &prefix, golden.tensor("prefix"), tolerance);
    comparison.tensor("logits", &blip.logits(&embedded).unwrap(), golden.tensor("logits"), tolerance);
    comparison.finish();
    check_searches("blip2", &golden);
}

#[test]
fn blip_is_transformers() {
    let golden = Golden::open("blip-cases");
    let tolerance = golden.fact("tolerance");
    let mut comparison = Comparison::default();
    check_pixels(&golden, &mut comparison);
    let files = files("blip");
    let config = BlipConfig::from_json(&files.json("config.json").unwrap()).unwrap();
    let blip = Blip::new(&config, files.params("", &Runtime::cpu(), false).unwrap()).unwrap();
    let features = blip.features(golden.tensor("pixels")).unwrap();
    comparison.tensor("vision", &features, golden.tensor("vision"), tolerance);
    let mut prompt = ids(&golden, "prompt").remove(0);
    prompt.pop();
    prompt[0] = config.text.bos_token_id;
    comparison.tensor("logits", &blip.logits(&features, &prompt).unwrap(), golden.tensor("logits"), tolerance);
    comparison.finish();
    check_searches("blip", &golden);
}

#[test]
fn more_tokens_than_there_are_places_are_refused() {
    let network = Network::load(&files("blip2"), &Runtime::cpu()).unwrap();
    let settings = Search { max_new_tokens: 35, ..Search::default() };
    let golden = Golden::open("blip2-cases");
    let error = network.generate(golden.tensor("pixels"), &[], settings).unwrap_err().to_string();
    assert!(error.contains("more than this model's 40"), "{error}");
}

//! `jedi inspect objects` from outside: a picture and a phrase in, boxes and a drawn picture out.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "parity/drawn.rs"]
mod drawn;
mod harness;
#[path = "harness/lenient.rs"]
mod lenient;
#[path = "harness/room.rs"]
mod room;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use harness::jedi;
use jedi::config;
use jedi::model::write::write_tensors;
use jedi::synth::settings::SynthConfig;
use lenient::LENIENT;
use room::Room;
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A golden's network as a transformers folder; its facts.
fn write_network(name: &str, folder: &str, processing: &Value) -> Value {
    let bytes = std::fs::read(golden(name).with_extension("safetensors")).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let facts: Value = serde_json::from_str(&header.metadata().as_ref().unwrap()["facts"]).unwrap();
    let shapes: BTreeMap<String, Vec<usize>> = serde_json::from_value(facts["shapes"].clone()).unwrap();
    let folder = Path::new(folder);
    write_tensors(&folder.join("model.safetensors"), &drawn::tensors(&shapes), &[]).unwrap();
    std::fs::write(folder.join("config.json"), facts["config"].to_string()).unwrap();
    std::fs::write(folder.join("preprocessor_config.json"), processing.to_string()).unwrap();
    facts
}

fn room() -> Room {
    let room = Room::new();
    let small = json!({"size": {"shortest_edge": 48, "longest_edge": 80}});
    write_network("grounding-plain", &room.path("dino"), &small);
    std::fs::copy(golden("tiny-grounding/tokenizer.json"), room.path("dino/tokenizer.json")).unwrap();
    let processing = json!({"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}});
    write_network("sam", &room.path("sam"), &processing);
    drawn::picture(90, 60).save(room.path("picture.png")).unwrap();
    room
}

#[test]
fn what_is_found_is_printed_and_drawn_and_handed_to_other_programs() {
    let room = room();
    let [model, segmenter, image, out, outputs] =
        ["dino", "sam", "picture.png", "out.png", "out.safetensors"].map(|name| room.path(name));
    let args = [
        &["inspect", "objects", "--model", &model, "--segmenter", &segmenter, "--image", &image][..],
        &["--phrase", "a red toy", "--phrase", "dogs", "--threshold", "0.3", "--device", "cpu"],
        &["--out", &out, "--outputs", &outputs, "--json"],
    ]
    .concat();
    let outcome = jedi(&args);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let things: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(!things.is_empty(), "{}", outcome.stderr);
    let scores: Vec<f64> = things.iter().map(|thing| thing["score"].as_f64().unwrap()).collect();
    assert!(scores.is_sorted_by(|a, b| a >= b) && scores.iter().all(|score| *score > 0.3));
    assert_eq!(things[0]["colour"], "red");
    assert!(things.iter().all(|thing| thing["mask_pixels"].as_u64().is_some_and(|pixels| pixels <= 90 * 60)));
    let picture = image::open(&out).unwrap().to_rgb8();
    assert_eq!(picture.dimensions(), (90, 60));
    assert!(picture.pixels().any(|pixel| pixel.0 == [230, 30, 30]), "no red outline");

    // The boxes that are printed are those of the network, in pixels.
    let tensors = candle_core::safetensors::load(&outputs, &Device::Cpu).unwrap();
    // "a red toy. dogs.": [CLS] a red toy . dog ##s . [SEP]
    assert_eq!(tensors["tokens"].dims(), [1, 9]);
    let best = |logits: &Tensor| logits.get(0).unwrap().max(1).unwrap().to_vec1::<f32>().unwrap();
    let logits = best(&tensors["logits"]);
    let first = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
    let own: Vec<f32> = tensors["boxes"].get(0).unwrap().get(first).unwrap().to_vec1().unwrap();
    let left = things[0]["box"][0].as_f64().unwrap();
    assert!((left - f64::from((own[0] - 0.5 * own[2]) * 90.0)).abs() < 1e-3, "{left} {own:?}");
}

#[test]
fn pictures_are_compared_two_by_two() {
    let room = room();
    let processing = json!({"size": {"shortest_edge": 24}, "crop_size": 24});
    write_network("clip-whole", &room.path("clip"), &processing);
    drawn::picture(60, 90).save(room.path("other.png")).unwrap();
    let [model, image, other, outputs] =
        ["clip", "picture.png", "other.png", "out.safetensors"].map(|name| room.path(name));
    let args = ["inspect", "similarity", "--model", &model, "--image", &image, "--image", &image, "--image", &other];
    let outcome = jedi([&args[..], &["--outputs", &outputs, "--device", "cpu"]].concat());
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let lines: Vec<(f64, &str)> = outcome
        .stdout
        .lines()
        .map(|line| line.split_once("  ").unwrap())
        .map(|(score, names)| (score.parse().unwrap(), names))
        .collect();
    assert_eq!(lines[0], (1.0, format!("{image}  {image}").as_str()));
    assert_eq!((lines.len(), lines[1].0, lines[1].1), (3, lines[2].0, format!("{image}  {other}").as_str()));
    let vectors = candle_core::safetensors::load(&outputs, &Device::Cpu).unwrap();
    let vectors: Vec<Vec<f32>> = vectors["vectors"].to_vec2().unwrap();
    let cosine: f32 = vectors[0].iter().zip(&vectors[2]).map(|(a, b)| a * b).sum();
    assert!((f64::from(cosine) - lines[1].0).abs() < 1e-4 && cosine < 0.9999);
    assert_eq!(jedi(&args[..6]).code, Some(2), "one picture alone");
}

/// With weights by rule the boxes mean nothing, so nothing is asked of them; what is held to is the way from box to set.
#[test]
fn the_same_networks_are_the_eyes_of_the_pipeline() {
    let room = room();
    write_network("clip-whole", &room.path("clip"), &json!({"size": {"shortest_edge": 24}, "crop_size": 24}));
    write_network("dino-first", &room.path("vit"), &json!({"size": 32}));
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/synth-toybox.toml");
    let out = room.path("sets");
    let mut args = vec!["synth-data", "--config", config, "--device", "cpu", "--sets", "2", "--out", &out];
    let [detector, segmenter, model, copies, scorer] = [
        ("instances.detector", "dino"),
        ("instances.segmenter", "sam"),
        ("affinity.model", "clip"),
        ("affinity.copies_model", "clip"),
        ("score.copies_model", "vit"),
    ]
    .map(|(setting, folder)| format!("{setting}={}", room.path(folder)));
    let own = ["affinity.copies_above=1", "compose.steps=1"];
    for setting in
        [&detector, &segmenter, &model, &copies, &scorer].map(String::as_str).into_iter().chain(LENIENT).chain(own)
    {
        args.extend(["--set", setting]);
    }
    let planned = jedi([&args[..], &["--dry-run"]].concat());
    assert!(planned.code == Some(0) && planned.stderr.contains(" GB on disk)"), "{}", planned.stderr);
    let outcome = jedi(&args);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let manifest = std::fs::read_to_string(room.path("sets/dataset.json")).unwrap();
    for folder in ["dino", "sam", "clip", "vit"] {
        assert!(manifest.contains(&room.path(folder)), "{folder}: {manifest}");
    }
    let report = std::fs::read(room.path("sets/report/00000.json")).unwrap();
    let yields = &serde_json::from_slice::<Value>(&report).unwrap()["yields"];
    assert_eq!(yields["sets"], 2, "{yields}");
    // Table 8, by the models that compared.
    let line = outcome.stderr.lines().find(|line| line.contains("mean similarity, final pictures of a set: "));
    let [clip, vit] = ["clip", "vit"].map(|folder| format!(" by {}", room.path(folder)));
    assert!(line.is_some_and(|line| line.contains(&clip) && line.contains(&vit)), "{}", outcome.stderr);
}

#[test]
fn the_config_with_the_papers_eyes_is_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/synth-eyes.toml");
    let settings: SynthConfig = config::load(&path, &[]).unwrap();
    settings.validate().unwrap();
    // §3.1: CLIP similarity, above 0.95.
    assert_eq!(
        (settings.affinity.model.as_str(), settings.affinity.threshold),
        ("openai/clip-vit-large-patch14", 0.95)
    );
    assert_eq!(settings.score_models(), ["openai/clip-vit-large-patch14", "facebook/dinov2-base"]);
}

#[test]
fn wrong_use_is_refused_with_the_way_out() {
    let room = room();
    let [model, sam, image] = ["dino", "sam", "picture.png"].map(|name| room.path(name));
    let long = "toy ".repeat(40);
    for (args, parts) in [
        (["--model", &model, "--image", "none.png", "--phrase", "toy"], ["--image none.png", "no such file"]),
        (["--model", &image, "--image", &image, "--phrase", "toy"], ["--model", "name its folder"]),
        (["--model", "no-such", "--image", &image, "--phrase", "toy"], ["--model no-such", "no such folder"]),
        (["--model", &model, "--image", &image, "--phrase", &long], ["has 43 tokens", "shorten it"]),
    ] {
        let outcome = jedi([&["inspect", "objects"][..], &args[..]].concat());
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{args:?}: {}", outcome.stderr);
        assert!(parts.iter().all(|part| outcome.stderr.contains(part)), "{args:?}: {}", outcome.stderr);
    }
    // A folder of another network.
    let outcome = jedi(["inspect", "objects", "--model", &sam, "--image", &image, "--phrase", "toy"]);
    assert_eq!(outcome.code, Some(1));
    assert!(outcome.stderr.contains("takes a Grounding DINO checkpoint"), "{}", outcome.stderr);
    assert!(!Path::new("objects.png").exists());
}

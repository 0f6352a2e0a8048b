//! `jedi synth-data` with prompts from an endpoint and captions from a network.

use std::fs;
use std::path::Path;
use std::time::Duration;

use image::RgbImage;
use jedi::data::{Dataset, Layout};
use jedi::device::Runtime;
use jedi::model::Files;
use jedi::model::blip::Search;
use jedi::synth::BlipCaptioner;
use serde_json::Value;

use super::verbs::{golden, run};
use crate::server::{Act, Server};

const CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/synth-toybox.toml");

#[test]
fn an_endpoint_writes_the_prompts_and_blip_the_captions() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (out, answers) = (path("sets"), path("answers"));
    // One of four asks is refused until it is given up; its set comes with the next attempt.
    let refused = Act::Refuses("no");
    let server = Server::new(&[refused.clone(), Act::Good, Act::Good, Act::Good, refused.clone(), refused]);
    let url = format!("endpoint.url={}", server.url());
    let (caption, kept) = (format!("caption.model={}", golden("blip")), format!("prompts.answers={answers}"));
    let mut args = vec!["synth-data", "--config", CONFIG, "--sets", "4", "--device", "cpu", "--out", &out];
    for setting in [
        "compose.steps=2",
        "prompts.model=endpoint",
        "endpoint.model=small",
        "endpoint.concurrency=1",
        "caption.beams=2",
        "caption.max_tokens=6",
        "caption.starts_with=a photo of",
        &url,
        &caption,
        &kept,
    ] {
        args.extend(["--set", setting]);
    }
    let dry = run(&[&args[..], &["--dry-run"]].concat());
    assert_eq!((dry.code, server.log().len()), (Some(0), 0), "{}", dry.stderr);
    assert!(dry.stderr.contains("(over the network)") && dry.stdout.contains("max_tokens = 6"), "{}", dry.stderr);
    assert!(!dry.stdout.contains("sk-very-secret") && !dry.stderr.contains("sk-very-secret"));

    let outcome = run(&args);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let asked = server.log();
    assert_eq!(asked.len(), 4 + 2 + 1);
    assert!(asked.iter().all(|asked| asked.key.as_deref() == Some("Bearer sk-very-secret")));
    let report: Value = serde_json::from_slice(&fs::read(Path::new(&out).join("report/00000.json")).unwrap()).unwrap();
    assert_eq!(report["yields"]["rejected"]["prompts: the model failed"], 1, "{report}");

    let captioner = BlipCaptioner::load(&Files::Folder(golden("blip").into()), &Runtime::cpu()).unwrap();
    let search = Search { beams: 2, max_new_tokens: 6, ..Search::default() };
    let sets = Dataset::open(&out, Layout::Sets).unwrap();
    assert!(sets.n_samples() >= 3, "{}", outcome.stderr);
    for index in 0..sets.n_samples() {
        let set = sets.read(index).unwrap();
        let object = set.metadata["object"].as_str().unwrap();
        assert_eq!(set.metadata["object_prompt"], format!("A blue {object}."));
        let prompt = set.metadata["pictures"][0]["prompt"].as_str().unwrap();
        assert!(prompt.starts_with(&format!("A {object} in place ")), "{prompt}");
        let stages = &set.metadata["stages"];
        assert_eq!(stages["prompts"]["models"][0]["name"], "small", "{stages}");
        let blip = &stages["caption"]["models"][0];
        assert_eq!(blip["sha256"].as_str().map(str::len), Some(64), "{blip}");
        let describe = |picture: &RgbImage| captioner.text(picture, "a photo of", search).unwrap();
        assert_eq!(set.captions, set.images.iter().map(describe).collect::<Vec<_>>());
    }

    // Another folder asks nothing that was answered, and whoever answers is part of what the sets are.
    let (elsewhere, again) = (path("again"), path("sets"));
    let position = args.iter().position(|arg| *arg == again).unwrap();
    let mut other = args.clone();
    other[position] = &elsewhere;
    assert_eq!((run(&other).code, server.log().len()), (Some(0), 0));
    let shard = |folder: &str| fs::read(Path::new(folder).join("00000.tar")).unwrap();
    assert!(shard(&out) == shard(&elsewhere));
    let changed = run(&[&args[..], &["--set", "endpoint.model=large"]].concat());
    assert!(
        changed.code == Some(1) && changed.stderr.contains("endpoint.model is \"small\" there"),
        "{}",
        changed.stderr
    );
}

#[test]
fn what_goes_wrong_at_an_endpoint_costs_its_set_alone() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("sets").display().to_string();
    // One item meets the first two, one the last two; five of eight cannot be done.
    let server = Server::new(&[
        Act::Late(Duration::from_millis(1500)),
        Act::Status(429, vec![("retry-after", "0")], ""),
        Act::Good,
        Act::Says("{\"object\": \"half an answ"),
        Act::Refuses("I cannot help with toys"),
        Act::Ends("length"),
        Act::Breaks,
        Act::Breaks,
    ]);
    let url = format!("endpoint.url={}", server.url());
    let mut args = vec!["synth-data", "--config", CONFIG, "--sets", "8", "--device", "cpu", "--out", &out];
    for setting in [
        "sets.attempts=1",
        "sets.retries=0",
        "compose.steps=2",
        "prompts.model=endpoint",
        "prompts.tries=1",
        "endpoint.model=small",
        "endpoint.concurrency=1",
        "endpoint.timeout_secs=1",
        "endpoint.tries=2",
        "endpoint.first_wait_secs=0.01",
        &url,
    ] {
        args.extend(["--set", setting]);
    }
    let outcome = run(&args);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    // What passes was tried twice.
    assert_eq!(server.log().len(), 8 + 2, "{}", outcome.stderr);
    let report: Value = serde_json::from_slice(&fs::read(Path::new(&out).join("report/00000.json")).unwrap()).unwrap();
    assert_eq!(report["yields"]["rejected"]["prompts: the model failed"], 5, "{report}");
    assert!(Dataset::open(&out, Layout::Sets).unwrap().n_samples() >= 1, "{}", outcome.stderr);
}

#[test]
fn a_model_that_never_answers_usably_ends_the_run_and_leaves_no_shard() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("sets").display().to_string();
    // Of random weights.
    let model = format!("prompts.model={}", golden("qwen3.gguf"));
    let mut args = vec!["synth-data", "--config", CONFIG, "--sets", "3", "--device", "cpu", "--out", &out];
    args.extend(["--set", &model, "--set", "prompts.max_tokens=8", "--set", "sets.retries=0"]);
    let dry = run(&[&args[..], &["--dry-run"]].concat());
    assert!(dry.code == Some(0) && dry.stderr.contains("qwen3.gguf (0.0 GB on disk)"), "{}", dry.stderr);
    let outcome = run(&args);
    assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
    for words in ["shard 0, stage prompts: ", "qwen3.gguf: failed 3 times of 3: ", ": 3 answers, the last was "] {
        assert!(outcome.stderr.contains(words), "{words}: {}", outcome.stderr);
    }
    assert!(!Path::new(&out).join("00000.tar").exists());
}

#[test]
fn models_that_cannot_be_are_refused_before_anything_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("sets").display().to_string();
    let refusal = |settings: &[&str]| {
        let mut args = vec!["synth-data", "--config", CONFIG, "--sets", "4", "--device", "cpu", "--out", &out];
        settings.iter().for_each(|setting| args.extend(["--set", setting]));
        let outcome = run(&args);
        assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
        outcome.stderr
    };
    assert!(refusal(&["prompts.model=endpoint"]).contains("is no URL; name one such as http://localhost"));
    assert!(refusal(&["prompts.model=gramar"]).contains("prompts.model gramar: is no model that this stage knows"));
    assert!(refusal(&["caption.model=blipp"]).contains("caption.model blipp: is no model that this stage knows"));
    let message = refusal(&[&format!("caption.model={}", folder.path().display())]);
    assert!(
        message.contains("caption.model ") && message.contains("is no network in transformers' layout: no config.json"),
        "{message}"
    );
    assert!(refusal(&["endpoint.temperature=1"]).contains("unknown field `temperature`"));
    assert!(!Path::new(&out).exists());
}

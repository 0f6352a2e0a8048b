//! `jedi inspect caption` and `jedi inspect prompts` from outside, on models of random weights and on the loopback.

use std::path::Path;

use candle_core::{Device, Tensor};
use image::RgbImage;
use jedi::device::Runtime;
use jedi::model::Files;
use jedi::model::blip::Search;
use jedi::synth::BlipCaptioner;
use serde_json::{Value, json};

use crate::harness::{Outcome, command, jedi};
use crate::server::{Act, Server};

pub fn golden(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).display().to_string()
}

/// Runs the binary without an answer from the hub, with a key.
pub fn run(args: &[&str]) -> Outcome {
    let output = command(args).env("OPENAI_API_KEY", "sk-very-secret").output().expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("the binary writes UTF-8");
    Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[test]
fn captions_are_the_librarys_one_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let pictures: Vec<(String, RgbImage)> = (0..2)
        .map(|index| {
            let picture = RgbImage::from_fn(40 + index * 9, 31, |x, y| image::Rgb([(x * 6) as u8, (y * 8) as u8, 90]));
            let path = folder.path().join(format!("{index}.png"));
            picture.save(&path).unwrap();
            (path.display().to_string(), picture)
        })
        .collect();
    let search = Search { beams: 3, max_new_tokens: 8, length_exponent: 0.5 };
    for model in ["blip", "blip2"] {
        let model = golden(model);
        let captioner = BlipCaptioner::load(&Files::Folder(model.clone().into()), &Runtime::cpu()).unwrap();
        let flags =
            ["--prompt", "a photo of", "--beams", "3", "--max-tokens", "8", "--length-exponent", "0.5", "--json"];
        let args = ["inspect", "caption", "--model", &model, "--device", "cpu", "--image", &pictures[0].0];
        let stages = folder.path().join("stages.safetensors");
        let outputs = ["--outputs", stages.to_str().unwrap()];
        let outcome = jedi(args.iter().chain(&["--image", &pictures[1].0]).chain(&flags).chain(&outputs));
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        let (stages, n_words) = (candle_core::safetensors::load(stages, &Device::Cpu).unwrap(), 3);
        assert_eq!(stages.len(), 2 * 4);
        let mut expected = Vec::new();
        for (number, (path, picture)) in pictures.iter().enumerate() {
            let (text, own) = captioner.stages(picture, "a photo of", search).unwrap();
            assert_eq!(text, captioner.text(picture, "a photo of", search).unwrap());
            expected.push(json!({"image": path, "caption": text}));
            let stage = |name: &str| &stages[&format!("{name}.{number}")];
            for name in ["pixels", "features", "logits"] {
                let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(values(stage(name)), values(&own[name]), "{name}.{number}");
            }
            assert!(stage("logits").dim(1).unwrap() > n_words && stage("ids").dim(0).unwrap() <= 8);
        }
        let found: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn what_cannot_be_described_is_refused_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path().display().to_string();
    let picture = folder.path().join("a.png").display().to_string();
    let caption = |model: &str, image: &str| run(&["inspect", "caption", "--model", model, "--image", image]);
    let outcome = caption(&golden("blip"), &picture);
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.stderr.contains("a.png: no such file; check the path"), "{}", outcome.stderr);
    RgbImage::new(9, 9).save(&picture).unwrap();
    let outcome = caption(&here, &picture);
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.stderr.contains("is no network in transformers' layout: no config.json"), "{}", outcome.stderr);
    let outcome = caption("no-such-model", &picture);
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    for (name, contents, words) in [
        ("config.json", r#"{"model_type": "llava"}"#, "tokenizer.json: is not there; write it in Python"),
        ("tokenizer.json", "{}", "tokenizer.json: "),
    ] {
        std::fs::write(folder.path().join(name), contents).unwrap();
        let outcome = caption(&here, &picture);
        assert_eq!(outcome.code, Some(1));
        assert!(outcome.stderr.contains(words), "{}", outcome.stderr);
    }
    std::fs::copy(golden("blip/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let outcome = caption(&here, &picture);
    assert!(
        outcome.stderr.contains("config.json: model_type is llava, which writes no captions"),
        "{}",
        outcome.stderr
    );
}

#[test]
fn prompts_of_an_endpoint_are_printed_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().display().to_string();
    let server = Server::new(&[Act::Refuses("no")]);
    let url = server.url();
    let args = ["inspect", "prompts", "--endpoint", &url, "--model", "small", "--object", "mug", "--object", "toy car"];
    let outcome = run(&[&args[..], &["--scenes", "1", "--store", &store]].concat());
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let lines: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0], json!({"name": "mug", "object": "A blue mug.", "scenes": ["A mug in place 0."]}));
    assert_eq!((lines.len(), lines[1]["name"].as_str()), (2, Some("toy car")));
    assert!(outcome.stderr.contains("3 questions, 0 answers from the store; 1 refused"), "{}", outcome.stderr);
    assert!(server.log().iter().all(|asked| asked.key.as_deref() == Some("Bearer sk-very-secret")));
    let again = run(&[&args[..], &["--scenes", "1", "--store", &store]].concat());
    assert_eq!((again.stdout, server.log().len()), (outcome.stdout, 0));
    assert!(again.stderr.contains("0 questions, 2 answers from the store"), "{}", again.stderr);
}

#[test]
fn a_model_of_random_weights_writes_nothing_usable_and_that_is_said() {
    let model = golden("qwen3.gguf");
    let args = ["inspect", "prompts", "--model", &model, "--object", "mug", "--device", "cpu", "--max-tokens", "12"];
    let outcome = run(&args);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("mug: 3 answers, the last was "), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("3 questions, 0 answers"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("error: 1 of 1 objects have no prompts"), "{}", outcome.stderr);
    for (model, code, words) in [
        (golden("blip"), 2, "holds 0 .gguf files; name one file"),
        (golden("blip/config.json"), 1, "config.json: is no readable GGUF file"),
    ] {
        let outcome = run(&["inspect", "prompts", "--model", &model, "--object", "mug", "--device", "cpu"]);
        assert_eq!(outcome.code, Some(code), "{}", outcome.stderr);
        assert!(outcome.stderr.contains(words), "{}", outcome.stderr);
    }
}

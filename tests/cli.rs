//! The command line from outside: help, exit codes, and which stream says what.

mod harness;

use std::{collections::HashMap, path::Path, process::Stdio};

use harness::{command, jedi};
use safetensors::{Dtype, serialize_to_file, tensor::TensorView};

#[test]
fn every_verb_explains_its_flags() {
    let verbs: [(&[&str], &[&str]); 9] = [
        (&["sample"], &["--ref", "--prompt", "--model", "--out", "--steps", "--guidance", "--seed", "--noise"]),
        (&["train"], &["--config", "--set", "--out", "--dry-run", "--device"]),
        (&["synth-data"], &["--source", "--sets", "--images", "--size", "--out", "--shard"]),
        (
            &["eval"],
            &["--protocol", "--model", "--toys", "--only", "--sampler", "--guidance", "--image-scale", "--json"],
        ),
        (&["inspect", "eps"], &["--model", "--inputs", "--outputs", "--grads"]),
        (&["inspect", "text"], &["--model", "--tokenizer", "--prompt", "--outputs"]),
        (&["inspect", "vae"], &["--model", "--image", "--outputs"]),
        (&["inspect", "checkpoint"], &["<PATH>"]),
        (&["convert"], &["--model", "--tokenizer", "--out", "--dtype", "--max-shard-size", "--joint", "--prediction"]),
    ];
    for (verb, flags) in verbs {
        let help = jedi(verb.iter().chain(&["--help"]));
        assert_eq!(help.code, Some(0), "{verb:?}: {}", help.stderr);
        assert!(help.stderr.is_empty(), "{verb:?}: help belongs on stdout");
        for flag in flags {
            assert!(help.stdout.contains(flag), "{verb:?}: {flag} is not in the help");
        }
    }
}

#[test]
fn wrong_usage_exits_2_and_leaves_stdout_empty() {
    let wrong: [&[&str]; 8] = [
        &[],
        &["paint"],
        &["sample", "--prompt", "a robot", "--no-such-flag"],
        &["sample", "--ref", "robot.png"],
        &["sample", "--prompt", "a robot", "--steps", "0"],
        &["synth-data", "--sets", "1", "--out", "sets", "--shard", "2/2"],
        &["eval", "--text-scale", "2"],
        &["eval", "--karras"],
    ];
    for args in wrong {
        let outcome = jedi(args);
        assert_eq!(outcome.code, Some(2), "{args:?}: {}", outcome.stderr);
        assert!(outcome.stdout.is_empty() && !outcome.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn fails_when_the_config_is_missing() {
    let outcome = jedi(["train", "--config", "missing.toml"]);
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.stderr.starts_with("error: missing.toml: "), "{}", outcome.stderr);
    assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.stderr);
}

#[test]
fn fails_when_an_override_has_no_value() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = folder.path().join("run.toml");
    std::fs::write(&config, "").expect("a file in it");
    let outcome = jedi(["train", "--set", "steps", "--config", config.to_str().expect("a plain path")]);
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("--set steps"), "{}", outcome.stderr);
}

#[test]
fn inspect_checkpoint_lists_the_tensors_below_a_folder() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("unet").join("weights.safetensors");
    std::fs::create_dir(folder.path().join("unet")).expect("a folder in it");
    write_checkpoint(&file, 2);
    let outcome = jedi([Path::new("inspect"), Path::new("checkpoint"), folder.path()]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let lines: Vec<&str> = outcome.stdout.lines().map(str::trim).collect();
    let bytes = std::fs::read(&file).expect("the file just written");
    let hash = format!("{} bytes, sha256 {}", bytes.len(), jedi::sha256::sha256_hex(&bytes));
    let file = file.to_str().expect("a plain path");
    let expected = [file, "tensor.0 F32 [2, 3]", "tensor.1 F32 [2, 3]", "2 tensors, 12 values", &hash];
    assert_eq!(lines, expected);
}

#[test]
fn inspect_checkpoint_refuses_what_is_none() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("picture.png");
    std::fs::write(&file, b"\x89PNG\r\n\x1a\n and more").expect("a file in it");
    let outcome = jedi([Path::new("inspect"), Path::new("checkpoint"), &file]);
    assert_eq!(outcome.code, Some(1));
    assert!(outcome.stderr.contains("picture.png: not a safetensors file"), "{}", outcome.stderr);
    let cut = folder.path().join("cut");
    write_checkpoint(&cut, 2);
    let bytes = std::fs::read(&cut).expect("the file just written");
    std::fs::write(&cut, &bytes[..bytes.len() - 1]).expect("the same file");
    let outcome = jedi([Path::new("inspect"), Path::new("checkpoint"), &cut]);
    assert_eq!(outcome.code, Some(1));
    assert!(outcome.stderr.contains("cut short"), "{}", outcome.stderr);
    let outcome = jedi([Path::new("inspect"), Path::new("checkpoint"), folder.path()]);
    assert_eq!(outcome.code, Some(2), "a folder without any is a wrong argument: {}", outcome.stderr);
}

#[test]
fn a_reader_that_went_away_is_no_failure() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("weights.safetensors");
    write_checkpoint(&file, 100);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let output = command([Path::new("inspect"), Path::new("checkpoint"), &file])
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .expect("the binary starts");
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty());
}

/// `n_tensors` tensors `tensor.<i>` of shape [2, 3].
fn write_checkpoint(path: &Path, n_tensors: usize) {
    let bytes = [0; 24];
    let tensor = || TensorView::new(Dtype::F32, vec![2, 3], &bytes).expect("24 bytes are six f32");
    let tensors: HashMap<String, TensorView> = (0..n_tensors).map(|i| (format!("tensor.{i}"), tensor())).collect();
    serialize_to_file(&tensors, None, path).expect("a file that can be written");
}

//! `jedi doctor`, `jedi completions` and `jedi man` from outside.

mod harness;

use harness::{Outcome, command, jedi};

/// Without asking a hub; `tests/hub` does that.
fn doctor(flags: &[&str]) -> Outcome {
    let output = command(["doctor", "--device", "cpu"].iter().chain(flags)).env("HF_HUB_OFFLINE", "1").output();
    let output = output.expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("the binary writes UTF-8");
    Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[test]
fn every_check_passes_on_the_model_inside_the_program() {
    let outcome = doctor(&["--json"]);
    assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    let findings: Vec<serde_json::Value> =
        outcome.stdout.lines().map(|line| serde_json::from_str(line).expect("a JSON object a line")).collect();
    let checks: Vec<&str> = findings.iter().filter_map(|finding| finding["check"].as_str()).collect();
    assert_eq!(checks, ["build", "processor", "memory", "device", "gradients", "cache", "hub", "model"]);
    let build = findings[0]["says"].as_str().expect("a sentence");
    let features = [(cfg!(feature = "cuda"), "CUDA"), (cfg!(feature = "mpi"), "MPI"), (cfg!(feature = "nccl"), "NCCL")];
    for (is_in, name) in features {
        assert!(build.contains(&format!("{} {name}", if is_in { "with" } else { "without" })), "{build}");
    }
    assert!(findings[7]["says"].as_str().is_some_and(|says| says.starts_with("toybox: takes references, 64×64")));
}

#[test]
fn a_model_that_is_not_there_fails_its_line_and_the_run() {
    let outcome = doctor(&["--model", "no-such-model"]);
    assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
    let last = outcome.stdout.lines().last().expect("a line");
    assert!(last.starts_with("FAIL  model") && last.contains("no such folder; check the path"), "{last}");
    assert!(outcome.stdout.contains("ok    gradients"), "the other checks are made all the same");
}

#[test]
fn completions_name_every_verb_in_every_shell() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let outcome = jedi(["completions", shell]);
        assert_eq!(outcome.code, Some(0), "{shell}: {}", outcome.stderr);
        for word in ["synth-data", "ref-mask", "doctor"] {
            assert!(outcome.stdout.contains(word), "{shell}: no {word}");
        }
    }
    assert_eq!(jedi(["completions", "sh"]).code, Some(2));
}

#[test]
fn there_is_a_manual_page_for_every_verb() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("man");
    let outcome = jedi(["man", "--out", &out.display().to_string()]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    for (page, text) in [("jedi", "sample"), ("jedi-sample", "guidance"), ("jedi-inspect-attention", "correspondences")]
    {
        let roff = std::fs::read_to_string(out.join(format!("{page}.1"))).expect("a page");
        assert!(roff.starts_with(".") && roff.contains(text), "{page}");
    }
    assert_eq!(outcome.stdout.lines().count(), out.read_dir().expect("the folder").count());
}

//! `jedi doctor`, `jedi completions` and `jedi man` from outside.

#[allow(dead_code)] // A command that is not yet started; here all run to their end.
mod harness;

use harness::jedi;

#[test]
fn every_check_passes_on_the_model_inside_the_program() {
    let outcome = jedi(["doctor", "--json", "--device", "cpu"]);
    assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    let findings: Vec<serde_json::Value> =
        outcome.stdout.lines().map(|line| serde_json::from_str(line).expect("a JSON object a line")).collect();
    let checks: Vec<&str> = findings.iter().filter_map(|finding| finding["check"].as_str()).collect();
    assert_eq!(checks, ["build", "processor", "memory", "device", "gradients", "model"]);
    assert!(findings[5]["says"].as_str().is_some_and(|says| says.starts_with("toybox: takes references, 64×64")));
}

#[test]
fn a_model_that_is_not_there_fails_its_line_and_the_run() {
    let outcome = jedi(["doctor", "--model", "no-such-model", "--device", "cpu"]);
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

//! The README's first command does what it says, all of its commands and those of `docs/` are ones that the program knows, the
//! files that they link and name are there, and the model inside the program keeps the toy that it is shown.

mod harness;

use std::path::Path;

use clap::Parser as _;
use harness::{command, jedi};
use jedi::cli::Cli;

/// The README and the pages that it sends its readers to.
const PAGES: [&str; 2] = ["README.md", "docs/synth-data.md"];

fn text(page: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).expect(page)
}

/// The arguments behind `prefix` on a page's lines of code that begin so, quotes taken as a shell takes them.
fn commands(page: &str, prefix: &str) -> Vec<Vec<String>> {
    let text = text(page);
    let code = text.split("```").skip(1).step_by(2).flat_map(str::lines);
    let without_remark = |line: &str| line.split(" #").next().unwrap_or_default().trim().to_owned();
    code.filter_map(|line| line.strip_prefix(prefix)).map(|line| words(&without_remark(line))).collect()
}

/// A command in which `…` stands for what readers put in, with something in its place.
fn filled(command: &[String]) -> Vec<String> {
    let mut whole = vec!["jedi".to_owned()];
    for word in command {
        let rest: &[&str] = match (word.as_str(), command[0].as_str(), whole.last().map(String::as_str)) {
            ("…", _, Some("--config")) => &["file.toml"],
            ("…", "synth-data", _) => &["--config", "file.toml", "--sets", "1", "--out", "sets"],
            ("…", "sample", _) => &["--prompt", "a robot"],
            ("…", ..) => &[],
            (word, ..) => &[word],
        };
        whole.extend(rest.iter().map(|&word| word.to_owned()));
    }
    whole
}

fn words(line: &str) -> Vec<String> {
    let (mut words, mut is_quoted) = (vec![String::new()], false);
    for letter in line.chars() {
        match letter {
            '"' => is_quoted = !is_quoted,
            ' ' if !is_quoted => words.push(String::new()),
            other => words.last_mut().expect("starts with one").push(other),
        }
    }
    words
}

#[test]
fn the_first_command_paints_a_picture() {
    let found = commands("README.md", "cargo run --release -- ");
    assert!(!found.is_empty(), "the README shows no command");
    for arguments in found {
        let out = tempfile::tempdir().unwrap();
        let run = command(&arguments)
            .args(["--device", "cpu", "--out"])
            .arg(out.path())
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        assert!(run.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&run.stderr));
        let printed = String::from_utf8(run.stdout).unwrap();
        let picture = image::open(printed.lines().next().expect("a path")).unwrap().into_rgb8();
        assert_eq!(picture.dimensions(), (64, 64));
        let first = picture.get_pixel(0, 0);
        assert!(picture.pixels().any(|pixel| pixel != first), "a picture of one colour");
    }
}

#[test]
fn every_command_is_one_that_the_program_knows() {
    let mut n_commands = 0;
    for page in PAGES {
        for command in commands(page, "jedi ") {
            let parsed = Cli::try_parse_from(filled(&command));
            assert!(parsed.is_ok(), "{page}: jedi {}: {}", command.join(" "), parsed.unwrap_err());
            let config = command.iter().skip_while(|word| *word != "--config").nth(1).filter(|file| *file != "…");
            let is_there = |file: &String| Path::new(env!("CARGO_MANIFEST_DIR")).join(file).is_file();
            assert!(config.is_none_or(is_there), "{page}: there is no {config:?}");
            n_commands += 1;
        }
    }
    assert!(n_commands > 30, "{n_commands} commands were found");
}

#[test]
fn links_lead_somewhere() {
    for page in PAGES {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
        let text = text(page);
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://") && !link.starts_with('#')) {
            assert!(folder.with_file_name(link).exists(), "{page} links {link}");
        }
    }
}

/// A few of the 64 held-out toys; the full figures are scripts/figures.sh's.
#[test]
fn the_embedded_model_paints_the_scene_and_sees_the_toy_by_coupled_attention() {
    let run = jedi(
        ["eval", "--toys", "12", "--steps", "8", "--only", "coupled", "--only", "uncoupled"]
            .iter()
            .chain(&["--json", "--device", "cpu"]),
    );
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let report: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(report["sampling"], serde_json::json!({"steps": 8}));
    let right = |row: usize, what: &str| report["rows"][row][what]["hits"].as_u64().expect("a count");
    let (scene, coupled, uncoupled) = (right(0, "scene"), right(0, "toy_of_kind"), right(1, "toy_of_kind"));
    assert!(scene >= 10 && coupled > uncoupled + 2, "of 12: scene {scene}, toy {coupled}, uncoupled {uncoupled}");
}

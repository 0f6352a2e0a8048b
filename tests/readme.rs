//! The README's first command does what it says, and the model inside the program keeps the toy that it is shown.

mod harness;

use harness::{command, jedi};

/// The arguments behind `prefix` on the README's lines that begin so, quotes taken as a shell takes them.
fn commands(prefix: &str) -> Vec<Vec<String>> {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).expect("the README");
    readme.lines().filter_map(|line| line.strip_prefix(prefix)).map(words).collect()
}

fn words(line: &str) -> Vec<String> {
    let (mut words, mut is_quoted) = (vec![String::new()], false);
    for letter in line.trim().chars() {
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
    let found = commands("cargo run --release -- ");
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

/// A quarter of the 64 held-out toys; the full figures are scripts/figures.sh's.
#[test]
fn the_embedded_model_paints_the_scene_and_sees_the_toy_by_coupled_attention() {
    let run = jedi(
        ["eval", "--toys", "16", "--steps", "10", "--only", "coupled", "--only", "uncoupled"]
            .iter()
            .chain(&["--json", "--device", "cpu"]),
    );
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let report: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(report["sampling"], serde_json::json!({"steps": 10}));
    let right = |row: usize, what: &str| report["rows"][row][what]["hits"].as_u64().expect("a count");
    let (scene, coupled, uncoupled) = (right(0, "scene"), right(0, "toy_of_kind"), right(1, "toy_of_kind"));
    assert!(scene >= 13 && coupled > uncoupled + 2, "of 16: scene {scene}, toy {coupled}, uncoupled {uncoupled}");
}

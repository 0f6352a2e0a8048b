//! Holds the arrows of the house (see `src/lib.rs`): who may use whom, and that only `report` prints.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// What every room may use.
const BOTTOM: &[&str] = &["device", "folder_lock", "interrupt", "invalid", "rng", "sha256", "shape", "whole_file"];

/// Which rooms each room may use besides the bottom and itself. `commands` may use all.
const ARROWS: &[(&str, &[&str])] = &[
    ("ops", &[]),
    ("diffusion", &["ops"]),
    ("model", &["ops"]),
    ("data", &["ops"]),
    ("vision", &["model", "data", "ops"]),
    ("eval", &["vision", "model", "data", "ops"]),
    ("sample", &["model", "diffusion", "data", "ops"]),
    ("ranks", &[]),
    ("train", &["model", "diffusion", "data", "ops", "ranks"]),
    ("synth", &["sample", "eval", "vision", "model", "diffusion", "data"]),
    ("cli", &[]),
    ("config", &[]),
    ("report", &[]),
];

const TOP: &str = "commands";

/// Ways to print that need not go through `report`.
const PRINTERS: &[&str] = &["println!", "print!(", "dbg!(", "io::stdout", "io::stderr"];

#[test]
fn every_arrow_points_down() {
    let files = source_files();
    assert!(files.len() > 20, "the sources were not found: {files:?}");
    let complaints: Vec<String> = files.iter().flat_map(|(path, text)| complaints(path, text)).collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn arrows_that_do_not_point_down_are_found() {
    let wrong = [
        ("src/model/unet.rs", "use crate::train::Trainer;"),
        ("src/ops/conv.rs", "fn f() { crate::model::vae::f() }"),
        ("src/train/step.rs", "use crate::{\n    data::{set, sources::{A, B}},\n    sample,\n};"),
        ("src/sample/mod.rs", "pub(crate) use crate::train;"),
        ("src/diffusion/mod.rs", "use super::model::Vae;"),
        ("src/diffusion/ddim.rs", "use super::super::{ops, model};"),
        ("src/rng.rs", "use crate::ops;"),
        ("src/data/set.rs", "use crate::report;"),
        ("src/train/mod.rs", "use crate::cli::TrainArgs;"),
        ("src/train/mod.rs", "fn f() { println!() }"),
        ("src/train/mod.rs", "use crate::attic::Thing;"),
        ("src/attic/mod.rs", ""),
        ("src/main.rs", "use jedi::train::run;"),
    ];
    for (path, text) in wrong {
        assert_eq!(complaints(Path::new(path), text).len(), 1, "{path}: {text}");
    }
}

#[test]
fn arrows_that_point_down_are_let_through() {
    let right = [
        ("src/model/unet.rs", "use crate::ops::{self, train};\nuse super::blocks;\nuse crate::shape::SetShape;"),
        ("src/model/unet.rs", "// not crate::train\n/// nor [`crate::sample`]\nuse crate::{model::Vae, rng::Rng};"),
        ("src/train/mod.rs", "use crate::{data, diffusion::schedule::{A, B}, model};\npub(crate) fn f() {}"),
        ("src/eval/mod.rs", "pub mod report;\nmod tests { use super::report; use super::*; }"),
        ("src/commands/train.rs", "use crate::{cli, config, report, train::{Trainer, Settings}};"),
        ("src/report.rs", "writeln!(io::stdout())"),
        ("src/main.rs", "fn main() { jedi::commands::run() }"),
        ("src/lib.rs", "pub mod train;"),
    ];
    for (path, text) in right {
        assert_eq!(complaints(Path::new(path), text), Vec::<String>::new(), "{path}: {text}");
    }
}

/// What is wrong in one file; `path` starts at `src`.
fn complaints(path: &Path, text: &str) -> Vec<String> {
    let code = without_comments(text);
    let mut modules: Vec<String> = path.with_extension("").iter().skip(1).map(|p| p.display().to_string()).collect();
    modules.pop_if(|last| last == "mod");
    let room = match modules.first().map(String::as_str) {
        Some("lib") | None => return Vec::new(),
        Some(room) => room,
    };

    let (used, may_use): (_, Vec<&str>) = match room {
        "main" => (names_after(&code, "jedi::"), vec![TOP]),
        room => (rooms_used(&code, modules.len()), allowed(room)),
    };
    let mut complaints = Vec::new();
    if room != "main" && may_use.is_empty() {
        complaints.push(format!("{}: {room} is no room of the house; enter it in tests/layers.rs", path.display()));
    }
    complaints.extend(
        used.iter()
            .filter(|name| !may_use.contains(&name.as_str()) && *name != room)
            .map(|name| format!("{}: {room} must not use {name}", path.display())),
    );
    if room != "report" && PRINTERS.iter().any(|printer| code.contains(printer)) {
        complaints.push(format!("{}: only report prints", path.display()));
    }
    complaints
}

/// What a room may use; empty for a room that is not known.
fn allowed(room: &str) -> Vec<&'static str> {
    let known = || ARROWS.iter().map(|(name, _)| *name);
    if room == TOP {
        return known().chain(BOTTOM.iter().copied()).collect();
    }
    let below = match ARROWS.iter().find(|(name, _)| *name == room) {
        Some((_, below)) => *below,
        None if BOTTOM.contains(&room) => &[],
        None => return Vec::new(),
    };
    below.iter().chain(BOTTOM).copied().collect()
}

/// The top-level modules that the code names, in a file whose own module is `depth` below the crate's root.
fn rooms_used(code: &str, depth: usize) -> BTreeSet<String> {
    let mut used = names_after(code, "crate::");
    // `super::` often enough reaches the root as well, except from a module inside the file, where it reaches one less:
    // a name that the file declares itself is its own.
    let is_room = |name: &str| !allowed(name).is_empty();
    let is_own = |name: &str| code.contains(&format!("mod {name};"));
    let outside = names_after(code, &"super::".repeat(depth));
    used.extend(outside.into_iter().filter(|name| is_room(name) && !is_own(name)));
    used
}

/// The first name of every path that follows `prefix`, braces opened.
fn names_after(code: &str, prefix: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices(prefix) {
        // `some_crate::` is another word.
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        match rest.strip_prefix('{') {
            Some(group) => names.extend(first_names_of_group(group)),
            None => names.extend(first_name(rest)),
        }
    }
    names
}

/// The first name of each path of a `use` group, whose opening brace is already read.
fn first_names_of_group(group: &str) -> Vec<String> {
    let (mut depth, mut starts) = (0usize, vec![0]);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => starts.push(at + 1),
            _ => {}
        }
    }
    starts.into_iter().filter_map(|start| first_name(&group[start..])).collect()
}

fn first_name(path: &str) -> Option<String> {
    let name: String = path.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!name.is_empty() && name != "self").then_some(name)
}

fn without_comments(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Every Rust file below `src`, its path from the crate's folder, its text.
fn source_files() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut folders, mut files) = (vec![root.join("src")], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder that was just listed") {
            let path = entry.expect("an entry of a readable folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|suffix| suffix == "rs") {
                let text = fs::read_to_string(&path).expect("a source file");
                files.push((path.strip_prefix(root).expect("a path below the root").to_owned(), text));
            }
        }
    }
    files
}

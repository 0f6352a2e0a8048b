//! `jedi synth-data` from outside: what it writes, going on, sharing out, and what `train` refuses to read.

mod harness;
#[path = "harness/room.rs"]
mod room;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use harness::{Outcome, command, jedi};
use jedi::folder_lock;
use room::Room;

impl Room {
    /// Twelve sets of two 16-pixel pictures.
    fn synth(&self, out: &str, flags: &[&str]) -> Outcome {
        let out = self.path(out);
        jedi(["synth-data", "--sets", "12", "--images", "2", "--size", "16", "--out", &out].iter().chain(flags))
    }

    /// Without the parts' locks.
    fn files(&self, name: &str) -> BTreeMap<String, Vec<u8>> {
        let is_data = |(name, _): &(String, Vec<u8>)| !name.ends_with(".lock");
        let entries = fs::read_dir(self.path(name)).expect("a folder");
        let file = |entry: std::io::Result<fs::DirEntry>| {
            let entry = entry.expect("an entry");
            (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).expect("a file"))
        };
        entries.map(file).filter(is_data).collect()
    }
}

fn done(outcome: Outcome) -> Outcome {
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    outcome
}

#[test]
fn writes_strips_with_captions_and_goes_on_where_it_was() {
    let room = Room::new();
    let outcome = done(room.synth("sets", &["--seed", "4"]));
    assert_eq!(outcome.stdout.trim(), room.path("sets"));
    assert!(outcome.stderr.contains("12 sets of 2 pictures written, 0 were there"), "{}", outcome.stderr);
    let files = room.files("sets");
    assert_eq!(files.len(), 12 * 3 + 1, "picture, captions and metadata a set, and the manifest");
    let strip = image::load_from_memory(&files["00000011.png"]).expect("a picture");
    assert_eq!((strip.width(), strip.height()), (16, 32));
    assert!(String::from_utf8_lossy(&files["00000011.txt"]).contains("<|split|>"));

    fs::remove_file(room.path("sets/00000003.png")).expect("a set's picture");
    let again = done(room.synth("sets", &["--seed", "4"]));
    assert!(again.stderr.contains("1 sets of 2 pictures written, 11 were there"), "{}", again.stderr);
    assert!(room.files("sets") == files);
    let held = folder_lock::hold(Path::new(&room.path("sets")), "part-0-of-1.lock", "test").expect("nobody else");
    let second = room.synth("sets", &["--seed", "4"]);
    let expected = "another jedi synth-data is at work";
    assert!(second.code == Some(1) && second.stderr.contains(expected), "{}", second.stderr);
    drop(held);
    let other = room.synth("sets", &["--seed", "5"]);
    assert!(other.code == Some(1) && other.stderr.contains("seed is 4 there, 5 now"), "{}", other.stderr);
}

#[test]
fn an_interrupted_run_says_how_to_go_on() {
    let room = Room::new();
    let out = room.path("sets");
    let args = ["synth-data", "--sets", "100000", "--images", "2", "--size", "16", "--out", &out];
    let child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    // Signals are caught before the manifest is written.
    while !Path::new(&out).join("dataset.json").exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill starts");
    assert!(sent.success());
    let output = child.wait_with_output().expect("it ends");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{message}");
    assert!(message.contains("run the same command again to go on"), "{message}");
    assert!(room.files("sets").keys().all(|name| !name.starts_with('.')), "half a file is left");
}

#[test]
fn parts_and_tars_make_up_the_whole() {
    let room = Room::new();
    done(room.synth("whole", &["--masks"]));
    let whole = room.files("whole");
    assert!(whole.contains_key("00000000.1.mask.png"));
    for part in ["1/2", "0/2"] {
        done(room.synth("parts", &["--masks", "--shard", part]));
    }
    assert!(room.files("parts") == whole);

    done(room.synth("tars", &["--per-shard", "5"]));
    let tars: Vec<_> = room.files("tars").into_keys().collect();
    assert_eq!(tars, ["00000.tar", "00001.tar", "00002.tar", "dataset.json"]);
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let room = Room::new();
    fs::write(room.path("file"), "").expect("a writable folder");
    let outcome = room.synth("file/sets", &[]);
    assert_eq!(outcome.code, Some(1));
    assert!(outcome.stderr.starts_with("error: ") && outcome.stderr.contains("file/sets: "), "{}", outcome.stderr);
}

/// Data that `train` cannot use is refused by the name of the sample, before anything is trained.
#[test]
fn train_refuses_broken_sets_by_name() {
    let room = Room::new();
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/toybox");
    for (name, height, captions, message) in [
        ("height", 40, "a<|split|>b", "a strip 16 wide and 40 high is not made of squares"),
        ("count", 32, "a<|split|>b<|split|>c", "3 captions for 2 pictures"),
    ] {
        let folder = room.path(name);
        fs::create_dir(&folder).expect("a writable folder");
        image::RgbImage::new(16, height).save(Path::new(&folder).join("broken.png")).expect("a file");
        fs::write(Path::new(&folder).join("broken.txt"), captions).expect("a file");
        let sets = [
            format!("data.source={folder}"),
            "data.size=64".to_owned(),
            "run.steps=1".to_owned(),
            format!("model.architecture={}", configs.join("architecture").display()),
        ];
        let (config, out) = (configs.join("autoencoder.toml").display().to_string(), room.path("run"));
        let mut args = vec!["train", "--config", &config, "--out", &out, "--device", "cpu"];
        sets.iter().for_each(|set| args.extend(["--set", set]));
        let outcome = jedi(args);
        assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("broken") && outcome.stderr.contains(message), "{}", outcome.stderr);
    }
}

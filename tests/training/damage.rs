//! A checkpoint that is not as it was written is found, and the one before it used; a full disk costs no good one.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;

use jedi::train::ObjectiveKind::Autoencoder;

use super::harness;
use super::resume::{STATE, arguments, assert_same_run};
use super::world::{World, bits, metrics};

const STEPS: [&str; 1] = ["run.checkpoint_every=2"];

/// A run of 6 steps in `cut` that was stopped after 4, with checkpoints of 2 and 4.
fn cut_run(world: &World) -> PathBuf {
    world.train(&world.config(Autoencoder, &STEPS), "cut", Some(4)).expect("a start of it");
    world.path("cut")
}

fn truncate(path: &Path) {
    let file = OpenOptions::new().write(true).open(path).expect("a file");
    file.set_len(file.metadata().expect("a length").len() - 1).expect("a shorter file");
}

fn change_a_byte(path: &Path) {
    let mut bytes = fs::read(path).expect("a file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).expect("a file");
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_used() {
    /// A file, and what happens to it.
    type Damage<'a> = (&'static str, &'a dyn Fn(&Path));
    let world = World::new();
    let remove = |path: &Path| fs::remove_file(path).expect("a file");
    let damages: [Damage; 7] = [
        ("state/optimizer.safetensors", &truncate),
        ("state/optimizer.safetensors", &change_a_byte),
        ("state/optimizer.safetensors", &remove),
        ("vae/diffusion_pytorch_model.safetensors", &change_a_byte),
        ("jedi.json", &truncate),
        ("state/sha256sums", &truncate),
        ("state/sha256sums", &remove),
    ];
    world.train(&world.config(Autoencoder, &STEPS), "whole", None).unwrap();
    let (cut, kept) = (cut_run(&world), world.path("kept"));
    fs::rename(&cut, &kept).unwrap();
    for (file, damage) in damages {
        let copied = Command::new("cp").arg("-a").arg(&kept).arg(&cut).status();
        assert!(copied.expect("cp").success());
        damage(&cut.join("checkpoints/step-4").join(file));
        world.notices.borrow_mut().clear();
        world.train(&world.config(Autoencoder, &STEPS), "cut", None).unwrap();
        let notices = world.notices.take();
        let [notice] = &notices[..] else { panic!("{file}: {notices:?}") };
        for part in [cut.join("checkpoints/step-4").to_str().unwrap(), file, "going on from step 2"] {
            assert!(notice.contains(part), "{part} is not in: {notice}");
        }
        assert_same_run(&world.path("whole"), &cut);
        fs::remove_dir_all(&cut).unwrap();
    }
}

#[test]
fn a_run_without_a_whole_checkpoint_is_not_started_over() {
    let world = World::new();
    let cut = cut_run(&world);
    for step in [2, 4] {
        truncate(&cut.join(format!("checkpoints/step-{step}")).join("state/optimizer.safetensors"));
    }
    let record = metrics(&cut);
    let error = format!("{:#}", world.train(&world.config(Autoencoder, &STEPS), "cut", None).unwrap_err());
    for part in ["step-2: ", "step-4: ", "--out"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    assert_eq!(metrics(&cut), record);
}

#[test]
fn a_checkpoint_holds_its_own_hashes_as_other_programs_read_them() {
    let world = World::new();
    let cut = cut_run(&world);
    let latest = cut.join("checkpoints/latest");
    let mut check = Command::new("sha256sum");
    check.args(["--check", "--strict", "state/sha256sums"]).current_dir(&latest);
    let checked = check.output().expect("sha256sum");
    let text = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success() && text.lines().count() == 4, "{text}");
}

/// A limit on the size of files stands for the disk's: writing fails in the same place, with an error of the same kind.
#[test]
fn a_full_disk_costs_no_good_checkpoint_and_is_reported() {
    let world = World::new();
    let (whole, full) = (world.path("whole"), world.path("full"));
    let config = world.config_file(Autoencoder);
    let settings = |steps: u64| {
        let steps = format!("run.steps={steps}");
        ["--set", "run.checkpoint_every=2", "--set", &steps].map(String::from)
    };
    assert_eq!(harness::jedi(arguments(&config, &whole).into_iter().chain(settings(6))).code, Some(0));
    assert_eq!(harness::jedi(arguments(&config, &full).into_iter().chain(settings(2))).code, Some(0));
    let before = bits(&full.join(STATE));

    // In blocks of 512 or 1024 bytes: more than the records take, less than a checkpoint.
    let limited = "trap '' XFSZ; ulimit -f 100; exec \"$0\" \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", limited, env!("CARGO_BIN_EXE_jedi")]);
    let ended = command.args(arguments(&config, &full).into_iter().chain(settings(6))).output().expect("a shell");
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{stderr}");
    for part in ["the checkpoint of step 4 could not be written", "step-2, is as it was", "make room", "to go on"] {
        assert!(stderr.contains(part), "{part} is not in: {stderr}");
    }
    assert!(bits(&full.join(STATE)) == before);
    let left = fs::read_dir(full.join("checkpoints")).unwrap().count();
    assert_eq!(left, 2, "`latest` and step-2 alone");

    assert_eq!(harness::jedi(arguments(&config, &full).into_iter().chain(settings(6))).code, Some(0));
    assert_same_run(&whole, &full);
}

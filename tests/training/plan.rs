//! What a run says of itself before its first step.

use jedi::train::ObjectiveKind::{Autoencoder, Joint};
use jedi::train::TrainConfig;

use super::harness::jedi;
use super::world::World;

#[test]
fn a_dry_run_prints_what_would_run_and_reads_back() {
    let world = World::new();
    for kind in [Joint, Autoencoder] {
        let config = world.config_file(kind);
        let out = world.path("run").display().to_string();
        let printed = jedi([
            "train",
            "--dry-run",
            "--device",
            "cpu",
            "--config",
            config.to_str().unwrap(),
            "--set",
            "optimizer.lr=0.25",
            "--set",
            "run.micro_batch=4",
            "--out",
            &out,
        ]);
        assert_eq!(printed.code, Some(0), "{}", printed.stderr);
        let resolved: TrainConfig = jedi::config::from_text("printed", &printed.stdout, &[]).unwrap();
        assert_eq!(resolved, world.config(kind, &["optimizer.lr=0.25", "run.micro_batch=4"]));
        // 6 steps of 12 images in sets of 2, 3 or 4.
        let data = "# data: 6 sets in toybox; the run sees 72 images, each set about ";
        for part in [data, " compute, ", " decode ahead\n", "# memory plan: ", "# time: "] {
            assert!(printed.stdout.contains(part), "{part} is not in: {}", printed.stdout);
        }
        assert!(printed.stdout.contains(" for 6 steps of "), "{}", printed.stdout);
        assert!(!world.path("run").exists());
    }
}

#[test]
fn a_dry_run_of_settings_for_a_gpu_needs_none() {
    let world = World::new();
    let config = world.config_file(Joint);
    let run = |more: &[&str]| {
        let settings = ["--set", "run.dtype=\"bf16\"", "--set", "optimizer.on_host=\"all\""];
        jedi([&["train", "--device", "cpu", "--config", config.to_str().unwrap()], &settings[..], more].concat())
    };
    let tried = run(&["--dry-run"]);
    assert_eq!(tried.code, Some(0), "{}", tried.stderr);
    assert!(tried.stderr.contains("without one the dry run counts and times f32"), "{}", tried.stderr);
    assert!(
        tried.stdout.contains("dtype = \"bf16\"") && tried.stdout.contains("on_host = \"all\""),
        "{}",
        tried.stdout
    );
    let refused = run(&["--out", world.path("run").to_str().unwrap()]);
    assert!(refused.code == Some(2) && refused.stderr.contains("run.dtype: bf16 is for GPUs"), "{}", refused.stderr);
}

#[test]
fn a_dry_run_finds_what_is_not_there() {
    let world = World::new();
    let config = world.config_file(Joint);
    let ended =
        jedi(["train", "--dry-run", "--config", config.to_str().unwrap(), "--set", "data.source=/no/such/folder"]);
    assert!(ended.code != Some(0) && ended.stderr.contains("/no/such/folder"), "{}", ended.stderr);
}

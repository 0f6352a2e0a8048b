//! A run that was stopped, killed or broke goes on as if nothing had been.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use jedi::invalid::is_invalid;
use jedi::model::files::read_safetensors;
use jedi::model::write::write_tensors;
use jedi::train::ObjectiveKind::{self, Autoencoder, Joint};
use jedi::train::trainer::Outcome;

use super::harness;
use super::world::{World, bits, metrics, shipped, weights};

pub const STATE: &str = "checkpoints/latest/state/optimizer.safetensors";

/// What a finished run left must be what the uninterrupted one left, to the last bit.
pub fn assert_same_run(one: &Path, other: &Path) {
    assert_eq!(metrics(one), metrics(other));
    for ((name, bits), (same_name, same_bits)) in bits(&one.join(STATE)).iter().zip(&bits(&other.join(STATE))) {
        assert_eq!(name, same_name);
        assert!(bits == same_bits, "{name} differs");
    }
}

pub fn arguments(config: &Path, out: &Path) -> Vec<String> {
    let text = |path: &Path| path.to_str().expect("a plain path").to_string();
    vec!["train".into(), "--device".into(), "cpu".into(), "--config".into(), text(config), "--out".into(), text(out)]
}

/// Waits until `is_there`, while the binary runs.
fn wait_until(child: &mut Child, what: &str, is_there: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_there() {
        assert!(child.try_wait().expect("a child").is_none(), "the run ended before {what}");
        assert!(start.elapsed() < Duration::from_secs(60), "no {what} after a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_stopped_run_goes_on_bit_for_bit() {
    let world = World::new();
    for objective in [Autoencoder, Joint] {
        let config = world.config(objective, &[]);
        let (whole, halves) = (format!("{objective:?}-whole"), format!("{objective:?}-halves"));
        assert_eq!(world.train(&config, &whole, None).unwrap(), Outcome::Finished);
        assert_eq!(world.train(&config, &halves, Some(3)).unwrap(), Outcome::Interrupted(3));
        assert_eq!(metrics(&world.path(&halves)).len(), 3);
        assert_eq!(world.train(&config, &halves, None).unwrap(), Outcome::Finished);
        assert_eq!(metrics(&world.path(&whole)).len(), 6);
        assert_same_run(&world.path(&whole), &world.path(&halves));
    }
}

#[test]
fn a_polite_signal_ends_the_run_with_its_state_saved() {
    let world = World::new();
    let config = world.config_file(Autoencoder);
    // Ctrl-C asks to give up, a cluster's SIGTERM to make room for a while.
    for (signal, code, told) in [("INT", 1, "interrupted"), ("TERM", 0, "ended by SIGTERM")] {
        let out = world.path(signal);
        let arguments = arguments(&config, &out).into_iter().chain(["--set", "run.steps=100000"].map(String::from));
        let mut command = harness::command(arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
        wait_until(&mut child, "the first step", || out.join("metrics.jsonl").is_file());
        let sent = Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status();
        assert!(sent.expect("a shell").success());
        let ended = child.wait_with_output().expect("its end");
        let (stdout, stderr) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
        let steps = metrics(&out).len();
        assert_eq!(ended.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains(&format!("{told} after {steps} steps")) && stdout.is_empty(), "{stderr} {stdout}");
        assert!(stderr.contains("run the same command again to go on"), "{stderr}");
        assert_eq!(fs::read_link(out.join("checkpoints/latest")).unwrap(), Path::new(&format!("step-{steps}")));
    }
}

#[test]
fn a_step_does_not_depend_on_the_sets_met_before() {
    // A run that goes on has met none. When sets were encoded in one batch with whatever was new besides them, their last
    // bits depended on it, at the sizes of the embedded model though not at this world's.
    let world = World::new();
    fs::copy(shipped("vae/config.json"), world.path("architecture/vae/config.json")).unwrap();
    let unet = world.path("architecture/unet/config.json");
    let text = fs::read_to_string(&unet).unwrap();
    fs::write(
        unet,
        text.replace("\"in_channels\":9,", "\"in_channels\":33,")
            .replace("\"out_channels\":4,", "\"out_channels\":16,"),
    )
    .unwrap();
    let vae = world.objective(&world.config(Autoencoder, &["data.size=64"])).unwrap();
    vae.write(&world.path("autoencoder"), &weights(vae.as_ref())).unwrap();
    let config =
        world.config(Joint, &["data.size=64", "data.images=3", "joint.set_sizes=[3]", "run.images_per_step=6"]);
    let loss = |met: &[u64]| {
        let mut objective = world.objective(&config).unwrap();
        met.iter().for_each(|&step| drop(objective.loss(step).unwrap()));
        objective.loss(3).unwrap().to_scalar::<f32>().unwrap()
    };
    // Six sets, two a step: step 3 shows two of them again.
    assert_eq!(loss(&[]).to_bits(), loss(&[0, 1, 2]).to_bits());
}

#[test]
fn a_finished_run_is_left_as_it_is() {
    let world = World::new();
    let config = world.config(Autoencoder, &["run.steps=1"]);
    world.train(&config, "run", None).unwrap();
    let before = (metrics(&world.path("run")), bits(&world.path("run").join(STATE)));
    assert_eq!(world.train(&config, "run", None).unwrap(), Outcome::Finished);
    assert_eq!((metrics(&world.path("run")), bits(&world.path("run").join(STATE))), before);
}

#[test]
fn a_run_killed_at_any_moment_goes_on_bit_for_bit() {
    let world = World::new();
    let config = world.config_file(Autoencoder);
    let (whole, killed) = (world.path("whole"), world.path("killed"));
    let settings =
        ["--set", "run.checkpoint_every=1", "--set", "run.steps=24", "--set", "run.preview_images=0"].map(String::from);
    let arguments = |out: &PathBuf| arguments(&config, out).into_iter().chain(settings.clone());
    let outcome = harness::jedi(arguments(&whole));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);

    // Checkpoints are written beside nearly every step, so most kills hit one of them.
    let mut half_written = 0;
    for lines in [1, 4, 9, 12, 16] {
        let mut command = harness::command(arguments(&killed));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary starts");
        let record = killed.join("metrics.jsonl");
        let n_lines = || fs::read_to_string(&record).map_or(0, |text| text.lines().count());
        let n_unfinished = || {
            let names = fs::read_dir(killed.join("checkpoints")).expect("checkpoints");
            names.filter(|name| name.as_ref().is_ok_and(|name| name.path().extension().is_some())).count()
        };
        wait_until(&mut child, "the steps", || n_lines() >= lines);
        // The second kills wait for a checkpoint that has begun.
        if lines % 2 == 0 {
            wait_until(&mut child, "a checkpoint that is being written", || n_unfinished() > 0);
        }
        child.kill().expect("a child to kill"); // SIGKILL
        child.wait().expect("its end");
        half_written += n_unfinished();
    }
    assert!(metrics(&killed).len() < 24, "the run was over before it was killed");
    assert!(half_written > 0, "no kill hit a checkpoint");
    let outcome = harness::jedi(arguments(&killed));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(metrics(&killed).len(), 24);
    assert_same_run(&whole, &killed);
}

/// The folder of a run of 6 steps, as a kill after 4 of them left it.
fn stopped_run(world: &World, objective: ObjectiveKind) -> PathBuf {
    let config = world.config(objective, &[]);
    world.train(&config, "whole", None).expect("a run");
    world.train(&config, "cut", Some(2)).expect("a start of it");
    world.path("cut")
}

#[test]
fn what_a_kill_left_half_written_is_of_no_consequence() {
    let world = World::new();
    let cut = stopped_run(&world, Autoencoder);
    let half = cut.join("checkpoints/.step-4.tmp/vae");
    fs::create_dir_all(&half).unwrap();
    fs::write(half.join("diffusion_pytorch_model.safetensors"), "half").unwrap();
    let record = fs::OpenOptions::new().append(true).open(cut.join("metrics.jsonl"));
    record.unwrap().write_all(b"{\"step\":2,\"loss\":1.0,\"lr\":0.001}\n{\"step\":3,\"lo").unwrap();
    world.train(&world.config(Autoencoder, &[]), "cut", None).unwrap();
    assert_same_run(&world.path("whole"), &cut);
    for entry in fs::read_dir(cut.join("checkpoints")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.starts_with('.'), "{name} was left");
    }
}

#[test]
fn a_checkpoint_that_latest_does_not_name_yet_is_made_again() {
    // A kill between the two renames: the folder of step 4 is there, `latest` still says 2.
    let world = World::new();
    let cut = stopped_run(&world, Autoencoder);
    fs::create_dir(cut.join("checkpoints/step-4")).unwrap();
    world.train(&world.config(Autoencoder, &["run.checkpoint_every=2"]), "cut", None).unwrap();
    assert_same_run(&world.path("whole"), &cut);
    assert!(cut.join("checkpoints/step-4").join("state/optimizer.safetensors").is_file());
}

#[test]
fn fails_when_latest_points_to_nothing() {
    let world = World::new();
    let cut = stopped_run(&world, Autoencoder);
    let record = metrics(&cut);
    fs::remove_dir_all(cut.join("checkpoints/step-2")).unwrap();
    // To start over in silence would throw the run away.
    let error = format!("{:#}", world.train(&world.config(Autoencoder, &[]), "cut", None).unwrap_err());
    assert!(error.contains("checkpoints/latest: ") && error.contains("step-2"), "{error}");
    assert_eq!(metrics(&cut), record);
}

#[test]
fn one_run_in_a_folder_at_a_time() {
    let world = World::new();
    let out = world.path("run");
    let config = world.config_file(Autoencoder);
    let arguments = arguments(&config, &out).into_iter().chain(["--set", "run.steps=100000"].map(String::from));
    let mut child = harness::command(arguments).stderr(Stdio::null()).spawn().expect("the binary starts");
    wait_until(&mut child, "the first step", || out.join("metrics.jsonl").is_file());
    let error = world.train(&world.config(Autoencoder, &[]), "run", None).unwrap_err();
    child.kill().expect("a child to kill");
    child.wait().expect("its end");
    let message = format!("{error:#}");
    assert!(message.contains("another") && message.contains("run"), "{message}");
    // A killed run leaves no lock behind.
    world.train(&world.config(Autoencoder, &["run.steps=1"]), "run", None).unwrap();
}

#[test]
fn a_run_is_the_same_with_and_without_a_cache_which_may_change_on_the_way() {
    let world = World::new();
    world.train(&world.config(Joint, &[]), "cached", None).unwrap();
    let without = ["joint.latent_cache_gb=0"];
    world.train(&world.config(Joint, &without), "encoded", Some(3)).unwrap();
    // Room for about one set of four pictures.
    world.train(&world.config(Joint, &["joint.latent_cache_gb=5e-6"]), "encoded", Some(4)).unwrap();
    world.train(&world.config(Joint, &without), "encoded", None).unwrap();
    assert_same_run(&world.path("cached"), &world.path("encoded"));
}

#[test]
fn a_run_goes_on_only_with_the_vae_that_it_was_trained_with() {
    let world = World::new();
    world.train(&world.config(Joint, &[]), "whole", None).unwrap();
    world.train(&world.config(Joint, &[]), "run", Some(2)).unwrap();
    let name = "vae/diffusion_pytorch_model.safetensors";
    let own = world.path("autoencoder").join(name);
    let mut tensors = read_safetensors(&own).unwrap();
    let bias = tensors["quant_conv.bias"].clone();
    tensors.insert("quant_conv.bias".into(), (bias + 0.01).unwrap());
    write_tensors(&own, &tensors, &[]).unwrap();
    let before = metrics(&world.path("run"));
    let error = world.train(&world.config(Joint, &[]), "run", None).unwrap_err();
    let message = format!("{error:#}");
    assert!(is_invalid(&error) && message.starts_with("model.vae: ") && message.contains("--out"), "{message}");
    assert_eq!(metrics(&world.path("run")), before);
    // The way out that the message names.
    fs::copy(world.path("run/checkpoints/latest").join(name), &own).unwrap();
    world.train(&world.config(Joint, &[]), "run", None).unwrap();
    assert_same_run(&world.path("whole"), &world.path("run"));
}

#[test]
fn a_run_from_before_there_were_fingerprints_goes_on() {
    let world = World::new();
    world.train(&world.config(Joint, &[]), "run", Some(2)).unwrap();
    let info = world.path("run/checkpoints/latest/jedi.json");
    let mut value: serde_json::Value = serde_json::from_str(&fs::read_to_string(&info).unwrap()).unwrap();
    let own = value.as_object_mut().unwrap();
    own.remove("vae_hash").and(own.remove("hashes")).expect("a fingerprint and hashes");
    fs::write(&info, value.to_string()).unwrap();
    world.train(&world.config(Joint, &[]), "run", None).unwrap();
}

//! What `jedi train` stops at: wrong settings, a loss that is no number.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::Tensor;
use jedi::invalid::is_invalid;
use jedi::model::files::read_safetensors;
use jedi::model::write::write_tensors;
use jedi::train::ObjectiveKind::{Autoencoder, Joint};
use jedi::train::TrainConfig;
use jedi::train::trainer::Outcome;

use super::harness::{Outcome as Ended, jedi};
use super::world::{World, forget_hashes, metrics};

const STATE: &str = "run/checkpoints/latest/state/optimizer.safetensors";

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// `jedi train` in the folder `run` of the world.
fn start(world: &World, config: &Path, settings: &[&str]) -> Ended {
    let out = world.path("run");
    let mut arguments = vec!["train", "--device", "cpu", "--config", text(config), "--out", text(&out)];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    jedi(arguments)
}

/// Changes one tensor of the saved state.
fn change_state(world: &World, name: &str, change: impl FnOnce(Option<Tensor>) -> Option<Tensor>) {
    let mut tensors: BTreeMap<String, Tensor> = read_safetensors(&world.path(STATE)).expect("a state");
    let changed = change(tensors.remove(name));
    tensors.extend(changed.map(|tensor| (name.to_string(), tensor)));
    write_tensors(&world.path(STATE), &tensors, &[]).expect("a state");
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_with_the_state_before_it_saved() {
    let world = World::new();
    let config = world.config_file(Autoencoder);
    assert_eq!(start(&world, &config, &["run.steps=2"]).code, Some(0));
    forget_hashes(&world.path("run/checkpoints/latest"));
    let poisoned = "parameter.vae.decoder.conv_out.bias";
    change_state(&world, poisoned, |bias| Some((bias.expect("the bias") * f64::NAN).expect("a tensor")));
    let ended = start(&world, &config, &["run.steps=4"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    for part in ["training stopped at step 2", "the loss of step 2 is NaN", "optimizer.lr", text(&world.path("run"))] {
        assert!(ended.stderr.contains(part), "{part} is not in: {}", ended.stderr);
    }
    assert!(ended.stdout.is_empty());
    assert_eq!(metrics(&world.path("run")).len(), 2);
}

#[test]
fn bf16_is_for_gpus_and_for_the_joint_objective() {
    let world = World::new();
    for (objective, way_out) in [(Joint, "run.matmul_precision"), (Autoencoder, "leave it out")] {
        let ended = start(&world, &world.config_file(objective), &["run.dtype=bf16"]);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert!(ended.stderr.contains("run.dtype: bf16 is for") && ended.stderr.contains(way_out), "{}", ended.stderr);
    }
    assert!(!world.path("run").exists());
}

#[test]
fn a_run_that_diverges_saves_the_state_before_the_step() {
    let world = World::new();
    let settings = ["optimizer.lr=1e30", "optimizer.warmup_steps=0", "run.validate_every=0"];
    let error = world.train(&world.config(Joint, &settings), "run", None).unwrap_err();
    let message = format!("{error:#}");
    let made = metrics(&world.path("run")).len();
    assert!((1..6).contains(&made), "{made}");
    assert!(
        message.starts_with(&format!("training stopped at step {made}; the state before it is saved")),
        "{message}"
    );
    let link = fs::read_link(world.path("run/checkpoints/latest")).unwrap();
    assert_eq!(link, Path::new(&format!("step-{made}")));
}

#[test]
fn weights_that_break_in_the_last_step_are_no_result() {
    // Nothing after the last update would notice but the held-out loss.
    let world = World::new();
    let settings = ["optimizer.lr=1e30", "optimizer.warmup_steps=0", "run.steps=1"];
    let ended = start(&world, &world.config_file(Joint), &settings);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("the held-out loss after 1 steps is"), "{}", ended.stderr);
    assert!(!world.path("run/checkpoints/latest").exists());
}

#[test]
fn an_architecture_of_xl_is_refused_by_name() {
    let world = World::new();
    let xl = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-xl");
    let ended = start(&world, &world.config_file(Joint), &[&format!("model.architecture={}", xl.display())]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{}", ended.stderr);
    let says = |text: &str| assert!(ended.stderr.contains(text), "{text} is not in: {}", ended.stderr);
    says(&format!("model.architecture: {}: is Stable Diffusion XL's", xl.display()));
    says("which jedi samples but does not train; name one like Stable Diffusion 1 or 2");
}

#[test]
fn a_failed_save_does_not_hide_why_training_stopped() {
    let world = World::new();
    let config = world.config(Joint, &["optimizer.lr=1e30", "optimizer.warmup_steps=0", "run.validate_every=0"]);
    fs::create_dir_all(world.path("run")).unwrap();
    let mut objective = world.objective(&config).unwrap();
    // Where the VAE is to be copied from there is nothing any more.
    fs::remove_dir_all(world.path("autoencoder")).unwrap();
    let hooks = jedi::train::Hooks {
        on_step: &mut |_| {},
        on_notice: &mut |_| {},
        on_checkpoint: &mut |_, _| Ok(None),
        is_interrupted: &|| false,
    };
    let error = jedi::train::train(&config, objective.as_mut(), &world.path("run"), hooks).unwrap_err();
    let message = format!("{error:#}");
    for part in ["could not be saved", "autoencoder/vae", "of step"] {
        assert!(message.contains(part), "{part} is not in: {message}");
    }
}

#[test]
fn other_settings_in_the_same_folder_are_refused() {
    let world = World::new();
    world.train(&world.config(Autoencoder, &["run.steps=1"]), "run", None).unwrap();
    for setting in ["seed=6", "data.sets=7", "autoencoder.kl_weight=0.5", "model.start_from=elsewhere"] {
        let config = world.config(Autoencoder, &["run.steps=1"]);
        let changed: TrainConfig =
            jedi::config::from_text("changed.toml", &jedi::config::to_toml(&config).unwrap(), &[setting.to_string()])
                .unwrap();
        let mut objective = world.objective(&config).unwrap();
        let hooks = jedi::train::Hooks {
            on_step: &mut |_| {},
            on_notice: &mut |_| {},
            on_checkpoint: &mut |_, _| Ok(None),
            is_interrupted: &|| false,
        };
        let error = jedi::train::train(&changed, objective.as_mut(), &world.path("run"), hooks).unwrap_err();
        assert!(is_invalid(&error) && error.to_string().starts_with("--out "), "{setting}: {error:#}");
    }
    let ended = start(&world, &world.config_file(Autoencoder), &["seed=6"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
}

#[test]
fn length_and_optimizer_may_change_when_a_run_goes_on() {
    let world = World::new();
    world.train(&world.config(Autoencoder, &["run.steps=2"]), "run", None).unwrap();
    let longer = world.config(Autoencoder, &["run.steps=4", "optimizer.lr=1e-4", "run.checkpoint_every=1"]);
    assert_eq!(world.train(&longer, "run", None).unwrap(), Outcome::Finished);
    let lines = metrics(&world.path("run"));
    let of = |key: &str| lines.iter().map(|line| line[key].as_f64().unwrap()).collect::<Vec<_>>();
    assert_eq!(of("step"), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(of("lr"), [5e-4, 1e-3, 1e-4, 1e-4]);
}

#[test]
fn a_state_that_does_not_fit_is_named_with_its_tensor() {
    let world = World::new();
    let config = world.config(Autoencoder, &["run.steps=1"]);
    world.train(&config, "run", None).unwrap();
    forget_hashes(&world.path("run/checkpoints/latest"));
    let longer = world.config(Autoencoder, &["run.steps=2"]);
    let name = "second.vae.encoder.conv_in.bias";
    let refusal = || {
        let message = format!("{:#}", world.train(&longer, "run", None).unwrap_err());
        let file = world.path("run/checkpoints/step-1/state/optimizer.safetensors");
        assert!(message.contains(text(&file)) && message.contains(name), "{message}");
        message
    };
    let mut kept = None;
    change_state(&world, name, |tensor| {
        kept = tensor;
        None
    });
    assert!(refusal().contains("is missing"));
    let kept = kept.expect("the tensor");
    change_state(&world, name, |_| Some(kept.narrow(0, 0, 3).and_then(|t| t.copy()).expect("a part of it")));
    assert!(refusal().contains("has shape [3], this run needs [16]"));
    change_state(&world, name, |_| Some(kept.to_dtype(candle_core::DType::F64).expect("a tensor")));
    assert!(refusal().contains("F64"));
    change_state(&world, name, |_| Some(kept.clone()));
    let name = "second.vae.another";
    change_state(&world, name, |_| Some(kept));
    let message = format!("{:#}", world.train(&longer, "run", None).unwrap_err());
    assert!(message.contains(name) && message.contains("does not belong"), "{message}");
}

fn start_dry(config: &Path, settings: &[&str]) -> Ended {
    let mut arguments = vec!["train", "--dry-run", "--config", text(config)];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    jedi(arguments)
}

#[test]
fn unknown_settings_exit_2_and_name_the_known_ones() {
    let world = World::new();
    let ended = start_dry(&world.config_file(Joint), &["optimizer.momentum=0.9"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("momentum") && ended.stderr.contains("beta1"), "{}", ended.stderr);
}

#[test]
fn settings_that_cannot_be_trained_with_exit_2() {
    let world = World::new();
    let config = world.config_file(Joint);
    for (setting, named) in [
        ("run.images_per_step=5", "run.images_per_step 5"),
        ("run.images_per_step=0", "run.images_per_step = 0"),
        ("joint.set_sizes=[]", "joint.set_sizes"),
    ] {
        let ended = start(&world, &config, &[setting]);
        assert_eq!(ended.code, Some(2), "{setting}: {}", ended.stderr);
        assert!(ended.stderr.contains(named), "{setting}: {}", ended.stderr);
        assert!(!world.path("run").exists(), "{setting}");
    }
    let with_vae = world.config_text(Joint);
    let lines: Vec<&str> = with_vae.lines().filter(|line| !line.starts_with("vae")).collect();
    fs::write(&config, lines.join("\n")).unwrap();
    let ended = start(&world, &config, &[]);
    assert!(ended.code == Some(2) && ended.stderr.contains("model.vae"), "{}", ended.stderr);
}

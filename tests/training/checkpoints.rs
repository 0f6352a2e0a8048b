//! What a checkpoint is good for.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use jedi::device::Runtime;
use jedi::model::Files;
use jedi::model::files::read_safetensors;
use jedi::model::write::write_tensors;
use jedi::sample::Pipeline;
use jedi::train::ObjectiveKind::{Autoencoder, Joint};
use serde_json::Value;

use super::world::{World, bits};

fn steps_kept(run: &Path) -> BTreeSet<String> {
    let names = fs::read_dir(run.join("checkpoints")).expect("checkpoints");
    names.map(|entry| entry.expect("a name").file_name().into_string().expect("UTF-8")).collect()
}

#[test]
fn a_trained_autoencoder_is_a_vae_and_the_joint_model_on_it_a_pipeline() {
    let world = World::new();
    world.train(&world.config(Autoencoder, &["run.steps=1"]), "vae-run", None).unwrap();
    let latest = world.path("vae-run/checkpoints/latest");
    let vae = format!("model.vae={}", latest.display());
    world.train(&world.config(Joint, &["run.steps=1", &vae]), "run", None).unwrap();
    let model = world.path("run/checkpoints/latest");
    let pipeline = Pipeline::load(&Files::Folder(model.clone()), &Runtime::cpu(), true).unwrap();
    assert!(pipeline.is_joint());
    assert_eq!(pipeline.native_size(), 16);
    // The VAE goes along as it was.
    let (weights, config) = ("vae/diffusion_pytorch_model.safetensors", "vae/config.json");
    assert_eq!(bits(&model.join(weights)), bits(&latest.join(weights)));
    let value = |path: &Path| serde_json::from_str::<Value>(&fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(value(&model.join(config)), value(&latest.join(config)));
    let info = value(&model.join("jedi.json"));
    assert_eq!((&info["trained_steps"], &info["image_size"]), (&Value::from(1), &Value::from(16)));
    assert_eq!(info["channel_order"], serde_json::json!(["noisy", "mask", "reference"]));
}

#[test]
fn training_starts_from_the_weights_of_another_model() {
    let world = World::new();
    world.train(&world.config(Joint, &["run.steps=1"]), "first", None).unwrap();
    let first = world.path("first/checkpoints/latest");
    let settings = ["run.steps=1", "optimizer.lr=0.0", &format!("model.start_from={}", first.display())];
    world.train(&world.config(Joint, &settings), "second", None).unwrap();
    let weights = "unet/diffusion_pytorch_model.safetensors";
    let second = world.path("second/checkpoints/latest");
    assert_eq!(bits(&first.join(weights)).len(), bits(&second.join(weights)).len());
    for ((name, one), (_, other)) in bits(&first.join(weights)).iter().zip(&bits(&second.join(weights))) {
        // Averaged with itself at a step of length 0.
        let close = |(a, b): (&u32, &u32)| (f32::from_bits(*a) - f32::from_bits(*b)).abs() < 1e-6;
        assert!(one.iter().zip(other).all(close), "{name}");
    }
}

#[test]
fn a_plain_model_is_widened_and_the_user_told() {
    let world = World::new();
    world.train(&world.config(Joint, &["run.steps=1"]), "plain", None).unwrap();
    let plain = world.path("plain/checkpoints/latest");
    let weights = plain.join("unet/diffusion_pytorch_model.safetensors");
    let mut tensors = read_safetensors(&weights).unwrap();
    let conv_in = tensors["conv_in.weight"].narrow(1, 0, 4).unwrap().contiguous().unwrap();
    tensors.insert("conv_in.weight".into(), conv_in);
    write_tensors(&weights, &tensors, &[]).unwrap();
    let start_from = format!("model.start_from={}", plain.display());
    world.train(&world.config(Joint, &["run.steps=1", &start_from]), "joint", None).unwrap();
    let written = world.path("joint/checkpoints/latest/unet/diffusion_pytorch_model.safetensors");
    assert_eq!(read_safetensors(&written).unwrap()["conv_in.weight"].dims(), [16, 9, 3, 3]);
    let ended = world.diverge(&[&start_from]);
    assert!(ended.stderr.contains("conv_in.weight is widened from 4 to 9 channels"), "{}", ended.stderr);
}

#[test]
fn as_many_checkpoints_are_kept_as_asked_for() {
    let world = World::new();
    let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<BTreeSet<_>>();
    for (last, every, kept) in [
        (2, 0, names(&["latest", "step-3", "step-4"])),
        (0, 0, names(&["latest", "step-1", "step-2", "step-3", "step-4"])),
        (1, 2, names(&["latest", "step-2", "step-4"])),
    ] {
        // `keep_checkpoints` is what `keep_last` was called first.
        let keep = format!("run.keep_checkpoints={last}");
        let every = format!("run.keep_every={every}");
        let config = world
            .config(Autoencoder, &["run.steps=4", "run.checkpoint_every=1", "run.images_per_step=4", &keep, &every]);
        let keep = keep + &every;
        world.train(&config, &keep, None).unwrap();
        assert_eq!(steps_kept(&world.path(&keep)), kept);
    }
}

#[test]
fn a_run_that_was_pointed_back_keeps_what_it_writes() {
    let world = World::new();
    let settings = |keep| ["run.steps=4".into(), "run.checkpoint_every=1".into(), format!("run.keep_last={keep}")];
    let config = |keep| world.config(Autoencoder, &settings(keep).each_ref().map(String::as_str));
    world.train(&config(0), "run", None).unwrap();
    let latest = world.path("run/checkpoints/latest");
    let last = bits(&latest.join("state/optimizer.safetensors"));
    fs::remove_file(&latest).unwrap();
    std::os::unix::fs::symlink("step-1", &latest).unwrap();
    world.train(&config(1), "run", Some(2)).unwrap();
    assert_eq!(fs::read_link(&latest).unwrap(), Path::new("step-2"));
    assert!(latest.exists() && world.path("run/checkpoints/step-4").exists());
    world.train(&config(1), "run", None).unwrap();
    assert_eq!(bits(&latest.join("state/optimizer.safetensors")), last);
    assert_eq!(steps_kept(&world.path("run")), ["latest", "step-4"].map(String::from).into());
}

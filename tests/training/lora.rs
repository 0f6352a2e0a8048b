//! Adapters: trained alone, gone on with, written so that others and `jedi sample` read them.

use std::fs;
use std::path::Path;

use candle_core::Tensor;
use jedi::invalid::is_invalid;
use jedi::model::files::read_safetensors;
use jedi::train::ObjectiveKind::Joint;
use jedi::train::trainer::Outcome;

use super::harness::jedi;
use super::resume::{STATE, assert_same_run};
use super::world::{World, bits, weights};

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

fn largest(tensor: &Tensor) -> f32 {
    tensor.abs().and_then(|t| t.max_all()).and_then(|t| t.to_scalar()).expect("f32")
}

/// A model to start from, and settings for adapters on it.
fn settings(world: &World) -> Vec<String> {
    world.train(&world.config(Joint, &["run.steps=1"]), "base", None).expect("a run");
    let base = world.path("base/checkpoints/latest");
    [
        "run.steps=3",
        "lora.rank=2",
        "lora.alpha=3",
        "lora.targets=[\"unet.*.to_q\", \"unet.*.ff.net.2\", \"text_encoder.*.q_proj\"]",
        "lora.train_fully=[\"unet.conv_in.*\"]",
    ]
    .map(String::from)
    .into_iter()
    .chain([format!("model.start_from={}", base.display())])
    .collect()
}

#[test]
fn adapters_alone_are_trained_and_a_run_goes_on_with_them() {
    let world = World::new();
    let settings = settings(&world);
    let config = world.config(Joint, &settings.iter().map(String::as_str).collect::<Vec<_>>());
    let objective = world.objective(&config).unwrap();
    let names: Vec<&String> = objective.parameters().keys().collect();
    let is_adapter = |name: &&&String| name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight");
    // Four transformers (one down, one in the middle, two up) of two queries and a feed-forward output each; one text layer.
    assert_eq!(names.iter().filter(is_adapter).count(), 2 * (4 * 3 + 1));
    assert_eq!(names.iter().filter(|name| name.starts_with("unet.conv_in.")).count(), 2);
    assert_eq!(names.len(), 2 * (4 * 3 + 1) + 2);

    world.train(&config, "whole", None).unwrap();
    assert_eq!(world.train(&config, "run", Some(1)).unwrap(), Outcome::Interrupted(1));
    world.train(&config, "run", None).unwrap();
    assert_same_run(&world.path("whole"), &world.path("run"));
    assert_eq!(read_safetensors(&world.path("run").join(STATE)).unwrap().len(), 4 * names.len());

    // The checkpoint is a whole model: what has an adapter, and what is trained as a whole, has moved; no other weight.
    let [before, after] = ["base", "run"]
        .map(|run| read_safetensors(&world.path(run).join("checkpoints/latest").join(UNET)).expect("a U-Net"));
    assert!(before.keys().eq(after.keys()));
    for (name, tensor) in &before {
        let has_moved = largest(&(tensor - &after[name]).unwrap()) > 0.0;
        let may_move = [".to_q.weight", ".ff.net.2.weight"].iter().any(|end| name.ends_with(end));
        assert_eq!(has_moved, may_move || name.starts_with("conv_in."), "{name}");
    }
}

/// Both files, merged into the model that they were trained from, give the checkpoint's own weights.
#[test]
fn files_of_adapters_give_the_trained_model_back() {
    let world = World::new();
    let mut settings = settings(&world);
    settings.retain(|setting| !setting.starts_with("lora.train_fully"));
    settings.push("optimizer.lr=5e-2".to_owned()); // so that the adapters are felt beside f32's rounding
    let config = world.config(Joint, &settings.iter().map(String::as_str).collect::<Vec<_>>());
    world.train(&config, "run", None).unwrap();
    let (base, trained) = (world.path("base/checkpoints/latest"), world.path("run/checkpoints/latest"));
    let text = |path: &Path| path.display().to_string();
    let sample = |model: &Path, out: &str, more: &[String]| {
        let (model, out, latents) = (text(model), text(&world.path(&format!("{out}.png"))), text(&world.path(out)));
        let mut arguments: Vec<String> =
            ["sample", "--device", "cpu", "--prompt", "a red robot", "--steps", "2", "--model"]
                .map(String::from)
                .into();
        arguments.extend([model, "--out".into(), out, "--save-latents".into(), latents]);
        arguments.extend(more.iter().cloned());
        let ended = jedi(arguments);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    };
    let latents = |out: &str| read_safetensors(&world.path(out)).unwrap()["latents"].clone();
    sample(&trained, "trained", &[]);
    sample(&base, "base-alone", &[]);
    let moved = largest(&(latents("trained") - latents("base-alone")).unwrap());
    assert!(moved > 1e-4, "{moved}");
    for name in ["pytorch_lora_weights.safetensors", "kohya.safetensors"] {
        let lora = text(&trained.join("lora").join(name));
        sample(&base, name, &["--lora".into(), lora.clone()]);
        let gap = largest(&(latents("trained") - latents(name)).unwrap());
        assert!(gap < 1e-2 * moved, "{name}: {gap} of {moved}");
        // Not at all, or twice a half.
        sample(&base, "none", &["--lora".into(), format!("{lora}:0")]);
        assert!(largest(&(latents("base-alone") - latents("none")).unwrap()) < 1e-2 * moved);
        sample(&base, "halves", &[0.5, 0.5].map(|half| ["--lora".to_owned(), format!("{lora}:{half}")]).concat());
        assert!(largest(&(latents("trained") - latents("halves")).unwrap()) < 1e-2 * moved);
    }

    // A picture knows its adapters, and is made again with them.
    let [kohya, again] = ["kohya.safetensors.png", "again.png"].map(|name| text(&world.path(name)));
    let ended = jedi(["sample", "--device", "cpu", "--from", &kohya, "--out", &again]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let pixels = |path: &str| image::open(path).expect("a picture").into_rgb8();
    assert_eq!(pixels(&kohya), pixels(&again));
    let file = trained.join("lora/kohya.safetensors");
    fs::copy(trained.join("lora/pytorch_lora_weights.safetensors"), &file).unwrap();
    let ended = jedi(["sample", "--device", "cpu", "--from", &kohya, "--out", &again]);
    assert!(ended.code == Some(2) && ended.stderr.contains("is not the file any more"), "{}", ended.stderr);
    // Nor are adapters of another network taken.
    let ended = jedi(["sample", "--prompt", "a", "--lora", &text(&file)]);
    let is_told = ["does not fit", "does not have"].iter().any(|told| ended.stderr.contains(told));
    assert!(ended.code == Some(1) && is_told, "{}", ended.stderr);
}

#[test]
fn averages_of_adapters_are_what_is_written() {
    let world = World::new();
    let settings = settings(&world);
    let config = world.config(Joint, &settings.iter().map(String::as_str).collect::<Vec<_>>());
    world.train(&config, "run", None).unwrap();
    let state = read_safetensors(&world.path("run").join(STATE)).unwrap();
    let lora = world.path("run/checkpoints/latest/lora/kohya.safetensors");
    let (name, own) =
        state.iter().find(|(name, _)| name.starts_with("ema.unet.") && name.ends_with("lora_A.weight")).unwrap();
    let layer = name.strip_prefix("ema.unet.").unwrap().strip_suffix(".lora_A.weight").unwrap().replace('.', "_");
    let written = &read_safetensors(&lora).unwrap()[&format!("lora_unet_{layer}.lora_down.weight")];
    assert_eq!(largest(&(own - written).unwrap()), 0.0);
    assert!(bits(&lora).iter().any(|(name, alpha)| name.ends_with(".alpha") && *alpha == [3f32.to_bits()]));
}

#[test]
fn adapters_for_no_layer_are_refused() {
    let world = World::new();
    for (setting, named) in [
        ("lora.targets=[\"unet.*.to_r\"]", "lora.targets: unet.*.to_r"),
        ("lora.targets=[]", "lora.targets: is empty"),
        ("lora.train_fully=[\"unet.conv_im.*\"]", "lora.train_fully: unet.conv_im.*"),
    ] {
        let config = world.config(Joint, &["lora.rank=2", setting]);
        let error = config.validate().and_then(|()| world.objective(&config).map(drop)).unwrap_err();
        assert!(is_invalid(&error) && error.to_string().starts_with(named), "{setting}: {error:#}");
    }
    assert!(weights(world.objective(&world.config(Joint, &["lora.rank=0"])).unwrap().as_ref()).len() > 100);
}

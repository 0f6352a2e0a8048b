//! How a step is made: in parts, with frozen parameters, with and without averaging, weighted by the noise.

use candle_core::Tensor;
use jedi::invalid::is_invalid;
use jedi::model::files::read_safetensors;
use jedi::train::ObjectiveKind::{self, Autoencoder, Joint};
use jedi::train::Share;
use jedi::train::trainer::{Outcome, accumulate};

use super::resume::{STATE, assert_same_run};
use super::world::{World, weights};

fn largest(tensor: &Tensor) -> f32 {
    tensor.abs().and_then(|t| t.max_all()).and_then(|t| t.to_scalar()).expect("f32")
}

/// Loss and gradients of step 0 in parts of so many images.
fn step(world: &World, kind: ObjectiveKind, micro_batch: usize) -> (f64, Vec<(String, Tensor)>) {
    let mut objective = world.objective(&world.config(kind, &["run.images_per_step=24"])).expect("an objective");
    let (loss, gradients) = accumulate(objective.as_mut(), 0, Share::WHOLE, micro_batch).expect("a step");
    let of = |(name, parameter): (&String, &candle_core::Var)| {
        (name.clone(), gradients.get(parameter).unwrap_or_else(|| panic!("{name} has no gradient")).clone())
    };
    let gradients = objective.parameters().iter().map(of).collect();
    (loss, gradients)
}

#[test]
fn a_step_in_parts_is_the_whole_step() {
    let world = World::new();
    for kind in [Autoencoder, Joint] {
        let (loss, whole) = step(&world, kind, 0);
        // Parts of one set; of as many as fit, the last one smaller; more than there are.
        for micro_batch in [1, 16, 100] {
            let (in_parts, gradients) = step(&world, kind, micro_batch);
            assert!((in_parts - loss).abs() <= 1e-5 * loss, "{in_parts} is not {loss}");
            for ((name, whole), (_, part)) in whole.iter().zip(&gradients) {
                // A bias of keys has no gradient but rounding (see `learning`).
                if name.ends_with("k_proj.bias") || name.ends_with("to_k.bias") {
                    continue;
                }
                let gap = largest(&(whole - part).unwrap());
                assert!(gap <= 1e-5 * largest(whole), "{name}, {micro_batch}: {gap} of {}", largest(whole));
            }
        }
    }
}

#[test]
fn frozen_parts_stay_and_cost_neither_gradients_nor_moments() {
    let world = World::new();
    let settings = ["run.steps=3", "model.freeze=[\"text_encoder.*\", \"unet.down_blocks.*\"]"];
    let config = world.config(Joint, &settings);
    let before = weights(world.objective(&world.config(Joint, &[])).unwrap().as_ref());
    let mut objective = world.objective(&config).unwrap();
    let is_frozen = |name: &str| name.starts_with("text_encoder.") || name.starts_with("unet.down_blocks.");
    assert!(objective.parameters().keys().all(|name| !is_frozen(name)));
    let n_trained = before.keys().filter(|name| !is_frozen(name)).count();
    let (_, gradients) = accumulate(objective.as_mut(), 0, Share::WHOLE, 0).unwrap();
    assert!(n_trained < before.len() && gradients.len() == n_trained);

    // The rest of the network learns as it does with all of it.
    let (_, all) = step_of(&world, &world.config(Joint, &[]));
    for (name, parameter) in objective.parameters().iter().filter(|(name, _)| !name.ends_with("to_k.bias")) {
        let whole = &all.iter().find(|(other, _)| other == name).unwrap().1;
        let gap = largest(&(whole - gradients.get(parameter).unwrap()).unwrap());
        assert!(gap <= 1e-6 * largest(whole), "{name}");
    }

    // Stopped and gone on with, as any run.
    world.train(&config, "whole", None).unwrap();
    assert_eq!(world.train(&config, "run", Some(1)).unwrap(), Outcome::Interrupted(1));
    world.train(&config, "run", None).unwrap();
    assert_same_run(&world.path("whole"), &world.path("run"));
    let state = read_safetensors(&world.path("run").join(STATE)).unwrap();
    assert_eq!(state.len(), 4 * n_trained);
    let latest = world.path("run/checkpoints/latest");
    for (component, file) in
        [("unet", "unet/diffusion_pytorch_model.safetensors"), ("text_encoder", "text_encoder/model.safetensors")]
    {
        let after = read_safetensors(&latest.join(file)).unwrap();
        for (name, before) in before.iter().filter_map(|(name, t)| Some((name.strip_prefix(component)?, t))) {
            let own = &after[name.strip_prefix('.').unwrap()];
            let is_same = largest(&(own - before).unwrap()) == 0.0;
            let name = format!("{component}{name}");
            // The output of a frozen network does not move; a key's bias has no gradient but rounding.
            assert!(is_same == is_frozen(&name) || name.ends_with("to_k.bias"), "{name}");
        }
    }
}

fn step_of(world: &World, config: &jedi::train::TrainConfig) -> (f64, Vec<(String, Tensor)>) {
    let mut objective = world.objective(config).expect("an objective");
    let (loss, gradients) = accumulate(objective.as_mut(), 0, Share::WHOLE, 0).expect("a step");
    let parameters = objective.parameters();
    (loss, parameters.iter().map(|(name, var)| (name.clone(), gradients.get(var).expect(name).clone())).collect())
}

#[test]
fn patterns_that_freeze_nothing_or_all_are_refused() {
    let world = World::new();
    for (patterns, part) in [("[\"unet.dwon_blocks.*\"]", "unet.dwon_blocks.*"), ("[\"*\"]", "nothing is left")] {
        let config = world.config(Joint, &[&format!("model.freeze={patterns}")]);
        let error = world.objective(&config).err().expect("a refusal");
        assert!(is_invalid(&error) && error.to_string().starts_with("model.freeze: "), "{error:#}");
        assert!(error.to_string().contains(part), "{error:#}");
    }
}

#[test]
fn averaging_may_be_off_and_may_begin_or_end_when_a_run_goes_on() {
    let world = World::new();
    let off = world.config(Joint, &["optimizer.ema_decay=0", "run.steps=4"]);
    world.train(&off, "run", Some(2)).unwrap();
    let state = || read_safetensors(&world.path("run").join(STATE)).unwrap();
    let n_averages = || state().keys().filter(|name| name.starts_with("ema.")).count();
    let (n_parameters, found) = (state().keys().filter(|name| name.starts_with("parameter.")).count(), n_averages());
    assert!(n_parameters > 0 && found == 0);
    // What is written is the weights as they are.
    let unet =
        read_safetensors(&world.path("run/checkpoints/latest/unet/diffusion_pytorch_model.safetensors")).unwrap();
    let own = &state()["parameter.unet.conv_in.weight"];
    assert_eq!(largest(&(&unet["conv_in.weight"] - own).unwrap()), 0.0);
    world.train(&world.config(Joint, &["run.steps=4"]), "run", Some(3)).unwrap();
    assert_eq!(n_averages(), n_parameters);
    world.train(&off, "run", None).unwrap();
    assert_eq!(n_averages(), 0);
}

#[test]
fn min_snr_weighting_lowers_the_loss_of_nearly_clean_pictures_alone() {
    let world = World::new();
    let loss = |gamma: &str| step_of(&world, &world.config(Joint, &[&format!("joint.min_snr_gamma={gamma}")])).0;
    let (plain, weighted) = (loss("0"), loss("0.5"));
    assert!(0.0 < weighted && weighted < 0.9 * plain, "{weighted} {plain}");
}

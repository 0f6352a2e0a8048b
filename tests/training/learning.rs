//! Gradients reach everything, and following them lowers the loss.

use candle_core::{DType, Tensor};
use jedi::ops;
use jedi::train::optimizer::Optimizer;
use jedi::train::{Objective, ObjectiveKind};

use super::world::{World, bits, weights};

/// Softmax does not change when one number is added to all logits of a query, so the bias of the keys has no gradient
/// but rounding.
fn is_bias_of_keys(name: &str) -> bool {
    name.ends_with("k_proj.bias") || name.ends_with("to_k.bias")
}

fn largest(tensor: &Tensor) -> f32 {
    tensor.abs().and_then(|t| t.max_all()).and_then(|t| t.to_scalar()).expect("f32")
}

/// Names of all parameters, each with a present, finite, non-zero gradient.
fn trained_names(objective: &mut dyn Objective) -> Vec<String> {
    let loss = objective.loss(0).expect("a loss");
    let gradients = ops::backward(loss).expect("gradients");
    let mut names = Vec::new();
    for (name, parameter) in objective.parameters() {
        let gradient = gradients.get(parameter).unwrap_or_else(|| panic!("{name} has no gradient"));
        assert_eq!(gradient.dims(), parameter.dims(), "{name}");
        let size = largest(gradient);
        // A NaN is not finite, but max skips it.
        let sum: f32 = gradient.sum_all().and_then(|t| t.to_scalar()).expect("f32");
        assert!(size.is_finite() && sum.is_finite(), "{name}: {size} {sum}");
        assert_eq!(size > 1e-7, !is_bias_of_keys(name), "{name}: {size}");
        names.push(name.clone());
    }
    names
}

/// Our backward pass on the loss of step 0 against Candle's on the same.
fn assert_gradients_are_candles(objective: &mut dyn Objective) {
    let reference = objective.loss(0).expect("a loss").backward().expect("gradients");
    let gradients = ops::backward(objective.loss(0).expect("a loss")).expect("gradients");
    assert_eq!(gradients.len(), objective.parameters().len());
    for (name, parameter) in objective.parameters() {
        let (ours, candles) = (gradients.get(parameter).expect(name), reference.get(parameter).expect(name));
        // A bias of keys is held to the size of the queries' gradient, for its own is rounding.
        let sibling = name.replace("k_proj.bias", "q_proj.bias").replace("to_k.bias", "to_q.bias");
        let size = largest(reference.get(&objective.parameters()[&sibling]).expect(name));
        let gap = largest(&(ours - candles.detach()).expect(name));
        assert!(gap <= 1e-6 * size, "{name}: {gap} of {size}");
    }
}

#[test]
fn our_backward_pass_gives_candles_gradients() {
    let world = World::new();
    for kind in [ObjectiveKind::Autoencoder, ObjectiveKind::Joint] {
        assert_gradients_are_candles(world.objective(&world.config(kind, &[])).unwrap().as_mut());
    }
}

#[test]
fn checkpointing_gives_the_gradients_of_the_whole_graph() {
    let world = World::new();
    let gradients = |settings: &[&str]| {
        let mut objective = world.objective(&world.config(ObjectiveKind::Joint, settings)).unwrap();
        let gradients = ops::backward(objective.loss(0).expect("a loss")).expect("gradients");
        assert_eq!(gradients.len(), objective.parameters().len());
        let own = objective.parameters().iter().map(|(name, parameter)| {
            (name.clone(), gradients.get(parameter).unwrap_or_else(|| panic!("{name} has no gradient")).clone())
        });
        own.collect::<Vec<_>>()
    };
    let (whole, again) = (gradients(&[]), gradients(&["run.gradient_checkpointing=true"]));
    for ((name, whole), (_, again)) in whole.iter().zip(&again).filter(|((name, _), _)| !is_bias_of_keys(name)) {
        let gap = largest(&(whole - again).expect(name));
        // Gradients that meet at one tensor are added up in another order.
        assert!(gap <= 1e-5 * largest(whole), "{name}: {gap} of {}", largest(whole));
    }
}

/// Trains on the batch of step 0 alone; the losses.
fn losses_on_one_batch(objective: &mut dyn Objective, optimizer: &mut Optimizer, steps: usize) -> Vec<f32> {
    let mut step = || {
        let loss = objective.loss(0)?;
        let value = loss.to_scalar::<f32>()?;
        optimizer.update(ops::backward(loss)?)?;
        anyhow::Ok(value)
    };
    (0..steps).map(|_| step().expect("a step")).collect()
}

/// Tensors in the weight files of a model folder.
fn written_tensors(world: &World, objective: &dyn Objective, files: &[&str]) -> usize {
    objective.write(&world.path("written"), &weights(objective)).expect("a model folder");
    files.iter().map(|file| bits(&world.path("written").join(file)).len()).sum()
}

#[test]
fn every_parameter_of_the_autoencoder_is_trained() {
    let world = World::new();
    let mut objective = world.objective(&world.config(ObjectiveKind::Autoencoder, &[])).unwrap();
    let names = trained_names(objective.as_mut());
    // A resnet has 8 (two norms, two convolutions), the mid block's attention 10. Encoder: conv_in 2, resnet and
    // downsampler 10, resnet 8, mid 26, norm and conv_out 4. Decoder: 2, mid 26, two resnets and upsampler 18, 16, 4.
    // Between them two 1×1 convolutions.
    assert_eq!(names.len(), (2 + 10 + 8 + 26 + 4) + (2 + 26 + 18 + 16 + 4) + 4);
    assert_eq!(names.len(), written_tensors(&world, objective.as_ref(), &["vae/diffusion_pytorch_model.safetensors"]));
}

#[test]
fn every_parameter_of_the_joint_model_is_trained() {
    let world = World::new();
    let mut objective = world.objective(&world.config(ObjectiveKind::Joint, &[])).unwrap();
    let names = trained_names(objective.as_mut());
    let of = |component: &str| names.iter().filter(|name| name.starts_with(component)).count();
    // A resnet has 10, 12 where the width changes; a transformer 26. conv_in and time 6; down: 10 + 26 + 2 and 12; mid:
    // two resnets and a transformer 46; up: two resnets and an upsampler 26, two resnets and transformers 76; out 4.
    assert_eq!(of("unet."), 6 + 38 + 12 + 46 + 26 + 76 + 4);
    // Two embeddings, a layer (norms 4, attention 8, feed-forward 4), the last norm.
    assert_eq!(of("text_encoder."), 2 + 16 + 2);
    let files = ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"];
    assert_eq!(names.len(), written_tensors(&world, objective.as_ref(), &files));
}

#[test]
fn noise_mask_and_reference_all_reach_the_first_layer() {
    let world = World::new();
    let mut objective = world.objective(&world.config(ObjectiveKind::Joint, &[])).unwrap();
    let gradients = ops::backward(objective.loss(0).unwrap()).unwrap();
    let weight = &objective.parameters()["unet.conv_in.weight"]; // [c, 4 + 1 + 4, 3, 3]
    let gradient = gradients.get(weight).unwrap().to_dtype(DType::F32).unwrap();
    for (what, channels) in [("noisy", 0..4), ("mask", 4..5), ("reference", 5..9)] {
        for channel in channels {
            assert!(largest(&gradient.narrow(1, channel, 1).unwrap()) > 1e-6, "{what}, channel {channel}");
        }
    }
}

#[test]
fn the_autoencoder_learns_one_batch_by_heart() {
    let world = World::new();
    let config = world.config(ObjectiveKind::Autoencoder, &["run.images_per_step=4", "optimizer.lr=5e-3"]);
    let mut objective = world.objective(&config).unwrap();
    let mut optimizer = Optimizer::new(&config, objective.parameters()).unwrap();
    let losses = losses_on_one_batch(objective.as_mut(), &mut optimizer, 60);
    assert!(losses[59] < 0.3 * losses[0], "{losses:?}");
}

#[test]
fn the_joint_model_learns_one_batch_by_heart() {
    let world = World::new();
    let overrides = ["data.sets=1", "run.images_per_step=4", "joint.set_sizes=[4]", "optimizer.lr=1e-2"];
    let config = world.config(ObjectiveKind::Joint, &overrides);
    let mut objective = world.objective(&config).unwrap();
    let mut optimizer = Optimizer::new(&config, objective.parameters()).unwrap();
    let losses = losses_on_one_batch(objective.as_mut(), &mut optimizer, 60);
    assert!(losses[59] < 0.3 * losses[0], "{losses:?}");
}

#[test]
fn averaged_weights_follow_their_formula() {
    let world = World::new();
    let config = world.config(ObjectiveKind::Autoencoder, &["run.images_per_step=4"]);
    let mut objective = world.objective(&config).unwrap();
    let mut optimizer = Optimizer::new(&config, objective.parameters()).unwrap();
    let start = weights(objective.as_ref());
    losses_on_one_batch(objective.as_mut(), &mut optimizer, 1);
    let (end, averaged) = (weights(objective.as_ref()), optimizer.averaged().unwrap());
    // ema ← decay·ema + (1 − decay)·parameter, the decay of the first update being (1 + 0) / (10 + 0).
    let decay = config.optimizer.ema_decay_at(0);
    assert_eq!(decay, 0.1);
    for (name, average) in &averaged {
        let expected = ((&start[name] * decay).unwrap() + (&end[name] * (1.0 - decay)).unwrap()).unwrap();
        assert!(largest(&(average - expected).unwrap()) < 1e-6, "{name}");
        assert!(largest(&(&end[name] - &start[name]).unwrap()) > 0.0, "{name} did not move");
    }
}

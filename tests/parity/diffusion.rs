//! Noise schedule and ten training steps against diffusers and PyTorch.

use std::collections::BTreeMap;

use candle_core::Tensor;
use jedi::diffusion::samplers::ddim;
use jedi::diffusion::schedule::{BetaSchedule, PredictionType, Spacing};
use jedi::diffusion::{NoiseSchedule, Sampler, ScheduleConfig, mse};
use jedi::model::{JointUnet, UnetConfig};
use jedi::ops;
use jedi::shape::SetShape;
use jedi::train::TrainConfig;
use jedi::train::optimizer::Optimizer;
use serde_json::{Value, json};

use crate::compare::{Comparison, values};
use crate::golden::{Golden, pipeline_part};

#[test]
fn alphas_are_diffusers() {
    let case = Golden::open("schedule");
    let mut comparison = Comparison::default();
    for (name, beta_schedule) in [
        ("linear", BetaSchedule::Linear),
        ("scaled_linear", BetaSchedule::ScaledLinear),
        ("squaredcos_cap_v2", BetaSchedule::SquaredCosine),
    ] {
        let schedule = NoiseSchedule::new(&ScheduleConfig { beta_schedule, ..Default::default() }).unwrap();
        let found: Vec<f64> = (0..schedule.train_steps()).map(|t| schedule.alpha_cumprod(t)).collect();
        let expected = values(case.tensor(&format!("alphas_cumprod.{name}")));
        comparison.values(name, &found, &expected, (case.fact("tolerance"), 0.0));
    }
    comparison.finish();
}

fn check_timesteps(name: &str, timestep_spacing: Spacing) {
    let expected: BTreeMap<String, BTreeMap<usize, Vec<usize>>> = Golden::open("schedule").fact("timesteps");
    let schedule = NoiseSchedule::new(&ScheduleConfig { timestep_spacing, ..Default::default() }).unwrap();
    for (&steps, expected) in &expected[name] {
        assert_eq!(&schedule.sampling_timesteps(steps).unwrap(), expected, "{name}, {steps} steps");
    }
}

#[test]
fn leading_timesteps_are_diffusers() {
    check_timesteps("leading", Spacing::Leading);
}

#[test]
fn linspace_timesteps_are_diffusers() {
    check_timesteps("linspace", Spacing::Linspace);
}

#[test]
fn trailing_timesteps_are_diffusers() {
    check_timesteps("trailing", Spacing::Trailing);
}

#[test]
fn single_steps_are_diffusers() {
    let case = Golden::open("schedule");
    let mut comparison = Comparison::default();
    for (name, prediction_type) in [("epsilon", PredictionType::Epsilon), ("v_prediction", PredictionType::VPrediction)]
    {
        for set_alpha_to_one in [false, true] {
            let config = ScheduleConfig { prediction_type, set_alpha_to_one, ..Default::default() };
            let expected = case.tensor(&format!("steps.{name}.{set_alpha_to_one}"));
            let walk = Sampler::Ddim.walk(&NoiseSchedule::new(&config).unwrap(), expected.dim(0).unwrap()).unwrap();
            for step in 0..walk.levels().len() {
                let found = ddim::next(&walk, step, case.tensor("x"), case.tensor("output")).unwrap();
                let name = format!("{name} {set_alpha_to_one} {step}");
                comparison.tensor(&name, &found, &expected.get(step).unwrap(), case.fact("tolerance"));
            }
        }
    }
    comparison.finish();
}

/// A train config whose optimizer is the script's.
fn train_config(optimizer: &Value) -> TrainConfig {
    let number = |name: &str| optimizer[name].as_f64().expect(name);
    let config = json!({
        "objective": "joint",
        "model": { "architecture": "." },
        "data": { "source": "toybox" },
        "optimizer": {
            "lr": number("learning_rate"), "beta1": number("beta1"), "beta2": number("beta2"), "eps": number("eps"),
            "weight_decay": number("weight_decay"), "clip_norm": number("clip_norm"),
            "warmup_steps": 0, "decay": "constant",
        },
        "run": { "steps": 10, "images_per_step": 4 },
    });
    serde_json::from_value(config).unwrap()
}

#[test]
fn ten_training_steps_have_pytorchs_losses() {
    let case = Golden::open("training");
    let (config, weights) = pipeline_part::<UnetConfig>("unet", "diffusion_pytorch_model");
    let (unet, vars) = JointUnet::new(&config, weights.params("unet")).unwrap();
    let mut optimizer = Optimizer::new(&train_config(&case.fact("optimiser")), &vars).unwrap();
    let (mut losses, mut norms) = (vec![], vec![]);
    for step in 0..10 {
        let batch = case.below(&format!("step{step}."));
        let input = Tensor::cat(&[&batch["noisy"], &batch["mask"], &batch["reference"]], 1).unwrap();
        let sets = batch["timesteps"].dim(0).unwrap();
        let shape = SetShape::new(sets, input.dim(0).unwrap() / sets);
        let eps = unet.forward(&input, &batch["timesteps"], &batch["context"], shape).unwrap();
        let loss = mse(&eps, &batch["noise"]).unwrap();
        losses.push(loss.to_scalar::<f32>().unwrap() as f64);
        norms.push(optimizer.update(ops::backward(loss).unwrap()).unwrap().gradient_norm);
    }
    let mut comparison = Comparison::default();
    let (tolerance, norm_tolerance) = (case.fact("tolerance"), case.fact("norm_tolerance"));
    comparison.values("losses", &losses, &values(case.tensor("losses")), (tolerance, 0.0));
    comparison.values("gradient norms", &norms, &values(case.tensor("gradient_norms")), (norm_tolerance, 0.0));
    comparison.finish();
}

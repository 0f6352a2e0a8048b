//! The memory plan against what a step then takes. In a program of its own: the count of memory is the whole process's.

#[allow(dead_code)] // The other tests' part of the two.
#[path = "harness/mod.rs"]
mod harness;
#[allow(dead_code)]
#[path = "training/world.rs"]
mod world;

use candle_core::Device;
use jedi::ops::trace_memory;
use jedi::train::ObjectiveKind::{Autoencoder, Joint};
use jedi::train::plan::MemoryPlan;
use jedi::train::trainer::accumulate;
use jedi::train::{ObjectiveKind, Share};
use world::World;

/// What is planned for a step beside weights and moments, and the most that it then takes.
fn planned_and_taken(world: &World, kind: ObjectiveKind, settings: &[&str]) -> (f64, f64) {
    let config = world.config(kind, settings);
    let mut objective = world.objective(&config).expect("an objective");
    let plan = MemoryPlan::of(&config, objective.as_mut(), Share::WHOLE, &Device::Cpu).expect("a plan");
    // The pictures are encoded before; there and not back, which is most of the time.
    objective.loss(0).expect("a loss");
    let (_, trace) =
        trace_memory(|| accumulate(objective.as_mut(), 0, Share::WHOLE, config.run.micro_batch).expect("a step"));
    let taken = trace.into_iter().max().expect("operations");
    ((plan.gradients + plan.activations.expect("on the CPU")) as f64, taken as f64)
}

#[test]
fn what_a_step_takes_is_known_before_it() {
    let world = World::new();
    // Larger than what is tried: latents of 48×48, and once 64×64 (tried: 16 and 32), six pictures in three sets (tried: one
    // and two).
    let large = ["data.size=96", "data.images=2", "joint.set_sizes=[2]", "run.images_per_step=6", "data.sets=4"];
    for (kind, more) in [
        (Joint, vec!["data.size=128"]),
        (Joint, vec!["run.gradient_checkpointing=true"]),
        (Joint, vec!["run.micro_batch=4"]),
        (Joint, vec!["lora.rank=2"]),
        (Joint, vec!["model.freeze=[\"text_encoder.*\", \"unet.down_blocks.*\"]"]),
        (Autoencoder, vec![]),
    ] {
        let (planned, taken) = planned_and_taken(&world, kind, &[&large[..], &more].concat());
        let off = planned / taken - 1.0;
        assert!(off.abs() < 0.1, "{kind:?} {more:?}: {planned} bytes planned, {taken} taken");
    }
}

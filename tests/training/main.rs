//! Proof that training is right and safe to kill, on networks of a few thousand parameters.

#[path = "../harness/mod.rs"]
mod harness;
mod world;

mod checkpoints;
mod damage;
mod data;
mod events;
mod learning;
mod lora;
mod mixtures;
mod plan;
mod refusals;
mod resume;
mod steps;
mod validation;

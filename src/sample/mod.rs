//! Sampling: references and prompts become pictures. Read `pipeline`, then `noise`.

pub mod noise;
pub mod pipeline;

pub use noise::GivenNoise;
pub use pipeline::{Painted, Pipeline, Reference, SampleSettings, SetRequest};

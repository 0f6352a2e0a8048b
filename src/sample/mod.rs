//! Sampling: references and prompts become pictures. Read `pipeline`, then `noise`, then `gallery` (the files).

pub mod gallery;
pub mod noise;
pub mod pipeline;

pub use gallery::Gallery;
pub use noise::GivenNoise;
pub use pipeline::{Painted, Pipeline, Reference, SampleSettings, SetRequest};

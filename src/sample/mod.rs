//! Sampling: references and prompts become pictures. Read `request` (what is asked), `pipeline` (the model), `batches` (many
//! sets), `conditions` and `walk` (one batch), then `noise`, then `gallery` (the files).

mod batches;
mod conditions;
pub mod gallery;
pub mod noise;
pub mod pipeline;
pub mod request;
mod walk;

pub use gallery::Gallery;
pub use noise::GivenNoise;
pub use pipeline::Pipeline;
pub use request::{Painted, Reference, SampleSettings, SetRequest};

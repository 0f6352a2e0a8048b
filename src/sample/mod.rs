//! Sampling: references and prompts become pictures. Read `request` (what is asked), `pipeline` (the model), `batches` (many
//! sets), `conditions` and `walk` (one batch), `kept` (around known parts), `edit` (by instructions), `pictures` (the
//! autoencoder), then `noise`, then `gallery` (the files) and `preview`.

pub mod attention_map;
mod batches;
mod conditions;
mod edit;
pub mod gallery;
mod kept;
pub mod noise;
mod picture_file;
mod pictures;
pub mod pipeline;
mod preview;
pub mod request;
mod sides;
mod walk;

pub use batches::BatchKey;
pub use edit::{Edit, Editor};
pub use gallery::Gallery;
pub use kept::Kept;
pub use noise::GivenNoise;
pub use picture_file::settings_of;
pub use pipeline::Pipeline;
pub use preview::LatentColours;
pub use request::{Painted, Reference, Rounds, SampleSettings, SetRequest};
pub use sides::Sides;
pub use walk::Step;

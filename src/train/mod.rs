//! Training: an objective gives losses, the trainer turns them into updates, checkpoints and a record of the run.
//!
//! Read `settings`, `trainer`, then the two objectives.

pub mod settings;
pub mod trainer;

pub mod autoencoder;
pub mod conditions;
pub mod data_check;
pub mod joint;
pub mod latents;
pub mod objective;
pub mod start;
mod whitening;

pub mod events;
pub mod optimizer;
pub mod run_folder;

pub use autoencoder::AutoencoderObjective;
pub use joint::JointObjective;
pub use objective::Objective;
pub use settings::{ObjectiveKind, TrainConfig};
pub use trainer::{Hooks, StepReport, train};

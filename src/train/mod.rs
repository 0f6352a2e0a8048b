//! Training: an objective gives losses, the trainer turns them into updates, checkpoints and a record of the run.
//!
//! Read `settings` and `data_settings`, `trainer`, then the two objectives.

pub mod data_settings;
mod rates;
pub mod settings;
pub mod trainer;

pub mod autoencoder;
mod batch;
pub mod conditions;
pub mod data_check;
pub mod held_out;
pub mod joint;
pub mod latents;
pub mod lora;
pub mod objective;
mod patterns;
pub mod plan;
pub mod share;
pub mod shared_feed;
pub mod start;
mod stored;
mod texts;
mod whitening;

pub mod checkpoints;
mod desk;
pub mod events;
pub mod optimizer;
pub mod run_folder;
mod saver;
mod team;

pub use autoencoder::AutoencoderObjective;
pub use joint::JointObjective;
pub use objective::Objective;
pub use settings::{ObjectiveKind, TrainConfig};
pub use share::Share;
pub use trainer::{Hooks, StepReport, train, train_among};

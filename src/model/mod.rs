//! The network family: U-Net, AutoencoderKL, CLIP text encoder; built from a diffusers `config.json`.

pub mod config;
pub mod params;

mod blocks;
pub mod layers;
mod resnet;
mod transformer;
pub mod unet;
pub mod vae;

pub use config::{UnetConfig, VaeConfig};
pub use unet::JointUnet;
pub use vae::Vae;

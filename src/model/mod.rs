//! The network family: U-Net, AutoencoderKL, CLIP text encoders; built from a diffusers `config.json`. And networks that
//! look at pictures, in transformers' layout.

pub mod adapters;
pub mod blip;
pub mod conditions;
pub mod config;
pub mod convert;
pub mod coupling;
pub mod family;
pub mod files;
pub mod fingerprint;
pub mod hub;
mod ldm;
pub mod lora_file;
pub mod params;
mod part;
pub mod single_file;
pub mod weight_file;
pub mod weights;
pub mod widen;

mod blocks;
pub mod clip_image;
mod clip_layer;
pub mod dino;
pub mod grounding_dino;
pub mod language;
pub mod layers;
mod patches;
pub mod prompts;
mod resnet;
pub mod sam;
pub mod text;
mod time;
pub mod tokenizer;
pub mod toybox;
mod transformer;
pub mod unet;
pub mod vae;
mod vae_tiles;
mod windows;
pub mod write;

pub use conditions::{AddedConditions, ImageConditions};
pub use config::{UnetConfig, VaeConfig};
pub use coupling::{Probe, Sight};
pub use family::Family;
pub use files::Files;
pub use hub::{Hub, HubName};
pub use part::Part;
pub use prompts::PromptEncoder;
pub use single_file::SingleFile;
pub use text::{TextConfig, TextEncoder};
pub use tokenizer::{Prompt, Tokenizer};
pub use unet::JointUnet;
pub use vae::Vae;

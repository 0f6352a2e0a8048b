//! The network family: U-Net, AutoencoderKL, CLIP text encoder; built from a diffusers `config.json`.

pub mod params;

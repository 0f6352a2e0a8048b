//! The model inside the binary: trained with jedi on drawn toys, by the recipes in `configs/toybox`.

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../configs/toybox/model/", $name)))),*]
    };
}

/// Name inside the model folder, contents.
pub const FILES: &[(&str, &[u8])] = files![
    "jedi.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

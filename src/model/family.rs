//! Which kind of Stable Diffusion a model is: what its U-Net takes beside the noisy latents, and what it was trained for.

use anyhow::Result;
use serde_json::Value;

use super::config::UnetConfig;
use super::files::Files;

/// What the U-Net takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// JeDi's: noisy latents, mask, reference, for each image of a set.
    Joint,
    /// Stable Diffusion: noisy latents alone.
    Plain,
    /// Stable Diffusion for inpainting: the joint model's channels in the same order, not trained on sets.
    Inpainting,
    /// InstructPix2Pix: noisy latents and the picture to edit.
    InstructPix2Pix,
    /// Something else.
    Other,
}

impl Family {
    /// JeDi and inpainting take the same nine channels. JeDi it is where a `jedi.json` says so (in the folder, or in the
    /// metadata of a single file), inpainting where there is none and `model_index.json` names an inpainting pipeline.
    pub fn of(files: &Files, config: &UnetConfig) -> Result<Self> {
        let c = config.latent_channels();
        Ok(match config.in_channels {
            inputs if inputs == c => Self::Plain,
            inputs if inputs == 2 * c => Self::InstructPix2Pix,
            _ if !config.is_joint() => Self::Other,
            _ if files.contains("jedi.json") || !is_for_inpainting(files)? => Self::Joint,
            _ => Self::Inpainting,
        })
    }

    /// In words, with the channels.
    pub fn describe(self, config: &UnetConfig) -> String {
        let (inputs, c) = (config.in_channels, config.latent_channels());
        match self {
            Self::Joint => format!("joint ({inputs} channels: noisy {c}, mask 1, reference {c})"),
            Self::Plain => format!("plain ({inputs} channels, as Stable Diffusion)"),
            Self::Inpainting => format!("inpainting ({inputs} channels: noisy {c}, mask 1, masked picture {c})"),
            Self::InstructPix2Pix => format!("InstructPix2Pix ({inputs} channels: noisy {c}, picture {c})"),
            Self::Other => format!("unknown ({inputs} channels in, {c} out)"),
        }
    }
}

fn is_for_inpainting(files: &Files) -> Result<bool> {
    if !files.contains("model_index.json") {
        return Ok(false);
    }
    let index: Value = files.json("model_index.json")?;
    Ok(index["_class_name"].as_str().is_some_and(|class| class.contains("Inpaint")))
}

/// Whether it reads prompts with two text encoders, as Stable Diffusion XL does: so says its index, its U-Net's config, or the
/// second one itself.
pub fn has_two_text_encoders(files: &Files) -> Result<bool> {
    let says =
        |name: &str, says: fn(&Value) -> bool| -> Result<bool> { Ok(files.contains(name) && says(&files.json(name)?)) };
    Ok(files.contains("text_encoder_2/config.json")
        || says("model_index.json", |index| index["text_encoder_2"][0].is_string())?
        || says("unet/config.json", |unet| unet["addition_embed_type"] == "text_time")?)
}

/// Stable Diffusion's generation, by the width of its text encoder; None for models of other sizes.
pub fn generation(config: &UnetConfig) -> Option<&'static str> {
    match config.cross_attention_dim {
        768 => Some("Stable Diffusion 1"),
        1024 => Some("Stable Diffusion 2"),
        2048 => Some("Stable Diffusion XL"),
        _ => None,
    }
}

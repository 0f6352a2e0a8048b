//! Stable Diffusion's own layout (LDM): all networks in one file, under names of their own. Which name is which, both ways,
//! and what the names and shapes tell of the networks.

mod architecture;
mod names;
mod text;
mod text_kind;
mod unet;
mod vae;

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::config::{UnetConfig, VaeConfig};
use super::text::TextConfig;
use super::weights::Stored;

pub use architecture::{Shapes, scheduler, tokenizer_config};
pub use text_kind::TextKind;

/// In front of the U-Net's names.
pub const UNET: &str = "model.diffusion_model.";
/// In front of the VAE's names.
pub const VAE: &str = "first_stage_model.";
/// In front of the names of the text encoder of Stable Diffusion XL's refiner, which reads prompts with one alone.
pub const REFINER_TEXT: &str = "conditioner.embedders.0.model.";

/// Tensors by name.
pub type Tensors = BTreeMap<String, Stored>;

/// What belongs to no network that jedi builds: leftovers of training, and CLIP's other half (of which Stable Diffusion XL's
/// second text encoder does use the projection).
const LEFT_OVER: [&str; 5] = ["position_ids", "logit_scale", "text_projection", "text_projection.weight", "attn_mask"];

/// The U-Net's tensors under diffusers' names.
pub fn unet_from_ldm(file: &Tensors, config: &UnetConfig) -> Result<Tensors> {
    let names = unet::names(config);
    below(file, UNET).map(|(name, tensor)| Ok((known(UNET, name, names.diffusers(name))?, tensor.clone()))).collect()
}

/// The U-Net's tensors under LDM's names.
pub fn unet_to_ldm(tensors: &Tensors, config: &UnetConfig) -> Result<Tensors> {
    let names = unet::names(config);
    tensors
        .iter()
        .map(|(name, tensor)| Ok((UNET.to_owned() + &known("", name, names.ldm(name))?, tensor.clone())))
        .collect()
}

/// The VAE's tensors under diffusers' names. What was a 1×1 convolution is a linear layer there.
pub fn vae_from_ldm(file: &Tensors, config: &VaeConfig) -> Result<Tensors> {
    let names = vae::names(config);
    // The autoencoder's own training leaves its discriminator behind.
    let own = below(file, VAE).filter(|(name, _)| !name.starts_with("loss.") && !is_left_over(name));
    own.map(|(name, tensor)| {
        let name = known(VAE, name, names.diffusers(name))?;
        let is_linear = vae::is_linear(&name) && tensor.shape().len() > 2;
        Ok((name, if is_linear { tensor.reshaped(&tensor.shape()[..2])? } else { tensor.clone() }))
    })
    .collect()
}

/// The VAE's tensors, in either spelling of its attention, under LDM's names.
pub fn vae_to_ldm(tensors: &Tensors, config: &VaeConfig) -> Result<Tensors> {
    let names = vae::names(config);
    let to_ldm = |(name, tensor): (&String, &Stored)| {
        let name = vae::new_spelling(name);
        let tensor = match (vae::is_linear(&name), tensor.shape()) {
            (true, &[outputs, inputs]) => tensor.reshaped(&[outputs, inputs, 1, 1])?,
            _ => tensor.clone(),
        };
        Ok((VAE.to_owned() + &known("", &name, names.ldm(&name))?, tensor))
    };
    tensors.iter().map(to_ldm).collect()
}

/// A text encoder's tensors under transformers' names, as many layers as the config has.
pub fn text_from_ldm(file: &Tensors, kind: TextKind, config: &TextConfig) -> Result<Tensors> {
    let own = below(file, kind.prefix());
    if kind.is_open_clip() { text::from_open_clip(own, kind, config) } else { Ok(text::from_clip(own)) }
}

/// A text encoder's tensors under LDM's names for this kind.
pub fn text_to_ldm(tensors: &Tensors, kind: TextKind, config: &TextConfig) -> Result<Tensors> {
    if kind.is_open_clip() {
        return text::to_open_clip(tensors, kind, config);
    }
    Ok(tensors.iter().map(|(name, tensor)| (kind.prefix().to_owned() + name, tensor.clone())).collect())
}

/// The tensors below a prefix, by the rest of their names.
fn below<'a>(file: &'a Tensors, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Stored)> {
    file.iter().filter_map(move |(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)))
}

fn is_left_over(name: &str) -> bool {
    LEFT_OVER.iter().any(|left| name == *left || name.ends_with(&format!(".{left}")))
}

/// The translated name, or the error that there is none.
fn known(prefix: &str, name: &str, translated: Option<String>) -> Result<String> {
    match translated {
        Some(name) => Ok(name),
        None => bail!("tensor {prefix}{name} belongs to no Stable Diffusion network that jedi knows"),
    }
}

#[cfg(test)]
mod tests;

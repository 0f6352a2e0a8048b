//! The sides of the square pictures that a model can paint.

use anyhow::Result;

use crate::invalid::invalid;
use crate::model::{Files, UnetConfig, VaeConfig};

/// In pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sides {
    /// What the model was made for.
    pub native: usize,
    /// Any other is a multiple of this.
    pub multiple: usize,
}

impl Sides {
    /// By the configs of the networks.
    pub fn of(unet: &UnetConfig, vae: &VaeConfig) -> Self {
        let f = vae.downscale();
        Self {
            native: unet.sample_size.map_or(512, |latent| latent * f),
            multiple: f << unet.block_out_channels.len().saturating_sub(1),
        }
    }

    /// Those of a model that is not loaded.
    pub fn read(files: &Files) -> Result<Self> {
        Ok(Self::of(&files.json("unet/config.json")?, &files.json("vae/config.json")?))
    }

    /// Whether the networks can halve such a side as often as they must.
    pub fn fits(self, size: usize) -> bool {
        size > 0 && size.is_multiple_of(self.multiple)
    }

    /// Refuses a side that does not fit; `option` is where it was asked for.
    pub fn check(self, option: &str, size: usize) -> Result<()> {
        let multiple = self.multiple;
        if self.fits(size) {
            return Ok(());
        }
        let near = (size / multiple).max(1) * multiple;
        let asked = if option.starts_with("--") { format!("{option} {size}") } else { format!("{option} = {size}") };
        Err(invalid(format!("{asked}: this model takes multiples of {multiple} pixels, such as {near}")))
    }
}

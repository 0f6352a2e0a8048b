//! What the U-Net is told of every image besides its latents and its noise level.

use candle_core::{Result, Tensor};

/// Numbers in [`AddedConditions::time_ids`] of Stable Diffusion XL: height and width of the picture before it was cropped,
/// top and left of the crop, height and width asked for.
pub const N_SIZES: usize = 6;

/// The text of each image, and what some networks are told on top.
#[derive(Clone)]
pub struct ImageConditions {
    /// Text embedding, `[b·n, l, d]`.
    pub context: Tensor,
    /// For a network that takes them ([`takes_added_conditions`](super::UnetConfig::takes_added_conditions)), else None.
    pub added: Option<AddedConditions>,
}

/// What Stable Diffusion XL adds to the time embedding; diffusers' `added_cond_kwargs`, with its names.
#[derive(Clone)]
pub struct AddedConditions {
    /// Pooled text, `[b·n, p]`.
    pub text_embeds: Tensor,
    /// The sizes, `[b·n, N_SIZES]`, f32.
    pub time_ids: Tensor,
}

impl ImageConditions {
    /// The text alone.
    ///
    /// # Shapes
    /// - context `[b·n, l, d]`
    pub fn text(context: &Tensor) -> Self {
        Self { context: context.clone(), added: None }
    }

    /// Those of `count` images from number `first` on.
    pub fn of_images(&self, first: usize, count: usize) -> Result<Self> {
        let part = |all: &Tensor| all.narrow(0, first, count)?.contiguous();
        let added = match &self.added {
            None => None,
            Some(added) => {
                Some(AddedConditions { text_embeds: part(&added.text_embeds)?, time_ids: part(&added.time_ids)? })
            }
        };
        Ok(Self { context: part(&self.context)?, added })
    }
}

//! SAM (Kirillov et al. 2023; transformers `SamModel`): what is inside a box, as a mask. Forward only; of the prompts boxes
//! alone, which is what a detector gives.
//!
//! `config`, `image` (the picture, once), `prompt` and `masks` (each box of it).

mod config;
mod image;
mod masks;
mod prompt;

use anyhow::{Context as _, Result};
use candle_core::{Result as CandleResult, Tensor};

pub use self::config::{SamConfig, SamMaskConfig, SamPromptConfig, SamVisionConfig};
use self::image::ImageEncoder;
use self::masks::MaskDecoder;
use self::prompt::{Corners, Places};
use super::files::Files;
use super::params::Params;
use super::weights::Weights;
use crate::device::Runtime;
use crate::ops;

/// The network.
pub struct Sam {
    image: ImageEncoder,
    places: Places,
    corners: Corners,
    masks: MaskDecoder,
    side: usize,
}

impl Sam {
    /// Reads a transformers folder: `config.json`, `model.safetensors`.
    pub fn load(files: &Files, runtime: &Runtime) -> Result<Self> {
        let config: SamConfig = files.json("config.json")?;
        Self::new(&config, files.weights("")?, runtime).with_context(|| files.describe("config.json"))
    }

    /// From weights by transformers' names.
    pub fn new(config: &SamConfig, weights: Weights, runtime: &Runtime) -> Result<Self> {
        config.check()?;
        // The table of frequencies stands under two names, or under either of them.
        let tables = ["shared_image_embedding", "prompt_encoder.shared_embedding"];
        let has = |table: &str| weights.tensors().contains_key(&format!("{table}.positional_embedding"));
        let table = if has(tables[0]) || !has(tables[1]) { tables[0] } else { tables[1] };
        // Prompts of points and masks are not taken.
        let unused = ["mask_embed.", "not_a_point_embed.", "point_embed.0.", "point_embed.1."];
        let is_read = |name: &str| {
            let prompt = name.strip_prefix("prompt_encoder.");
            let is_unused = prompt.is_some_and(|name| unused.iter().any(|unused| name.starts_with(unused)));
            let is_double = name.ends_with(".positional_embedding") && !name.starts_with(table);
            !is_unused && !is_double
        };
        let params = Params::stored(weights.only(is_read), &runtime.device, runtime.dtype, false);
        let c = config.mask_decoder_config.hidden_size;
        let network = Self {
            image: ImageEncoder::new(&config.vision_config, &params.pp("vision_encoder"))?,
            places: Places::new(&params.pp(table), c)?,
            corners: Corners::new(&params.pp("prompt_encoder"), c)?,
            masks: MaskDecoder::new(&config.mask_decoder_config, &params.pp("mask_decoder"))?,
            side: config.vision_config.image_size,
        };
        params.finish()?;
        Ok(network)
    }

    /// Side of the square that pictures are fitted into, in pixels.
    pub fn side(&self) -> usize {
        self.side
    }

    /// What is known of a picture before any box.
    ///
    /// # Shapes
    /// - pixels `[b, 3, side, side]`, normalised → `[b, grid, grid, c]`
    pub fn encode(&self, pixels: &Tensor) -> CandleResult<Tensor> {
        let (_, _, h, w) = pixels.dims4()?;
        if (h, w) != (self.side, self.side) {
            candle_core::bail!("SAM: a picture of {h}×{w}, the network takes {0}×{0}", self.side);
        }
        self.image.forward(&ops::to_channels_last(&pixels.to_dtype(self.corners.no_mask.dtype())?)?)
    }

    /// Masks to choose from for each box, before the sigmoid, and how good each is thought to be (its IoU).
    ///
    /// # Shapes
    /// - picture `[1, grid, grid, c]`; n boxes: left, upper, right, lower edge in pixels of the square → `[n, masks, 4·grid,
    ///   4·grid]`, `[n, masks]`
    pub fn masks(&self, picture: &Tensor, boxes: &[[f32; 4]]) -> CandleResult<(Tensor, Tensor)> {
        let picture = picture.broadcast_add(&self.corners.no_mask)?;
        let positions = self.places.of_map(picture.dim(1)?)?;
        self.masks.forward(&picture, &positions, &self.corners.tokens(boxes, self.side, &self.places)?)
    }
}

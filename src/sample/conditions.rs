//! What every step of a batch is given besides x: the clean latents of the references, and text, mask and reference of each
//! branch.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use image::RgbImage;

use super::pipeline::Pipeline;
use super::request::SetRequest;
use crate::data::tensor_from_images;
use crate::diffusion::Branch;
use crate::shape::SetShape;

/// All branches of a step, one behind the other.
pub struct Conditions {
    /// `[branches·b·n, l, d]`.
    pub context: Tensor,
    /// Mask and reference, `[branches·b·n, 1 + c, h, w]`; None for a U-Net without them.
    pub channels: Option<Tensor>,
    /// How many.
    pub branches: usize,
}

impl Pipeline {
    /// Clean latents of the references, `[b·references, c, h, w]`; None without references.
    pub(super) fn known(
        &self,
        sets: &[SetRequest],
        shape: SetShape,
        (c, h, w): (usize, usize, usize),
    ) -> Result<Option<Tensor>> {
        // The sets of a run mostly share their references; each picture is encoded once.
        let mut images: Vec<RgbImage> = Vec::new();
        let mut picks = Vec::new();
        for reference in sets.iter().flat_map(|set| &set.references) {
            let known = images.iter().position(|image| *image == reference.image);
            picks.push(known.unwrap_or(images.len()) as u32);
            if known.is_none() {
                images.push(reference.image.clone());
            }
        }
        if images.is_empty() {
            return Ok(None);
        }
        let n_picks = picks.len();
        let pixels = tensor_from_images(&images, &self.runtime.device)?.to_dtype(self.runtime.dtype)?;
        let latents = self.vae.latents_from_images(&pixels)?.to_dtype(DType::F32)?;
        let expected = (images.len(), c, h, w);
        ensure!(
            latents.dims4()? == expected,
            "references encode to {:?}, sets of {} images need {expected:?}",
            latents.dims(),
            shape.images
        );
        let picks = Tensor::from_vec(picks, n_picks, &self.runtime.device)?;
        Ok(Some(latents.index_select(&picks, 0)?)) // [b·references, c, h, w]
    }

    /// What every branch of every step is given besides x, all branches in one batch.
    pub(super) fn conditions(
        &self,
        sets: &[SetRequest],
        shape: SetShape,
        known: &Option<Tensor>,
        branches: &[Branch],
    ) -> Result<Conditions> {
        let captions: Vec<&str> = sets
            .iter()
            .flat_map(|set| {
                set.references.iter().map(|r| r.caption.as_str()).chain(set.prompts.iter().map(String::as_str))
            })
            .collect();
        let text = self.encode(&captions)?; // [b·n, l, d]
        let null_text = self.encode(&vec![""; captions.len()])?;
        let pick = |branch: &Branch| if branch.keeps_text { &text } else { &null_text };
        let contexts: Vec<&Tensor> = branches.iter().map(pick).collect();
        let context = Tensor::cat(&contexts, 0)?; // [branches·b·n, l, d]
        if !self.is_joint() {
            return Ok(Conditions { context, channels: None, branches: branches.len() });
        }
        let c = self.unet.config().latent_channels();
        let (device, dtype) = (&self.runtime.device, self.runtime.dtype);
        let (h, w) = match known {
            Some(known) => (known.dim(2)?, known.dim(3)?),
            None => (1, 1),
        };
        let hidden = |images: usize| -> Result<Tensor> {
            let mask = Tensor::ones((shape.sets, images, 1, h, w), dtype, device)?;
            Ok(Tensor::cat(&[&mask, &Tensor::zeros((shape.sets, images, c, h, w), dtype, device)?], 2)?)
        };
        let mut channels = Vec::new();
        for branch in branches {
            let own = match known.as_ref().filter(|_| branch.keeps_references) {
                None => hidden(shape.images)?,
                Some(known) => {
                    let n_references = known.dim(0)? / shape.sets;
                    let clean = known.to_dtype(dtype)?.reshape((shape.sets, n_references, c, h, w))?;
                    let mask = Tensor::zeros((shape.sets, n_references, 1, h, w), dtype, device)?;
                    let given = Tensor::cat(&[&mask, &clean], 2)?; // [b, references, 1 + c, h, w]
                    Tensor::cat(&[&given, &hidden(shape.images - n_references)?], 1)?
                }
            };
            channels.push(own.reshape((shape.total(), 1 + c, h, w))?); // [b·n, 1 + c, h, w]
        }
        Ok(Conditions { context, channels: Some(Tensor::cat(&channels, 0)?), branches: branches.len() })
    }
}

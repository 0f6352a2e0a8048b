//! What every step of a batch is given besides x: the clean latents of the references, and text, mask and reference of each
//! branch.

use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use super::pipeline::Pipeline;
use super::request::{Reference, SampleSettings, SetRequest};
use crate::diffusion::Branch;
use crate::model::conditions::N_SIZES;
use crate::model::{AddedConditions, Family, ImageConditions, Probe, Sight};
use crate::shape::SetShape;

/// All branches of a step, one behind the other.
pub struct Conditions {
    /// Of branches·b·n images.
    told: ImageConditions,
    /// Mask and reference, `[branches·b·n, 1 + c, h, w]`; None for a U-Net without them.
    channels: Option<Tensor>,
    /// How strongly the others of its set attend to each place of an image, `[branches·b·n, h, w]`; None: as they would.
    key_weights: Option<Tensor>,
}

impl Conditions {
    /// Those of `count` branches from number `first` on, of `total` images each.
    pub fn of_branches(&self, first: usize, count: usize, total: usize) -> Result<Self> {
        let part = |all: &Tensor| all.narrow(0, first * total, count * total)?.contiguous();
        let own = |all: &Option<Tensor>| all.as_ref().map(part).transpose();
        let told = self.told.of_images(first * total, count * total)?;
        Ok(Self { told, channels: own(&self.channels)?, key_weights: own(&self.key_weights)? })
    }

    /// What the images of a set see of each other.
    pub fn sight(&self, probe: Option<&Arc<Probe>>) -> Sight {
        Sight { key_weights: self.key_weights.clone(), probe: probe.cloned() }
    }

    /// Text of every image, and what else the network is told of it.
    pub fn told(&self) -> &ImageConditions {
        &self.told
    }

    /// The network's input: x, where the network takes them with mask and reference.
    ///
    /// # Shapes
    /// - x `[branches·b·n, c, h, w]` → `[branches·b·n, in_channels, h, w]`
    pub fn input(&self, x: &Tensor) -> Result<Tensor> {
        let Some(channels) = &self.channels else { return Ok(x.clone()) };
        let (total, extra, ..) = channels.dims4()?;
        let (_, _, h, w) = x.dims4()?;
        Ok(Tensor::cat(&[x, &channels.broadcast_as((total, extra, h, w))?.contiguous()?], 1)?)
    }
}

impl Pipeline {
    /// Clean latents of the references, `[b·references, c, h, w]`; None without references.
    pub(super) fn known(&self, sets: &[SetRequest], settings: &SampleSettings) -> Result<Option<Tensor>> {
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
        let latents = self.latents_of(&images, settings)?;
        let (c, h, w) = self.latent_shape(settings.size);
        let expected = (images.len(), c, h, w);
        ensure!(
            latents.dims4()? == expected,
            "references encode to {:?}, pictures of {} pixels need {expected:?}",
            latents.dims(),
            settings.size
        );
        let picks = Tensor::from_vec(picks, n_picks, &self.runtime.device)?;
        Ok(Some(latents.index_select(&picks, 0)?)) // [b·references, c, h, w]
    }

    /// What every branch of every step is given besides x.
    pub(super) fn conditions(
        &self,
        sets: &[SetRequest],
        shape: SetShape,
        known: Option<&Tensor>,
        settings: &SampleSettings,
    ) -> Result<Conditions> {
        let branches = settings.guidance.branches();
        let told = self.told(sets, branches, settings.size)?;
        let channels = match self.is_joint() {
            true => Some(self.channels(shape, known, branches, settings)?),
            false => None,
        };
        let weights = self.key_weights(sets, settings)?;
        let key_weights = weights.map(|weights| Tensor::cat(&vec![&weights; branches.len()], 0)).transpose()?;
        Ok(Conditions { told, channels, key_weights })
    }

    /// The same of sets of one picture, whose network is given `channels` beside the noisy latents.
    ///
    /// # Shapes
    /// - channels `[branches·b, extra, h, w]`
    pub(super) fn conditions_beside(
        &self,
        sets: &[SetRequest],
        channels: &Tensor,
        settings: &SampleSettings,
    ) -> Result<Conditions> {
        let told = self.told(sets, settings.guidance.branches(), settings.size)?;
        Ok(Conditions { told, channels: Some(channels.to_dtype(self.runtime.dtype)?), key_weights: None })
    }

    /// The references' weights and masks at the latents' size, 1 for the new images, `[b·n, h, w]`; None where all are 1.
    fn key_weights(&self, sets: &[SetRequest], settings: &SampleSettings) -> Result<Option<Tensor>> {
        let is_plain = |reference: &Reference| reference.weight == 1.0 && reference.mask.is_none();
        if sets.iter().flat_map(|set| &set.references).all(is_plain) {
            return Ok(None);
        }
        let (_, h, w) = self.latent_shape(settings.size);
        let pixels = settings.size / h;
        let mut all = Vec::new();
        for set in sets {
            for reference in &set.references {
                let weights = match &reference.mask {
                    None => Tensor::ones((1, 1, h, w), DType::F32, &Device::Cpu)?,
                    Some(mask) => {
                        let values: Vec<f32> = mask.pixels().map(|pixel| f32::from(pixel.0[0]) / 255.0).collect();
                        let mask = Tensor::from_vec(values, (1, 1, h * pixels, w * pixels), &Device::Cpu)?;
                        mask.avg_pool2d(pixels)?
                    }
                };
                all.push((weights.reshape((1, h, w))? * reference.weight)?);
            }
            all.push(Tensor::ones((set.prompts.len(), h, w), DType::F32, &Device::Cpu)?);
        }
        Ok(Some(Tensor::cat(&all, 0)?))
    }

    /// Text of every image in every branch, and for Stable Diffusion XL that each is a whole picture of `size` pixels.
    fn told(&self, sets: &[SetRequest], branches: &[Branch], size: usize) -> Result<ImageConditions> {
        let mut texts: Vec<&str> = Vec::new();
        let mut null_texts: Vec<&str> = Vec::new();
        for set in sets {
            texts.extend(set.references.iter().map(|reference| reference.caption.as_str()));
            texts.extend(set.prompts.iter().map(String::as_str));
            null_texts.extend(set.references.iter().map(|_| ""));
            null_texts.extend(set.prompts.iter().map(|_| set.negative_prompt.as_str()));
        }
        let (text, null_text) = (self.encode(&texts)?, self.encode(&null_texts)?); // [b·n, l, d]
        let picked: Vec<_> = branches.iter().map(|branch| if branch.keeps_text { &text } else { &null_text }).collect();
        let contexts: Vec<&Tensor> = picked.iter().map(|text| &text.context).collect();
        let context = Tensor::cat(&contexts, 0)?; // [branches·b·n, l, d]
        if !self.unet.config().takes_added_conditions() {
            return Ok(ImageConditions { context, added: None });
        }
        let pooled: Vec<&Tensor> = picked.iter().filter_map(|text| text.pooled.as_ref()).collect();
        let sizes = [size, size, 0, 0, size, size].map(|number| number as f32);
        let time_ids =
            Tensor::new(&sizes, &self.runtime.device)?.broadcast_as((context.dim(0)?, N_SIZES))?.contiguous()?;
        let added = AddedConditions { text_embeds: Tensor::cat(&pooled, 0)?, time_ids };
        Ok(ImageConditions { context, added: Some(added) })
    }

    /// Mask and reference of every image in every branch, `[branches·b·n, 1 + c, h, w]`. The reference of a hidden image is
    /// zeros for the joint model, a masked picture for one for inpainting.
    fn channels(
        &self,
        shape: SetShape,
        known: Option<&Tensor>,
        branches: &[Branch],
        settings: &SampleSettings,
    ) -> Result<Tensor> {
        let c = self.unet.config().latent_channels();
        let (device, dtype) = (&self.runtime.device, self.runtime.dtype);
        let blank = match self.family {
            Family::Inpainting => self.masked_latents(settings)?.to_dtype(dtype)?, // [1, c, h, w]
            _ => Tensor::zeros((1, c, 1, 1), dtype, device)?,
        };
        let (_, _, h, w) = known.unwrap_or(&blank).dims4()?;
        let hidden = |images: usize| -> Result<Tensor> {
            let mask = Tensor::ones((shape.sets, images, 1, h, w), dtype, device)?;
            let blank = blank.unsqueeze(0)?.broadcast_as((shape.sets, images, c, h, w))?.contiguous()?;
            Ok(Tensor::cat(&[&mask, &blank], 2)?) // [b, images, 1 + c, h, w]
        };
        let mut channels = Vec::new();
        for branch in branches {
            let own = match known.filter(|_| branch.keeps_references) {
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
        Ok(Tensor::cat(&channels, 0)?)
    }
}

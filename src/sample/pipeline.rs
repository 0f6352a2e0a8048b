//! From references and prompts to pictures: text, latents, the guided walk with the replacement trick, pictures.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Tensor};
use image::RgbImage;

use super::noise::{BatchNoise, GivenNoise};
use crate::data::{images_from_tensor, tensor_from_images};
use crate::device::Runtime;
use crate::diffusion::{Branch, Guidance, NoiseSchedule, Sampler, ScheduleConfig};
use crate::invalid::invalid;
use crate::model::{Files, JointUnet, TextConfig, TextEncoder, Tokenizer, UnetConfig, Vae, VaeConfig};
use crate::shape::SetShape;

/// Latent pixels (images · branches · h · w) that go through the U-Net at once: two sets of one reference and one target
/// at 512².
const LATENT_PIXELS_A_BATCH: usize = 32_768;

/// A model ready to sample.
pub struct Pipeline {
    runtime: Runtime,
    unet: JointUnet,
    vae: Vae,
    text: TextEncoder,
    tokenizer: Tokenizer,
    schedule: NoiseSchedule,
}

/// A known picture of a set.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Square, of the size that is sampled.
    pub image: RgbImage,
    /// Empty: the null text.
    pub caption: String,
}

/// One set to paint: references first, then one picture a prompt.
#[derive(Clone, Debug)]
pub struct SetRequest {
    /// Known images, in this order.
    pub references: Vec<Reference>,
    /// One a new image.
    pub prompts: Vec<String>,
    /// One a prompt: a picture depends on its own seed, not on its batch (but for the rounding of large sums).
    pub seeds: Vec<u64>,
}

/// How pictures are sampled.
#[derive(Clone, Debug)]
pub struct SampleSettings {
    /// How one noise level follows another.
    pub sampler: Sampler,
    /// Network calls a picture.
    pub steps: usize,
    /// What the predictions are pushed towards.
    pub guidance: Guidance,
    /// Side of the pictures in pixels.
    pub size: usize,
}

/// The generated pictures of all sets, in the order of the requests.
pub struct Painted {
    /// The new pictures, in the order of the prompts.
    pub images: Vec<RgbImage>,
    /// As the U-Net left them, `[k, c, h, w]`.
    pub latents: Tensor,
}

impl Pipeline {
    /// Loads all parts. `is_coupled` false leaves every image's self-attention to itself.
    pub fn load(files: &Files, runtime: &Runtime, is_coupled: bool) -> Result<Self> {
        let params = |component| files.params(component, runtime, false);
        let unet_config: UnetConfig = files.json("unet/config.json")?;
        let vae_config: VaeConfig = files.json("vae/config.json")?;
        let text_config: TextConfig = files.json("text_encoder/config.json")?;
        let schedule: ScheduleConfig = files.json("scheduler/scheduler_config.json")?;
        let (unet, _) = JointUnet::new(&unet_config, params("unet")?)?;
        let c = unet_config.latent_channels();
        ensure!(
            unet_config.is_joint() || unet_config.in_channels == c,
            "{}: in_channels {} is neither {c} (Stable Diffusion) nor {} (joint: noisy, mask, reference)",
            files.describe("unet/config.json"),
            unet_config.in_channels,
            2 * c + 1
        );
        ensure!(
            vae_config.latent_channels == c && text_config.hidden_size == unet_config.cross_attention_dim,
            "{}: the parts do not fit: the VAE's latents have {} channels and the U-Net's {c}, the text encoder is {} wide \
             and the U-Net expects {}",
            files.describe("unet/config.json"),
            vae_config.latent_channels,
            text_config.hidden_size,
            unet_config.cross_attention_dim
        );
        Ok(Self {
            unet: if is_coupled { unet } else { unet.uncoupled() },
            vae: Vae::new(&vae_config, params("vae")?)?.0,
            text: TextEncoder::new(&text_config, params("text_encoder")?)?.0,
            tokenizer: Tokenizer::read(files, text_config.max_position_embeddings)?,
            schedule: NoiseSchedule::new(&schedule)?,
            runtime: runtime.clone(),
        })
    }

    /// Side of the pictures that the model was made for, in pixels.
    pub fn native_size(&self) -> usize {
        let f = self.vae.config().downscale();
        self.unet.config().sample_size.map_or(512, |latent| latent * f)
    }

    /// Side of a picture must be a multiple of this.
    pub fn size_multiple(&self) -> usize {
        self.vae.config().downscale() << (self.unet.config().block_out_channels.len() - 1)
    }

    /// What it reads prompts with.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Whether the U-Net takes references; a plain Stable Diffusion one sees them by coupled attention alone.
    pub fn is_joint(&self) -> bool {
        self.unet.config().is_joint()
    }

    /// Latents of a picture of `size` pixels: c, h, w.
    pub fn latent_shape(&self, size: usize) -> (usize, usize, usize) {
        let side = size / self.vae.config().downscale();
        (self.unet.config().latent_channels(), side, side)
    }

    /// Refuses a side that the networks cannot halve as often as they must.
    pub fn check_size(&self, size: usize) -> Result<()> {
        let multiple = self.size_multiple();
        if size > 0 && size.is_multiple_of(multiple) {
            return Ok(());
        }
        let near = (size / multiple).max(1) * multiple;
        Err(invalid(format!("--size {size}: this model takes multiples of {multiple} pixels, such as {near}")))
    }

    /// Paints sets of one shape. `on_step` hears of every step done, out of [`Pipeline::steps_of`]; its error ends the
    /// painting. `given` holds the noise of all targets of all requests, in their order.
    pub fn paint(
        &self,
        requests: &[SetRequest],
        settings: &SampleSettings,
        given: Option<&GivenNoise>,
        on_step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Painted> {
        let size = settings.size;
        self.check_size(size)?;
        let first = requests.first().context("nothing to paint: no set was asked for")?;
        let (n_references, n_targets) = (first.references.len(), first.prompts.len());
        if let Some(given) = given {
            let targets = requests.len() * n_targets;
            given.validate(targets, n_references, settings.steps, self.latent_shape(size))?;
        }
        let mut latents = Vec::new();
        let mut painted = 0;
        for batch in requests.chunks(self.sets_at_once(requests, settings)) {
            let own = given.map(|given| given.of_targets(painted, batch.len() * n_targets)).transpose()?;
            latents.push(self.paint_batch(batch, settings, own.as_ref(), on_step)?);
            painted += batch.len() * n_targets;
        }
        let latents = Tensor::cat(&latents, 0)?; // [k, c, h, w]
        Ok(Painted { images: self.decode(&latents, size)?, latents })
    }

    /// Pictures of `size` pixels through the VAE and back: as good as any picture that this model paints can be.
    pub fn reconstruct(&self, images: &[RgbImage], size: usize) -> Result<Vec<RgbImage>> {
        let mut seen = Vec::with_capacity(images.len());
        for some in images.chunks(Self::images_at_once(size)) {
            let pixels = tensor_from_images(some, &self.runtime.device)?.to_dtype(self.runtime.dtype)?;
            seen.extend(self.decode(&self.vae.latents_from_images(&pixels)?, size)?);
        }
        Ok(seen)
    }

    fn decode(&self, latents: &Tensor, size: usize) -> Result<Vec<RgbImage>> {
        let (k, at_once) = (latents.dim(0)?, Self::images_at_once(size));
        let mut images = Vec::with_capacity(k);
        for first in (0..k).step_by(at_once) {
            let some = latents.narrow(0, first, at_once.min(k - first))?.contiguous()?;
            images.extend(images_from_tensor(&self.vae.decode(&some.to_dtype(self.runtime.dtype)?)?)?);
        }
        Ok(images)
    }

    /// How many pictures of `size` pixels go through the VAE together.
    fn images_at_once(size: usize) -> usize {
        (64 * 64 * 64 / (size * size)).max(1)
    }

    /// Steps that [`Pipeline::paint`] will report.
    pub fn steps_of(&self, requests: &[SetRequest], settings: &SampleSettings) -> usize {
        requests.len().div_ceil(self.sets_at_once(requests, settings)) * settings.steps
    }

    /// How many of the sets go through the network together.
    pub fn sets_at_once(&self, requests: &[SetRequest], settings: &SampleSettings) -> usize {
        let images = requests.first().map_or(1, |set| set.references.len() + set.prompts.len());
        let side = settings.size / self.vae.config().downscale();
        (LATENT_PIXELS_A_BATCH / (images * settings.guidance.branches().len() * side * side).max(1)).max(1)
    }

    /// The final latents of the targets, `[b·targets, c, h, w]`.
    fn paint_batch(
        &self,
        sets: &[SetRequest],
        settings: &SampleSettings,
        given: Option<&GivenNoise>,
        on_step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Tensor> {
        let (device, dtype) = (&self.runtime.device, self.runtime.dtype);
        let (n_references, n_targets) = (sets[0].references.len(), sets[0].prompts.len());
        ensure!(
            sets.iter().all(|set| set.references.len() == n_references
                && set.prompts.len() == n_targets
                && set.seeds.len() == n_targets),
            "sets of one batch must have one shape"
        );
        let shape = SetShape::new(sets.len(), n_references + n_targets);
        let latent = self.latent_shape(settings.size);
        let seeds: Vec<&[u64]> = sets.iter().map(|set| set.seeds.as_slice()).collect();
        let noise = BatchNoise { seeds: &seeds, references: n_references, latent, given };

        let known = self.known(sets, shape, latent)?;
        let conditions = self.conditions(sets, shape, &known, settings.guidance.branches())?;
        let walk = settings.sampler.walk(&self.schedule, settings.steps)?;
        let mut x = noise.start(device)?; // [b·n, c, h, w]
        for (step, &timestep) in walk.timesteps().iter().enumerate() {
            if n_references > 0 {
                x = self.with_references(&x, &known, &noise.references_at(step, device)?, timestep, shape)?;
            }
            let predictions = self.predict(&x.to_dtype(dtype)?, timestep, &conditions, shape)?;
            x = walk.step(step, &x, &settings.guidance.combine(&predictions)?.to_dtype(DType::F32)?)?;
            on_step()?;
        }
        targets_of(&x, shape, n_references)
    }

    /// Clean latents of the references, `[b·references, c, h, w]`; None without references.
    fn known(&self, sets: &[SetRequest], shape: SetShape, (c, h, w): (usize, usize, usize)) -> Result<Option<Tensor>> {
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

    /// The replacement trick (§3.3): at every step the known images are their clean latents with fresh noise.
    fn with_references(
        &self,
        x: &Tensor,
        known: &Option<Tensor>,
        noise: &Tensor,
        timestep: usize,
        shape: SetShape,
    ) -> Result<Tensor> {
        let Some(known) = known else { return Ok(x.clone()) };
        let noisy = self.schedule.add_noise(known, noise, &vec![timestep; known.dim(0)?])?;
        let (_, c, h, w) = x.dims4()?;
        let n_references = known.dim(0)? / shape.sets;
        let noisy = noisy.reshape((shape.sets, n_references, c, h, w))?; // [b, references, c, h, w]
        let x = x.reshape((shape.sets, shape.images, c, h, w))?; // [b, n, c, h, w]
        let targets = x.narrow(1, n_references, shape.images - n_references)?;
        Ok(Tensor::cat(&[&noisy, &targets.contiguous()?], 1)?.reshape((shape.total(), c, h, w))?) // [b·n, c, h, w]
    }

    /// What every branch of every step is given besides x, all branches in one batch.
    fn conditions(
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

    /// One prediction a branch.
    fn predict(&self, x: &Tensor, timestep: usize, conditions: &Conditions, shape: SetShape) -> Result<Vec<Tensor>> {
        let x = Tensor::cat(&vec![x; conditions.branches], 0)?; // [branches·b·n, c, h, w]
        let input = match &conditions.channels {
            None => x,
            Some(channels) => {
                let (total, extra, ..) = channels.dims4()?;
                let (_, _, h, w) = x.dims4()?;
                Tensor::cat(&[&x, &channels.broadcast_as((total, extra, h, w))?.contiguous()?], 1)?
            }
        };
        let all = SetShape::new(conditions.branches * shape.sets, shape.images);
        let timesteps = Tensor::from_vec(vec![timestep as i64; all.sets], all.sets, &self.runtime.device)?;
        let output = self.unet.forward(&input, &timesteps, &conditions.context, all)?;
        Ok((0..conditions.branches)
            .map(|branch| output.narrow(0, branch * shape.total(), shape.total()))
            .collect::<candle_core::Result<_>>()?)
    }

    /// Text embeddings, each different text encoded once.
    ///
    /// # Shapes
    /// - b texts → `[b, l, d]`
    fn encode(&self, texts: &[&str]) -> Result<Tensor> {
        let mut rows: BTreeMap<&str, u32> = BTreeMap::new();
        let mut tokens = Vec::new();
        let mut picks = Vec::with_capacity(texts.len());
        for text in texts {
            let next = rows.len() as u32;
            let row = *rows.entry(text).or_insert(next);
            if row == next {
                tokens.push(self.tokenizer.encode(text)?.tokens);
            }
            picks.push(row);
        }
        let device = &self.runtime.device;
        let tokens = Tensor::from_vec(tokens.concat(), (rows.len(), tokens[0].len()), device)?;
        let picks = Tensor::from_vec(picks, texts.len(), device)?;
        Ok(self.text.forward(&tokens)?.index_select(&picks, 0)?)
    }
}

struct Conditions {
    /// `[branches·b·n, l, d]`.
    context: Tensor,
    /// Mask and reference, `[branches·b·n, 1 + c, h, w]`; None for a U-Net without them.
    channels: Option<Tensor>,
    branches: usize,
}

/// # Shapes
/// - x `[b·n, c, h, w]` → `[b·targets, c, h, w]`
fn targets_of(x: &Tensor, shape: SetShape, n_references: usize) -> Result<Tensor> {
    let (_, c, h, w) = x.dims4()?;
    let n_targets = shape.images - n_references;
    let x = x.reshape((shape.sets, shape.images, c, h, w))?.narrow(1, n_references, n_targets)?;
    Ok(x.contiguous()?.reshape((shape.sets * n_targets, c, h, w))?) // [b·targets, c, h, w]
}

//! Objective `joint`: denoise the images of a set together, some of them given as references (§3.2, §4).

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};

use super::conditions::SetConditions;
use super::data_check::{Pictures, check_sets};
use super::latents::LatentCache;
use super::objective::{Objective, Weights, component, frozen, merge};
use super::settings::{JointConfig, TrainConfig};
use super::start::UnetStart;
use crate::data::{Loader, LoaderSettings, SetSource};
use crate::device::Runtime;
use crate::diffusion::{NoiseSchedule, ScheduleConfig, mse};
use crate::invalid::invalid;
use crate::model::family::has_two_text_encoders;
use crate::model::fingerprint::fingerprint;
use crate::model::params::{NamedVars, Params};
use crate::model::write::{copy_tokenizer, write_component, write_json, write_model_index};
use crate::model::{Files, JointUnet, TextConfig, TextEncoder, Tokenizer, UnetConfig, Vae, VaeConfig};
use crate::rng::Rng;
use crate::shape::SetShape;

/// Sets of the validation loss, and images in each.
const VALIDATION: SetShape = SetShape { sets: 32, images: 3 };

/// Trains U-Net and text encoder on the latents of sets.
pub struct JointObjective {
    settings: JointConfig,
    seed: u64,
    runtime: Runtime,
    architecture: Files,
    vae_files: Files,
    vae_hash: String,
    unet_config: UnetConfig,
    text_config: TextConfig,
    schedule: NoiseSchedule,
    unet: JointUnet,
    text: TextEncoder,
    vars: NamedVars,
    loader: Loader,
    latents: LatentCache,
    validation: Batch,
    notices: Vec<String>,
}

/// What a loss is computed from, on the host.
struct Batch {
    shape: SetShape,
    /// `[b·n, c, h, w]`.
    clean: Tensor,
    noise: Tensor,
    /// One an image: true hides its reference.
    masked: Vec<bool>,
    /// One a set.
    timesteps: Vec<usize>,
    /// One an image.
    tokens: Vec<Vec<u32>>,
}

impl JointObjective {
    /// Builds the networks, fresh or from `model.start_from`, reads the VAE and looks through the data.
    pub fn new(
        config: &TrainConfig,
        runtime: &Runtime,
        source: Arc<dyn SetSource>,
        validation: Arc<dyn SetSource>,
    ) -> Result<Self> {
        let architecture = Files::Folder(config.model.architecture.clone());
        let unet_config: UnetConfig = architecture.json("unet/config.json")?;
        if unet_config.takes_added_conditions() || has_two_text_encoders(&architecture)? {
            return Err(invalid(format!(
                "model.architecture: {}: is Stable Diffusion XL's, two text encoders and size embeddings, which jedi samples \
                 but does not train; name one like Stable Diffusion 1 or 2",
                config.model.architecture.display()
            )));
        }
        let text_config: TextConfig = architecture.json("text_encoder/config.json")?;
        ensure!(
            unet_config.is_joint() && unet_config.cross_attention_dim == text_config.hidden_size,
            "model.architecture: a joint U-Net has 2·out_channels + 1 inputs and the text encoder's width; this one has \
             {} inputs, {} outputs and width {} for a text encoder of {}",
            unet_config.in_channels,
            unet_config.out_channels,
            unet_config.cross_attention_dim,
            text_config.hidden_size
        );
        let fresh = |seed| Params::random(seed, &runtime.device, DType::F32);
        let (unet_start, text_params) = match &config.model.start_from {
            None => (UnetStart { params: fresh(config.seed), notice: None }, fresh(config.seed ^ 1)),
            Some(folder) => (
                UnetStart::from_folder(folder, &unet_config, runtime)?,
                Files::Folder(folder.clone()).params("text_encoder", runtime, true)?,
            ),
        };
        let (unet, unet_vars) = JointUnet::new(&unet_config, unet_start.params)?;
        let unet = if config.run.gradient_checkpointing { unet.checkpointed() } else { unet };
        let (text, text_vars) = TextEncoder::new(&text_config, text_params)?;
        let mut vars = NamedVars::new();
        merge(&mut vars, "unet", unet_vars);
        merge(&mut vars, "text_encoder", text_vars);

        let vae_folder = config.model.vae.clone();
        let vae_folder =
            vae_folder.ok_or_else(|| invalid("model.vae: missing; the joint objective needs a trained VAE"))?;
        let vae_files = Files::Folder(vae_folder);
        let vae_config: VaeConfig = vae_files.json("vae/config.json")?;
        let (vae_tensors, origin) = vae_files.tensors("vae")?;
        let vae_hash = fingerprint(&vae_config, &vae_tensors)?;
        let vae_params = Params::checkpoint(vae_tensors, origin, &runtime.device, runtime.dtype, false);
        let (vae, _) = Vae::new(&vae_config, vae_params)?;
        ensure!(
            vae_config.latent_channels == unet_config.latent_channels(),
            "model.vae: its latents have {} channels, the U-Net wants {}",
            vae_config.latent_channels,
            unet_config.latent_channels()
        );
        let tokenizer = Arc::new(Tokenizer::read(&architecture, text_config.max_position_embeddings)?);
        let vae = Arc::new(vae);
        let max_gb = config.joint.latent_cache_gb;
        let cache = |source| LatentCache::new(source, &vae, &tokenizer, &runtime.device, max_gb);
        let schedule: ScheduleConfig = architecture.json("scheduler/scheduler_config.json")?;
        let schedule = NoiseSchedule::new(&schedule)?;
        let validation = validation_batch(&mut cache(validation), &schedule, config.seed)?;
        let loader = LoaderSettings {
            seed: config.seed,
            images_per_step: config.run.images_per_step,
            set_sizes: config.joint.set_sizes.clone(),
        };
        let loader = Loader::new(loader, source.n_sets())?;
        let n_needed = config.joint.set_sizes.iter().copied().max().unwrap_or(1);
        let cuts = check_sets(source.as_ref(), Pictures::AtLeast(n_needed), Some(&tokenizer))?;
        Ok(Self {
            settings: config.joint.clone(),
            seed: config.seed,
            runtime: runtime.clone(),
            architecture,
            vae_files,
            vae_hash,
            unet_config,
            text_config,
            schedule,
            unet,
            text,
            vars,
            loader,
            latents: cache(source),
            validation,
            notices: unet_start.notice.into_iter().chain(cuts).collect(),
        })
    }

    fn batch(&mut self, step: u64) -> Result<Batch> {
        let plan = self.loader.plan(step);
        let shape = plan.shape;
        let mut rng = Rng::new(self.seed, "conditions", step);
        let (mut clean, mut tokens, mut masked) = (Vec::new(), Vec::new(), Vec::new());
        let mut timesteps = Vec::with_capacity(shape.sets);
        let empty = self.latents.empty_tokens()?;
        let train_steps = self.schedule.train_steps();
        for set_idx in plan.set_idxs {
            let set = self.latents.get(set_idx)?;
            ensure!(
                set.latents.len() >= shape.images,
                "set number {set_idx}: holds {} pictures, joint.set_sizes asks for {}",
                set.latents.len(),
                shape.images
            );
            let conditions =
                SetConditions::draw(&mut rng, &self.settings, train_steps, set.latents.len(), shape.images);
            timesteps.push(conditions.timestep);
            for image in conditions.images {
                clean.push(set.latents[image.picture].clone());
                masked.push(image.is_masked);
                tokens.push(match image.is_caption_dropped {
                    true => empty.clone(),
                    false => set.tokens[image.picture].clone(),
                });
            }
        }
        let clean = Tensor::stack(&clean, 0)?; // [b·n, c, h, w]
        let noise = Rng::new(self.seed, "training noise", step).normal_tensor(clean.dims())?;
        Ok(Batch { shape, clean, noise, masked, timesteps, tokens })
    }
}

/// Equation 2: mean squared error of the predicted noise (or velocity, where the schedule says so) over all images of all
/// sets.
fn loss_of(
    unet: &JointUnet,
    text: &TextEncoder,
    schedule: &NoiseSchedule,
    batch: &Batch,
    device: &Device,
) -> Result<Tensor> {
    let shape = batch.shape;
    let per_image: Vec<usize> = batch.timesteps.iter().flat_map(|&t| std::iter::repeat_n(t, shape.images)).collect();
    let noisy = schedule.add_noise(&batch.clean, &batch.noise, &per_image)?;
    let (_, _, h, w) = batch.clean.dims4()?;
    let masked: Vec<f32> = batch.masked.iter().map(|&masked| f32::from(masked)).collect();
    let mask = Tensor::from_vec(masked, (shape.total(), 1, 1, 1), &Device::Cpu)?;
    let reference = batch.clean.broadcast_mul(&(1.0 - &mask)?)?;
    let mask = mask.broadcast_as((shape.total(), 1, h, w))?;
    let input = Tensor::cat(&[&noisy, &mask.contiguous()?, &reference], 1)?; // [b·n, 2c+1, h, w]
    let tokens: Vec<u32> = batch.tokens.concat();
    let tokens = Tensor::from_vec(tokens, (shape.total(), batch.tokens[0].len()), device)?;
    let timesteps: Vec<i64> = batch.timesteps.iter().map(|&t| t as i64).collect();
    let timesteps = Tensor::from_vec(timesteps, shape.sets, device)?;
    let context = text.forward(&tokens)?;
    let prediction = unet.forward(&input.to_device(device)?, &timesteps, &context, shape)?;
    let target = schedule.target(&batch.clean, &batch.noise, &per_image)?;
    Ok(mse(&prediction, &target.to_device(device)?)?)
}

/// Held-out sets with the first image given, at timesteps spread evenly.
fn validation_batch(cache: &mut LatentCache, schedule: &NoiseSchedule, seed: u64) -> Result<Batch> {
    let shape = SetShape { sets: VALIDATION.sets.min(cache.n_sets()), ..VALIDATION };
    let (mut clean, mut tokens) = (Vec::new(), Vec::new());
    for set_idx in 0..shape.sets {
        let set = cache.get(set_idx)?;
        ensure!(set.latents.len() >= shape.images, "validation sets need {} pictures", shape.images);
        clean.extend_from_slice(&set.latents[..shape.images]);
        tokens.extend_from_slice(&set.tokens[..shape.images]);
    }
    let clean = Tensor::stack(&clean, 0)?; // [b·n, c, h, w]
    let noise = Rng::new(seed, "validation noise", 0).normal_tensor(clean.dims())?;
    let timesteps = (0..shape.sets).map(|i| (2 * i + 1) * schedule.train_steps() / (2 * shape.sets)).collect();
    let masked = (0..shape.total()).map(|i| i % shape.images != 0).collect();
    Ok(Batch { shape, clean, noise, masked, timesteps, tokens })
}

impl Objective for JointObjective {
    fn parameters(&self) -> &NamedVars {
        &self.vars
    }

    fn notices(&self) -> &[String] {
        &self.notices
    }

    fn vae_hash(&self) -> Option<&str> {
        Some(&self.vae_hash)
    }

    fn loss(&mut self, step: u64) -> Result<Tensor> {
        let batch = self.batch(step)?;
        loss_of(&self.unet, &self.text, &self.schedule, &batch, &self.runtime.device)
    }

    fn validate(&mut self, weights: &Weights) -> Result<f64> {
        let device = &self.runtime.device;
        let (unet, _) = JointUnet::new(&self.unet_config, frozen(weights, "unet", device))?;
        let (text, _) = TextEncoder::new(&self.text_config, frozen(weights, "text_encoder", device))?;
        Ok(loss_of(&unet, &text, &self.schedule, &self.validation, device)?.to_scalar::<f32>()? as f64)
    }

    /// A whole pipeline: the trained networks, and VAE, tokenizer and schedule as they were given.
    fn write(&self, folder: &Path, weights: &Weights) -> Result<()> {
        write_component(folder, "unet", &self.unet_config, &component(weights, "unet"))?;
        write_component(folder, "text_encoder", &self.text_config, &component(weights, "text_encoder"))?;
        let vae_config: serde_json::Value = self.vae_files.json("vae/config.json")?;
        write_component(folder, "vae", &vae_config, &self.vae_files.tensors("vae")?.0)?;
        copy_tokenizer(&self.architecture, folder)?;
        write_json(&folder.join("scheduler/scheduler_config.json"), self.schedule.config())?;
        write_model_index(folder)
    }
}

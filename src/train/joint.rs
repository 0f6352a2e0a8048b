//! Objective `joint`: denoise the images of a set together, some of them given as references (§3.2, §4).

use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};

use super::batch::{Batch, Denoiser};
use super::conditions::SetConditions;
use super::data_check::{Pictures, check_masks, check_mixture, n_images_of_first};
use super::held_out::{HeldOut, PartLoss};
use super::latents::{Encoder, LatentCache};
use super::lora::{LoraConfig, prepare};
use super::objective::{ModelWriter, Objective, Weights, component, frozen, merge};
use super::patterns::check_freeze;
use super::plan::{Footprint, total_bytes};
use super::settings::{ComputeDtype, JointConfig, TrainConfig};
use super::share::set_rng;
use super::shared_feed::SharedFeed;
use super::start::UnetStart;
use super::texts::TextCache;
use crate::data::{Feed, FeedSettings, Mixture, SetSource, Store};
use crate::device::Runtime;
use crate::diffusion::{NoiseSchedule, ScheduleConfig};
use crate::invalid::invalid;
use crate::model::family::has_two_text_encoders;
use crate::model::fingerprint::fingerprint;
use crate::model::params::{NamedVars, Params};
use crate::model::write::{copy_tokenizer, write_component, write_json, write_model_index};
use crate::model::{Files, JointUnet, TextConfig, TextEncoder, Tokenizer, UnetConfig, Vae, VaeConfig};
use crate::sha256::sha256_hex;
use crate::shape::SetShape;

/// Trains U-Net and text encoder on the latents of sets.
pub struct JointObjective {
    settings: JointConfig,
    lora: LoraConfig,
    seed: u64,
    runtime: Runtime,
    /// What U-Net and text encoder compute in.
    dtype: DType,
    architecture: Files,
    /// Side of the pictures in pixels.
    size: u32,
    vae_bytes: u64,
    /// Most of the first sets of all sources.
    pictures_per_set: usize,
    vae_files: Files,
    vae_hash: String,
    unet_config: UnetConfig,
    text_config: TextConfig,
    schedule: NoiseSchedule,
    unet: JointUnet,
    text: TextEncoder,
    vars: NamedVars,
    /// What is built and written, but not trained.
    frozen: Weights,
    fed: SharedFeed,
    latents: LatentCache,
    /// None where the text encoder is trained, or there is no cache.
    texts: Option<TextCache>,
    held_out: HeldOut,
    /// Of the last validation.
    held_out_parts: Vec<PartLoss>,
    notices: Vec<String>,
}

impl JointObjective {
    /// Builds the networks, fresh or from `model.start_from`, reads the VAE and looks through the data.
    pub fn new(
        config: &TrainConfig,
        runtime: &Runtime,
        sources: impl Into<Mixture>,
        validation: Vec<(String, Arc<dyn SetSource>)>,
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
        if config.run.dtype == ComputeDtype::Bf16 && runtime.device.is_cpu() {
            return Err(invalid(
                "run.dtype: bf16 is for GPUs; on the CPU make it f32, and run.matmul_precision = \"medium\" gives products of \
                 bf16 factors where there is AMX",
            ));
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
        let unet_params = prepare(config, unet_start.params, "unet");
        let text_params = prepare(config, text_params, "text_encoder");
        let (unet, unet_vars) = JointUnet::new(&unet_config, unet_params.clone())?;
        let unet = if config.run.gradient_checkpointing { unet.checkpointed() } else { unet };
        let (text, text_vars) = TextEncoder::new(&text_config, text_params.clone())?;
        let dtype = DType::from(config.run.dtype);
        let (mut vars, mut frozen) = (NamedVars::new(), Weights::new());
        for (component, own, params) in [("unet", unet_vars, unet_params), ("text_encoder", text_vars, text_params)] {
            merge(&mut vars, component, own);
            merge(&mut frozen, component, params.frozen());
        }
        config.lora.check(&vars)?;
        check_freeze(&config.model.freeze, &vars, &frozen)?;

        let vae_folder = config.model.vae.clone();
        let vae_folder =
            vae_folder.ok_or_else(|| invalid("model.vae: missing; the joint objective needs a trained VAE"))?;
        let vae_files = Files::Folder(vae_folder);
        let vae_config: VaeConfig = vae_files.json("vae/config.json")?;
        let (vae_tensors, origin) = vae_files.tensors("vae")?;
        let vae_hash = fingerprint(&vae_config, &vae_tensors)?;
        let vae_values: usize = vae_tensors.values().map(Tensor::elem_count).sum();
        let vae_bytes = (vae_values * runtime.dtype.size_in_bytes()) as u64;
        let vae_params = Params::checkpoint(vae_tensors, origin, &runtime.device, runtime.dtype, false);
        let (vae, _) = Vae::new(&vae_config, vae_params)?;
        ensure!(
            vae_config.latent_channels == unet_config.latent_channels(),
            "model.vae: its latents have {} channels, the U-Net wants {}",
            vae_config.latent_channels,
            unet_config.latent_channels()
        );
        let tokenizer = Tokenizer::read(&architecture, text_config.max_position_embeddings)?;
        let mixture: Mixture = sources.into();
        let sizes = &config.joint.set_sizes;
        let checked = check_mixture(&mixture, |mixed| Pictures::of(mixed.set_sizes(sizes)), Some(&tokenizer))?;
        let encoder = Encoder { vae, tokenizer, device: runtime.device.clone() };
        let schedule: ScheduleConfig = architecture.json("scheduler/scheduler_config.json")?;
        let schedule = NoiseSchedule::new(&schedule)?;
        let images_at_once = match config.run.micro_batch {
            0 => config.run.images_per_step,
            images => images,
        };
        let held_out = HeldOut::new(&encoder, &validation, &schedule, config.seed, images_at_once)?;
        let mut pictures_per_set = 1;
        for mixed in &mixture.sources {
            pictures_per_set = pictures_per_set.max(n_images_of_first(mixed.source.as_ref())?);
        }
        if config.joint.weighs_subjects() {
            check_masks(&mixture)?;
        }
        let loader = mixture.loader(config.seed, config.run.images_per_step, sizes)?;
        let store = |name: &str, encoder: &str| -> Result<Option<Arc<Store>>> {
            let Some(folder) = &config.data.cache else { return Ok(None) };
            let max_bytes = (config.data.cache_gb * 1e9) as u64;
            Ok(Some(Arc::new(Store::open(&folder.join(name), encoder, max_bytes, mixture.warn.clone())?)))
        };
        // In bf16 the VAE gives other latents.
        let precise = runtime.dtype == DType::F32;
        let encoder_hash =
            if precise { vae_hash.clone() } else { sha256_hex(format!("{vae_hash} {:?}", runtime.dtype).as_bytes()) };
        let latents = LatentCache::new(encoder, config.joint.latent_cache_gb, store("latents", &encoder_hash)?);
        let is_text_trained = vars.keys().any(|name| name.starts_with("text_encoder."));
        let texts = if is_text_trained || config.data.cache.is_none() {
            None
        } else {
            store("texts", &fingerprint(&text_config, &component(&frozen, "text_encoder"))?)?.map(TextCache::new)
        };
        // What a cache keeps is f32.
        let text = if texts.is_some() { text } else { text.computing_in(dtype) };
        let feed = FeedSettings { seed: config.seed, size: config.data.size, masks: config.joint.weighs_subjects() };
        let feed = Feed::new(mixture, loader, feed, latents.known());
        Ok(Self {
            settings: config.joint.clone(),
            lora: config.lora.clone(),
            seed: config.seed,
            runtime: runtime.clone(),
            dtype,
            architecture,
            size: config.data.size,
            vae_bytes,
            pictures_per_set,
            vae_files,
            vae_hash,
            unet_config,
            text_config,
            schedule,
            unet,
            text,
            vars,
            frozen,
            fed: SharedFeed::new(feed),
            latents,
            texts,
            held_out,
            held_out_parts: vec![],
            notices: unet_start.notice.into_iter().chain(checked).collect(),
        })
    }

    /// The share's sets of the step, and how many the step has.
    fn batch(&mut self, step: u64) -> Result<(Batch, usize)> {
        let whole = self.fed.shape(step);
        let (own, sets) = self.fed.sets(step)?;
        let shape = SetShape { sets: own.len(), ..whole };
        let (mut clean, mut tokens, mut masked, mut weights) = (vec![], vec![], vec![], vec![]);
        let (mut timesteps, mut noise) = (Vec::with_capacity(shape.sets), Vec::with_capacity(shape.sets));
        let empty = self.latents.encoder().empty_tokens()?;
        let train_steps = self.schedule.train_steps();
        for (position, fed) in own.zip(sets) {
            let set = self.latents.encoded(self.fed.feed(), fed, shape.images)?;
            let mut rng = set_rng(self.seed, "conditions", step, position);
            let conditions =
                SetConditions::draw(&mut rng, &self.settings, train_steps, set.latents.len(), shape.images);
            let set_dims = [&[shape.images], set.latents[0].dims()].concat();
            noise.push(self.settings.noise(&mut set_rng(self.seed, "training noise", step, position), &set_dims)?);
            timesteps.push(conditions.timestep);
            for image in conditions.images {
                clean.push(set.latents[image.picture].clone());
                masked.push(image.is_masked);
                if self.settings.weighs_subjects() {
                    weights.push(self.settings.weights(set, image.picture)?);
                }
                tokens.push(match image.is_caption_dropped {
                    true => empty.clone(),
                    false => set.tokens[image.picture].clone(),
                });
            }
        }
        let clean = Tensor::stack(&clean, 0)?; // [b·n, c, h, w]
        let noise = Tensor::cat(&noise, 0)?; // [b·n, c, h, w]
        let weights = (!weights.is_empty()).then(|| Tensor::stack(&weights, 0)).transpose()?; // [b·n, 1, h, w]
        let texts = self.texts.as_mut();
        let context = texts.map(|texts| texts.context(&self.text, &tokens, &self.runtime.device)).transpose()?;
        Ok((Batch { shape, clean, noise, weights, masked, timesteps, tokens, context }, whole.sets))
    }

    fn denoiser(&self) -> Denoiser<'_> {
        let Self { unet, text, schedule, runtime, .. } = self;
        Denoiser { unet, text, schedule, device: &runtime.device, dtype: self.dtype }
    }

    /// The networks' weights: what is trained, and what is not.
    fn all(&self, weights: &Weights) -> Result<Weights> {
        let all = self.frozen.iter().chain(weights);
        let mut all = all.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
        self.lora.merge(&mut all)?;
        Ok(all)
    }
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

    fn fed(&self) -> &SharedFeed {
        &self.fed
    }

    fn fed_mut(&mut self) -> &mut SharedFeed {
        &mut self.fed
    }

    fn loss(&mut self, step: u64) -> Result<Tensor> {
        let (batch, sets) = self.batch(step)?;
        self.fed.share().weighted(self.denoiser().loss(&batch, self.settings.min_snr_gamma)?, sets)
    }

    fn footprint(&self) -> Footprint {
        let pixels = self.size as usize;
        let downscale = self.latents.encoder().vae.config().downscale();
        let side = pixels / downscale;
        Footprint {
            untrained_bytes: self.vae_bytes + total_bytes(self.frozen.values()),
            cache_bytes: {
                let latents = self.unet_config.latent_channels() * side * side;
                let set = self.pictures_per_set * (latents + self.text_config.max_position_embeddings);
                (self.fed.feed().mixture().n_kept() * set as u64 * 4).min((self.settings.latent_cache_gb * 1e9) as u64)
            },
            n_sets: self.fed.feed().mixture().n_sets(),
            images: self.fed.feed().most_images(),
            side,
            smallest_side: 1 << (self.unet_config.block_out_channels.len() - 1),
            preparation: Some((pixels, downscale)),
        }
    }

    fn trial_loss(&self, sets: usize, side: usize) -> Result<Tensor> {
        let shape = SetShape { sets, images: self.footprint().images };
        let dims = (shape.total(), self.unet_config.latent_channels(), side, side);
        let clean = Tensor::zeros(dims, DType::F32, &Device::Cpu)?;
        let noise = clean.clone();
        let tokens = vec![vec![0; self.text_config.max_position_embeddings]; shape.total()];
        let (masked, timesteps) = (vec![true; shape.total()], vec![0; sets]);
        let batch = Batch { shape, clean, noise, weights: None, masked, timesteps, tokens, context: None };
        self.denoiser().loss(&batch, self.settings.min_snr_gamma)
    }

    fn trial_preparation(&self, side_px: usize) -> Result<()> {
        let dims = (self.pictures_per_set, 3, side_px, side_px);
        let pictures = Tensor::zeros(dims, DType::F32, &self.runtime.device)?;
        self.latents.encoder().vae.latents_from_images(&pictures)?;
        Ok(())
    }

    fn validate(&mut self, weights: &Weights) -> Result<f64> {
        let (device, weights) = (&self.runtime.device, self.all(weights)?);
        let (unet, _) = JointUnet::new(&self.unet_config, frozen(&weights, "unet", device))?;
        let (text, _) = TextEncoder::new(&self.text_config, frozen(&weights, "text_encoder", device))?;
        let denoiser = Denoiser { unet: &unet, text: &text.computing_in(self.dtype), ..self.denoiser() };
        let (loss, parts) = self.held_out.losses(denoiser, self.fed.share())?;
        self.held_out_parts = parts;
        Ok(loss)
    }

    fn held_out_parts(&self) -> &[PartLoss] {
        &self.held_out_parts
    }

    /// A whole pipeline: the trained networks, and VAE, tokenizer and schedule as they were given.
    fn writer(&self) -> Result<ModelWriter> {
        let (unet, text, schedule) =
            (self.unet_config.clone(), self.text_config.clone(), self.schedule.config().clone());
        let (architecture, vae) = (self.architecture.clone(), self.vae_files.clone());
        let (lora, frozen) = (self.lora.clone(), self.frozen.clone());
        Ok(Box::new(move |folder, weights| {
            lora.write(folder, weights)?;
            let mut all = frozen.into_iter().chain(weights.clone()).collect();
            lora.merge(&mut all)?;
            let weights = &all;
            write_component(folder, "unet", &unet, &component(weights, "unet"))?;
            write_component(folder, "text_encoder", &text, &component(weights, "text_encoder"))?;
            let vae_config: serde_json::Value = vae.json("vae/config.json")?;
            write_component(folder, "vae", &vae_config, &vae.tensors("vae")?.0)?;
            copy_tokenizer(&architecture, folder)?;
            write_json(&folder.join("scheduler/scheduler_config.json"), &schedule)?;
            write_model_index(folder)
        }))
    }
}

//! Objective `autoencoder`: a small VAE that keeps outlines, with latents near the standard normal.

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};

use super::data_check::{Pictures, check_mixture, n_images_of_first};
use super::objective::{ModelWriter, Objective, Weights, component, frozen, merge};
use super::patterns::{check_freeze, freeze};
use super::plan::{Footprint, total_bytes};
use super::settings::{AutoencoderConfig, TrainConfig};
use super::share::set_rng;
use super::shared_feed::SharedFeed;
use super::whitening::whitened;
use crate::data::{Feed, FeedSettings, Mixture, NothingKnown, SetSource, tensor_from_images};
use crate::device::Runtime;
use crate::model::params::{NamedVars, Params};
use crate::model::vae::Moments;
use crate::model::write::write_component;
use crate::model::{Files, Vae, VaeConfig};
use crate::ops;

/// Pictures of the validation loss.
const VALIDATION_IMAGES: usize = 64;

/// Trains a VAE on the pictures of a source.
pub struct AutoencoderObjective {
    settings: AutoencoderConfig,
    seed: u64,
    runtime: Runtime,
    config: VaeConfig,
    vae: Vae,
    vars: NamedVars,
    /// What is built and written, but not trained.
    frozen: Weights,
    fed: SharedFeed,
    /// Side of the pictures in pixels.
    size: u32,
    validation: Tensor,
    notices: Vec<String>,
}

impl AutoencoderObjective {
    /// Builds the VAE, fresh or from `model.start_from`, and looks through the data.
    pub fn new(
        config: &TrainConfig,
        runtime: &Runtime,
        sources: impl Into<Mixture>,
        validation: &dyn SetSource,
    ) -> Result<Self> {
        let architecture = Files::Folder(config.model.architecture.clone());
        let vae_config: VaeConfig = architecture.json("vae/config.json")?;
        let params = match &config.model.start_from {
            None => Params::random(config.seed, &runtime.device, DType::F32),
            Some(folder) => Files::Folder(folder.clone()).params("vae", runtime, true)?,
        };
        let params = freeze(params, "vae", &config.model.freeze);
        let (vae, own) = Vae::new(&vae_config, params.clone())?;
        if config.model.start_from.is_none() && own.contains_key("quant_conv.bias") {
            quieten(&own, vae_config.latent_channels)?;
        }
        let (mut vars, mut frozen) = (NamedVars::new(), Weights::new());
        merge(&mut vars, "vae", own);
        merge(&mut frozen, "vae", params.frozen());
        check_freeze(&config.model.freeze, &vars, &frozen)?;
        let mut mixture: Mixture = sources.into();
        for mixed in mixture.sources.iter_mut().filter(|mixed| mixed.set_sizes.is_none()) {
            mixed.set_sizes = Some(vec![n_images_of_first(mixed.source.as_ref())?]);
        }
        let notices = check_mixture(&mixture, |mixed| Pictures::of(mixed.set_sizes(&[])), None)?;
        let loader = mixture.loader(config.seed, config.run.images_per_step, &[])?;
        let settings = FeedSettings { seed: config.seed, size: config.data.size, masks: false };
        let feed = Feed::new(mixture, loader, settings, NothingKnown);
        let mut held_out = Vec::new();
        for set_idx in 0..validation.n_sets() {
            if held_out.len() >= VALIDATION_IMAGES {
                break;
            }
            held_out.extend(validation.read(set_idx)?.images);
        }
        held_out.truncate(VALIDATION_IMAGES);
        Ok(Self {
            settings: config.autoencoder.clone(),
            seed: config.seed,
            runtime: runtime.clone(),
            config: vae_config,
            vae,
            vars,
            frozen,
            fed: SharedFeed::new(feed),
            size: config.data.size,
            notices,
            validation: tensor_from_images(&held_out, &runtime.device)?,
        })
    }

    /// Squared error, absolute error of pixels and of edges (for outlines), and KL.
    fn loss_of(&self, images: &Tensor, decoded: &Tensor, moments: &Moments) -> Result<Tensor> {
        let difference = ops::sub(decoded, images)?;
        let absolute = |x: &Tensor| ops::mean_all(&ops::abs(x)?);
        let edges = |dim: usize| {
            let inner = difference.dim(dim)? - 1;
            let [next, this] = [1, 0].map(|first| ops::narrow(&difference, dim, first, inner));
            absolute(&ops::sub(&next?, &this?)?)
        };
        let outlines = ops::add(&absolute(&difference)?, &ops::add(&edges(2)?, &edges(3)?)?)?;
        let moved = ops::add(&ops::square(&moments.mean)?, &ops::exp(&moments.logvar)?)?;
        let kl = ops::affine(&ops::mean_all(&ops::sub(&moved, &moments.logvar)?)?, 1.0, -1.0)?; // 2·KL a latent
        let squared = ops::mean_all(&ops::square(&difference)?)?;
        let loss = ops::add(&squared, &ops::affine(&outlines, self.settings.outline_weight, 0.0)?)?;
        Ok(ops::add(&loss, &ops::affine(&kl, 0.5 * self.settings.kl_weight, 0.0)?)?)
    }
}

/// Starts the log-variance of fresh latents at −6: with the usual 0 their noise drowns the means for hundreds of steps, in
/// which nothing but the average colour is learnt.
fn quieten(parameters: &NamedVars, latent_channels: usize) -> Result<()> {
    let bias = parameters.get("quant_conv.bias").context("the VAE has no quant_conv.bias")?;
    let mean = bias.as_detached_tensor().narrow(0, 0, latent_channels)?;
    let logvar = mean.ones_like()?.affine(-6.0, 0.0)?;
    Ok(bias.set(&Tensor::cat(&[&mean, &logvar], 0)?)?)
}

impl Objective for AutoencoderObjective {
    fn parameters(&self) -> &NamedVars {
        &self.vars
    }

    fn notices(&self) -> &[String] {
        &self.notices
    }

    fn fed(&self) -> &SharedFeed {
        &self.fed
    }

    fn fed_mut(&mut self) -> &mut SharedFeed {
        &mut self.fed
    }

    fn loss(&mut self, step: u64) -> Result<Tensor> {
        let shape = self.fed.shape(step);
        let (own, sets) = self.fed.sets(step)?;
        let mut images = Vec::with_capacity(own.len() * shape.images);
        for set in sets.into_iter().filter_map(|fed| fed.set) {
            images.extend(set.images.into_iter().flatten().take(shape.images));
        }
        let images = tensor_from_images(&images, &self.runtime.device)?;
        let moments = self.vae.encode(&images)?;
        let set_dims = [&[shape.images], &moments.mean.dims()[1..]].concat();
        let noise = own.map(|set| set_rng(self.seed, "latent noise", step, set).normal_tensor(&set_dims));
        let noise = Tensor::cat(&noise.collect::<candle_core::Result<Vec<_>>>()?, 0)?; // [b·n, c, h, w]
        let deviation = ops::exp(&ops::affine(&moments.logvar, 0.5, 0.0)?)?;
        let latents = ops::add(&moments.mean, &ops::mul(&deviation, &noise.to_device(&self.runtime.device)?)?)?;
        let loss = self.loss_of(&images, &self.vae.decode_unscaled(&latents)?, &moments)?;
        self.fed.share().weighted(loss, shape.sets)
    }

    fn footprint(&self) -> Footprint {
        Footprint {
            untrained_bytes: total_bytes(self.frozen.values()),
            cache_bytes: 0,
            n_sets: self.fed.feed().mixture().n_sets(),
            images: self.fed.feed().most_images(),
            side: self.size as usize,
            smallest_side: self.config.downscale(),
            preparation: None,
        }
    }

    fn trial_loss(&self, sets: usize, side: usize) -> Result<Tensor> {
        let dims = (sets * self.fed.feed().most_images(), 3, side, side);
        let images = Tensor::zeros(dims, DType::F32, &self.runtime.device)?;
        let moments = self.vae.encode(&images)?;
        let deviation = ops::exp(&ops::affine(&moments.logvar, 0.5, 0.0)?)?;
        let latents = ops::add(&moments.mean, &ops::mul(&deviation, &moments.mean.detach())?)?;
        let decoded = self.vae.decode_unscaled(&latents)?;
        self.loss_of(&images, &decoded, &moments)
    }

    fn validate(&mut self, weights: &Weights) -> Result<f64> {
        let n_images = self.validation.dim(0)?;
        let own = self.fed.share().range(n_images);
        if own.is_empty() {
            return Ok(0.0);
        }
        let images = self.validation.narrow(0, own.start, own.len())?;
        let weights = self.frozen.clone().into_iter().chain(weights.clone()).collect();
        let (vae, _) = Vae::new(&self.config, frozen(&weights, "vae", &self.runtime.device))?;
        let moments = vae.encode(&images)?;
        let decoded = vae.decode_unscaled(&moments.mean)?;
        let loss = self.loss_of(&images, &decoded, &moments)?.to_scalar::<f32>()? as f64;
        Ok(loss * self.fed.share().weight(n_images))
    }

    /// Channels that carry alike, and the scaling factor that gives the held-out latents unit variance.
    fn writer(&self) -> Result<ModelWriter> {
        let (device, config, validation) = (self.runtime.device.clone(), self.config.clone(), self.validation.clone());
        let kept = self.frozen.clone();
        Ok(Box::new(move |folder, weights| {
            let weights = kept.into_iter().chain(weights.clone()).collect();
            let (vae, _) = Vae::new(&config, frozen(&weights, "vae", &device))?;
            let own = component(&weights, "vae");
            let white = whitened(&own, &vae.encode(&validation)?.mean)?;
            let params = Params::checkpoint(white.clone(), "whitened vae", &device, DType::F32, false);
            let latents = Vae::new(&config, params)?.0.encode(&validation)?.mean.flatten_all()?;
            let variance = latents.broadcast_sub(&latents.mean_all()?)?.sqr()?.mean_all()?.to_scalar::<f32>()? as f64;
            let config = VaeConfig { scaling_factor: 1.0 / variance.sqrt().max(1e-6), ..config };
            write_component(folder, "vae", &config, &white).context("autoencoder")
        }))
    }
}

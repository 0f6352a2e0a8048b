//! A model ready to sample: its parts loaded, what it can paint, texts to context.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::Tensor;

use crate::device::Runtime;
use crate::diffusion::{NoiseSchedule, ScheduleConfig};
use crate::invalid::invalid;
use crate::model::{Files, JointUnet, Probe, TextConfig, TextEncoder, Tokenizer, UnetConfig, Vae, VaeConfig};

/// A model ready to sample.
pub struct Pipeline {
    pub(super) runtime: Runtime,
    pub(super) unet: JointUnet,
    pub(super) vae: Vae,
    pub(super) text: TextEncoder,
    pub(super) tokenizer: Tokenizer,
    pub(super) schedule: NoiseSchedule,
    pub(super) probe: Option<Arc<Probe>>,
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
            probe: None,
        })
    }

    /// The same model, whose coupled self-attentions `probe` hears at every call of the U-Net.
    pub fn probed(self, probe: Arc<Probe>) -> Self {
        Self { probe: Some(probe), ..self }
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

    /// Text embeddings, each different text encoded once.
    ///
    /// # Shapes
    /// - b texts → `[b, l, d]`
    pub(super) fn encode(&self, texts: &[&str]) -> Result<Tensor> {
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

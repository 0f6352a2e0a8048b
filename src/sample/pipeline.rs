//! A model ready to sample: its parts loaded, what it can paint, texts to context.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};

use super::sides::Sides;
use crate::device::Runtime;
use crate::diffusion::{NoiseSchedule, ScheduleConfig};
use crate::invalid::invalid;
use crate::model::conditions::N_SIZES;
use crate::model::prompts::EncodedTexts;
use crate::model::{Family, Files, JointUnet, Probe, PromptEncoder, Tokenizer, UnetConfig, Vae, VaeConfig};

/// A model ready to sample.
pub struct Pipeline {
    pub(super) runtime: Runtime,
    pub(super) family: Family,
    pub(super) unet: JointUnet,
    pub(super) vae: Vae,
    /// Number format of the autoencoder.
    pub(super) vae_dtype: DType,
    pub(super) prompts: PromptEncoder,
    pub(super) schedule: NoiseSchedule,
    pub(super) probe: Option<Arc<Probe>>,
}

impl Pipeline {
    /// Loads all parts. `is_coupled` false leaves every image's self-attention to itself.
    pub fn load(files: &Files, runtime: &Runtime, is_coupled: bool) -> Result<Self> {
        check_channels(&files.describe("unet/config.json"), &files.json("unet/config.json")?)?;
        Self::of_any_kind(files, runtime, is_coupled)
    }

    /// The same of a U-Net with any input channels: what they are given is the caller's business.
    pub(super) fn of_any_kind(files: &Files, runtime: &Runtime, is_coupled: bool) -> Result<Self> {
        let unet_config: UnetConfig = files.json("unet/config.json")?;
        let vae_config: VaeConfig = files.json("vae/config.json")?;
        let schedule: ScheduleConfig = files.json("scheduler/scheduler_config.json")?;
        let name = files.describe("unet/config.json");
        let prompts = PromptEncoder::load(files, runtime)?;
        check_fit(&name, &unet_config, &prompts, &vae_config)?;
        let (unet, _) = JointUnet::new(&unet_config, files.params("unet", runtime, false)?)?;
        let vae_runtime = Runtime { dtype: vae_dtype(&vae_config, runtime.dtype), ..runtime.clone() };
        Ok(Self {
            unet: if is_coupled { unet } else { unet.uncoupled() },
            vae: Vae::new(&vae_config, files.params("vae", &vae_runtime, false)?)?.0,
            vae_dtype: vae_runtime.dtype,
            prompts,
            schedule: NoiseSchedule::new(&schedule)?,
            runtime: runtime.clone(),
            family: Family::of(files, &unet_config)?,
            probe: None,
        })
    }

    /// The same model, whose coupled self-attentions `probe` hears at every call of the U-Net.
    pub fn probed(self, probe: Arc<Probe>) -> Self {
        Self { probe: Some(probe), ..self }
    }

    /// The sides of the pictures that it can paint.
    pub fn sides(&self) -> Sides {
        Sides::of(self.unet.config(), self.vae.config())
    }

    /// Side of the pictures that the model was made for, in pixels.
    pub fn native_size(&self) -> usize {
        self.sides().native
    }

    /// Side of a picture must be a multiple of this.
    pub fn size_multiple(&self) -> usize {
        self.sides().multiple
    }

    /// What it reads prompts with.
    pub fn tokenizer(&self) -> &Tokenizer {
        self.prompts.tokenizer()
    }

    /// What the U-Net takes beside the noisy latents.
    pub fn family(&self) -> Family {
        self.family
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
        self.sides().check("--size", size)
    }

    /// Text embeddings, each different text encoded once.
    ///
    /// # Shapes
    /// - b texts → context `[b, l, d]`, pooled `[b, p]`
    pub(super) fn encode(&self, texts: &[&str]) -> Result<EncodedTexts> {
        let mut rows: BTreeMap<&str, u32> = BTreeMap::new();
        let mut different = Vec::new();
        let mut picks = Vec::with_capacity(texts.len());
        for text in texts {
            let next = rows.len() as u32;
            let row = *rows.entry(text).or_insert(next);
            if row == next {
                different.push(*text);
            }
            picks.push(row);
        }
        let picks = Tensor::from_vec(picks, texts.len(), &self.runtime.device)?;
        let encoded = self.prompts.encode(&different)?;
        Ok(EncodedTexts {
            context: encoded.context.index_select(&picks, 0)?,
            pooled: encoded.pooled.map(|pooled| pooled.index_select(&picks, 0)).transpose()?,
        })
    }
}

/// Refuses a U-Net whose input channels sampling has nothing for.
fn check_channels(name: &str, config: &UnetConfig) -> Result<()> {
    let (inputs, c) = (config.in_channels, config.latent_channels());
    if inputs == c || config.is_joint() {
        return Ok(());
    }
    let is = match inputs == 2 * c {
        true => "is InstructPix2Pix's, noisy latents and a picture to edit",
        false => "is of no kind that jedi knows",
    };
    Err(invalid(format!(
        "{name}: in_channels {inputs} {is}; `jedi sample` takes {c} (Stable Diffusion) or {} (joint: noisy, mask, reference); \
         `jedi inspect eps` runs InstructPix2Pix's too, and `jedi synth-data` changes styles with it",
        2 * c + 1
    )))
}

/// Whether the parts are one model.
fn check_fit(name: &str, unet: &UnetConfig, prompts: &PromptEncoder, vae: &VaeConfig) -> Result<()> {
    let c = unet.latent_channels();
    ensure!(
        vae.latent_channels == c && prompts.width() == unet.cross_attention_dim,
        "{name}: the parts do not fit: the VAE's latents have {} channels and the U-Net's {c}, the text encoder is {} wide \
         and the U-Net expects {}",
        vae.latent_channels,
        prompts.width(),
        unet.cross_attention_dim
    );
    let expected = unet.pooled_width(N_SIZES);
    ensure!(
        !unet.takes_added_conditions() || expected.is_some() && expected == prompts.pooled_width(),
        "{name}: the parts do not fit: the U-Net expects pooled text of width {expected:?} beside {N_SIZES} sizes, as Stable \
         Diffusion XL's base model does (its refiner cannot be sampled from), and the text encoders pool to {:?}",
        prompts.pooled_width()
    );
    Ok(())
}

/// f32 in place of f16 where that is too narrow for the autoencoder.
fn vae_dtype(config: &VaeConfig, dtype: DType) -> DType {
    match dtype {
        DType::F16 if config.force_upcast == Some(true) => DType::F32,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_autoencoder_that_overflows_in_f16_runs_in_f32() {
        let config = |force_upcast: Option<bool>| -> VaeConfig {
            serde_json::from_value(json!({
                "down_block_types": [], "up_block_types": [], "block_out_channels": [], "force_upcast": force_upcast,
            }))
            .unwrap()
        };
        assert_eq!(vae_dtype(&config(Some(true)), DType::F16), DType::F32);
        assert_eq!(vae_dtype(&config(Some(true)), DType::BF16), DType::BF16);
        assert_eq!(vae_dtype(&config(Some(false)), DType::F16), DType::F16);
        assert_eq!(vae_dtype(&config(None), DType::F16), DType::F16);
    }
}

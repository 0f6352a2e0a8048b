//! Prompts to what the U-Net is told of them: one tokenizer and text encoder (Stable Diffusion 1 and 2), or two (XL).

use anyhow::{Result, ensure};
use candle_core::{D, Device, Tensor};

use super::files::Files;
use super::text::{TextConfig, TextEncoder};
use super::tokenizer::{Prompt, Tokenizer};
use crate::device::Runtime;

/// All of a model that reads prompts.
pub struct PromptEncoder {
    first: Tower,
    /// Stable Diffusion XL's. Its context stands beside that of the first, and it pools the text.
    second: Option<Tower>,
    /// Whether the network was trained with zeros for the null text, in place of the encoding of "".
    is_null_zero: bool,
    device: Device,
}

struct Tower {
    tokenizer: Tokenizer,
    encoder: TextEncoder,
}

/// Texts as the U-Net is told them.
pub struct EncodedTexts {
    /// `[b, l, d]`.
    pub context: Tensor,
    /// `[b, p]`, of a model with two text encoders.
    pub pooled: Option<Tensor>,
}

impl Tower {
    /// The text encoder `text_encoder{suffix}` with the tokenizer `tokenizer{suffix}`.
    fn load(files: &Files, runtime: &Runtime, suffix: &str) -> Result<Self> {
        let component = format!("text_encoder{suffix}");
        let config: TextConfig = files.json(&format!("{component}/config.json"))?;
        Ok(Self {
            tokenizer: Tokenizer::read_from(files, &format!("tokenizer{suffix}"), config.max_position_embeddings)?,
            encoder: TextEncoder::new(&config, files.params(&component, runtime, false)?)?.0,
        })
    }

    /// # Shapes
    /// - b texts → `[b, l]`
    fn tokens(&self, texts: &[&str], device: &Device) -> Result<Tensor> {
        let rows = texts.iter().map(|text| Ok(self.tokenizer.encode(text)?.tokens)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::from_vec(rows.concat(), (texts.len(), self.encoder.config().max_position_embeddings), device)?)
    }
}

impl PromptEncoder {
    /// Loads the text encoders that the model has, with their tokenizers.
    pub fn load(files: &Files, runtime: &Runtime) -> Result<Self> {
        let first = Tower::load(files, runtime, "")?;
        let second = match files.contains("text_encoder_2/config.json") {
            true => Some(Tower::load(files, runtime, "_2")?),
            false => None,
        };
        let mut is_null_zero = false;
        if let Some(second) = &second {
            let (one, other) = (first.encoder.config(), second.encoder.config());
            ensure!(
                one.max_position_embeddings == other.max_position_embeddings && other.pooled_width().is_some(),
                "{}: does not go with text_encoder/: it must be a CLIPTextModelWithProjection of {} positions",
                files.describe("text_encoder_2/config.json"),
                one.max_position_embeddings
            );
            is_null_zero = forces_zeros(files)?;
        }
        Ok(Self { first, second, is_null_zero, device: runtime.device.clone() })
    }

    /// What it reads prompts with; where there are two tokenizers they cut the same text, and differ in their padding.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.first.tokenizer
    }

    /// The tokens of a prompt, for each text encoder.
    pub fn tokens(&self, prompt: &str) -> Result<Vec<Prompt>> {
        [Some(&self.first), self.second.as_ref()]
            .into_iter()
            .flatten()
            .map(|own| own.tokenizer.encode(prompt))
            .collect()
    }

    /// d: width of the context.
    pub fn width(&self) -> usize {
        let width = |tower: &Tower| tower.encoder.config().hidden_size;
        width(&self.first) + self.second.as_ref().map_or(0, width)
    }

    /// p: width of the pooled text, where there is one.
    pub fn pooled_width(&self) -> Option<usize> {
        self.second.as_ref()?.encoder.config().pooled_width()
    }

    /// What the U-Net is told of some texts; "" is the null text.
    ///
    /// # Shapes
    /// - b texts → context `[b, l, d]`, pooled `[b, p]`
    pub fn encode(&self, texts: &[&str]) -> Result<EncodedTexts> {
        let tokens = self.first.tokens(texts, &self.device)?;
        let Some(second) = &self.second else {
            return Ok(EncodedTexts { context: self.first.encoder.forward(&tokens)?, pooled: None });
        };
        let (context, pooled) = second.encoder.penultimate_and_pooled(&second.tokens(texts, &self.device)?)?;
        let context = Tensor::cat(&[&self.first.encoder.penultimate(&tokens)?, &context], D::Minus1)?;
        if !self.is_null_zero {
            return Ok(EncodedTexts { context, pooled: Some(pooled) });
        }
        let is_told: Vec<f32> = texts.iter().map(|text| if text.is_empty() { 0.0 } else { 1.0 }).collect();
        let is_told = Tensor::from_vec(is_told, (texts.len(), 1), &self.device)?.to_dtype(context.dtype())?;
        Ok(EncodedTexts {
            context: context.broadcast_mul(&is_told.unsqueeze(2)?)?,
            pooled: Some(pooled.broadcast_mul(&is_told)?),
        })
    }
}

/// `force_zeros_for_empty_prompt` of `model_index.json`; diffusers takes it for true where it is not there.
fn forces_zeros(files: &Files) -> Result<bool> {
    if !files.contains("model_index.json") {
        return Ok(true);
    }
    let index: serde_json::Value = files.json("model_index.json")?;
    Ok(index["force_zeros_for_empty_prompt"].as_bool().unwrap_or(true))
}

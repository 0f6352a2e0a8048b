//! Either of the two from a folder as transformers writes it.

use anyhow::{Context as _, Result, bail};
use candle_core::Tensor;
use serde_json::Value;

use super::{Blip, Blip2, Blip2Config, BlipConfig, Search};
use crate::device::Runtime;
use crate::model::files::Files;
use crate::model::params::Params;
use crate::model::weights::Weights;

/// A network that describes pictures.
pub enum Network {
    /// The light choice.
    Blip(Box<Blip>),
    /// The better one.
    Blip2(Box<Blip2>),
}

impl Network {
    /// Reads `config.json` and the weights beside it; each tensor goes from the mapped file to its place once.
    pub fn load(files: &Files, runtime: &Runtime) -> Result<Self> {
        const CONFIG: &str = "config.json";
        let json: Value = files.json(CONFIG)?;
        let kind = json.get("model_type").and_then(Value::as_str).unwrap_or("nothing");
        let describe = || files.describe(CONFIG);
        match kind {
            "blip" => {
                let config = BlipConfig::from_json(&json).with_context(describe)?;
                let params = params(files, runtime, Blip::is_spare)?;
                Ok(Self::Blip(Box::new(Blip::new(&config, params)?)))
            }
            "blip-2" => {
                let config = Blip2Config::from_json(&json).with_context(describe)?;
                let params = params(files, runtime, |name| Blip2::is_spare(&config, name))?;
                Ok(Self::Blip2(Box::new(Blip2::new(&config, params)?)))
            }
            other => bail!(
                "{}: model_type is {other}, which writes no captions here; take a BLIP or BLIP-2, such as \
                 Salesforce/blip-image-captioning-base or Salesforce/blip2-opt-2.7b",
                describe()
            ),
        }
    }

    /// Side of the pictures in pixels.
    pub fn image_size(&self) -> usize {
        match self {
            Self::Blip(blip) => blip.config().vision.image_size,
            Self::Blip2(blip) => blip.config().vision.image_size,
        }
    }

    /// # Shapes
    /// - normalised pixels `[b, 3, side, side]` → `[b, patches + 1, vision width]`
    pub fn features(&self, pixels: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Blip(blip) => blip.features(pixels)?,
            Self::Blip2(blip) => blip.features(pixels)?,
        })
    }

    /// Scores of the token behind the start token and every one of the prompt, for BLIP-2 also behind every vector of the
    /// picture, which come first.
    ///
    /// # Shapes
    /// - normalised pixels `[b, 3, side, side]`, prompt of l tokens → `[b, (q +) 1 + l, vocabulary]`
    pub fn logits(&self, pixels: &Tensor, prompt: &[u32]) -> Result<Tensor> {
        let prompt = self.behind_start(prompt);
        Ok(match self {
            Self::Blip(blip) => blip.logits(&blip.features(pixels)?, &prompt)?,
            Self::Blip2(blip) => blip.logits(&blip.embedded(pixels, &prompt)?)?,
        })
    }

    /// The new tokens of every picture behind the tokens of a prompt, which may be none.
    ///
    /// # Shapes
    /// - normalised pixels `[b, 3, side, side]` → b texts
    pub fn generate(&self, pixels: &Tensor, prompt: &[u32], settings: Search) -> Result<Vec<Vec<u32>>> {
        let prompt = self.behind_start(prompt);
        match self {
            Self::Blip(blip) => blip.generate(pixels, &prompt, settings),
            Self::Blip2(blip) => blip.generate(pixels, &prompt, settings),
        }
    }

    fn behind_start(&self, prompt: &[u32]) -> Vec<u32> {
        let start = match self {
            Self::Blip(blip) => blip.config().text.bos_token_id,
            Self::Blip2(blip) => blip.config().text.bos_token_id,
        };
        [&[start], prompt].concat()
    }
}

fn params(files: &Files, runtime: &Runtime, is_spare: impl Fn(&str) -> bool) -> Result<Params> {
    let all = files.weights("")?;
    let used = all.tensors().iter().filter(|(name, _)| !is_spare(name));
    let used = Weights::new(all.origin(), used.map(|(name, tensor)| (name.clone(), tensor.clone())).collect());
    Ok(Params::stored(used, &runtime.device, runtime.dtype, false))
}

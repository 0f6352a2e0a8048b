//! BLIP or BLIP-2 with the tokenizer and the preprocessing of its folder: pictures to texts.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use image::RgbImage;

use super::stage::{Answers, CaptionAsk, Captioner};
use crate::device::Runtime;
use crate::model::Files;
use crate::model::blip::{Network, Search};
use crate::vision::prepare::{Family, Preparation, Size};

/// Goes up when other captions come from the same weights.
pub const VERSION: u32 = 1;

/// Describes pictures.
pub struct BlipCaptioner {
    network: Network,
    tokenizer: tokenizers::Tokenizer,
    preparation: Preparation,
    device: Device,
}

const TOKENIZER: &str = "tokenizer.json";

impl BlipCaptioner {
    /// From a folder as transformers writes it: `config.json`, `model.safetensors` (or shards and their index),
    /// `tokenizer.json`, `preprocessor_config.json` (without it, BLIP's own).
    pub fn load(files: &Files, runtime: &Runtime) -> Result<Self> {
        ensure!(
            files.contains(TOKENIZER),
            "{}: is not there; write it in Python with AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)",
            files.describe(TOKENIZER)
        );
        let tokenizer = tokenizers::Tokenizer::from_bytes(files.bytes(TOKENIZER)?)
            .map_err(|error| anyhow!("{}: {error}", files.describe(TOKENIZER)))?;
        let preparation = Preparation::read(files, Family::Blip)?;
        let network = Network::load(files, runtime)?;
        // The square that the network takes, whatever the file says.
        let side = network.image_size() as u32;
        let preparation = Preparation { size: Some(Size::Exact(side, side)), ..preparation };
        Ok(Self { network, tokenizer, preparation, device: runtime.device.clone() })
    }

    /// What a picture shows, in words that begin with the prompt. One picture at a time, so that a text does not depend on which
    /// others are described with it.
    pub fn text(&self, image: &RgbImage, prompt: &str, search: Search) -> Result<String> {
        Ok(self.describe(&self.pixels(image)?, &self.tokens(prompt)?, search)?.0)
    }

    /// A text and what it comes from: `pixels [1,3,h,w]`, `features [1,l,v]`, `logits [1,t,vocabulary]` behind the prompt's
    /// tokens (see [`Network::logits`]) and the text's own tokens, `ids [t]` (i64).
    pub fn stages(&self, image: &RgbImage, prompt: &str, search: Search) -> Result<(String, BTreeMap<String, Tensor>)> {
        let prompt = self.tokens(prompt)?;
        let pixels = self.pixels(image)?;
        let (text, ids) = self.describe(&pixels, &prompt, search)?;
        let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
        let (features, logits) = (self.network.features(&pixels)?, self.network.logits(&pixels, &prompt)?);
        let named =
            [("pixels", pixels), ("features", features), ("logits", logits), ("ids", Tensor::new(ids, &Device::Cpu)?)];
        Ok((text, named.map(|(name, tensor)| (name.to_owned(), tensor)).into()))
    }

    /// A text and its tokens, without the prompt's.
    fn describe(&self, pixels: &Tensor, prompt: &[u32], search: Search) -> Result<(String, Vec<u32>)> {
        let new = self.network.generate(pixels, prompt, search)?.concat();
        let ids = [prompt, &new].concat();
        let text = self.tokenizer.decode(&ids, true).map_err(|error| anyhow!("tokens {ids:?}: {error}"))?;
        Ok((text.trim().to_owned(), new))
    }

    fn pixels(&self, image: &RgbImage) -> Result<Tensor> {
        self.preparation.tensor(image, &self.device)
    }

    fn tokens(&self, prompt: &str) -> Result<Vec<u32>> {
        let encoded = self.tokenizer.encode(prompt, false).map_err(|error| anyhow!("prompt {prompt:?}: {error}"))?;
        Ok(encoded.get_ids().to_vec())
    }
}

/// BLIP or BLIP-2 as a stage of the pipeline has it: always asked in the same way.
pub struct Describer {
    /// The model.
    pub captioner: BlipCaptioner,
    /// What every caption begins with; mostly nothing.
    pub prompt: String,
    /// How its words are found. No chance is in it: the seeds of the asks are not used.
    pub search: Search,
}

impl Captioner for Describer {
    fn captions(&mut self, asks: &[CaptionAsk]) -> Answers<String> {
        asks.iter().map(|ask| self.captioner.text(ask.image, &self.prompt, self.search)).collect()
    }
}

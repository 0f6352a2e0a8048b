//! BLIP or BLIP-2 with the tokenizer and the preprocessing of its folder: pictures to texts.

use anyhow::{Context as _, Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use image::RgbImage;
use serde::Deserialize;

use super::stage::{Answers, CaptionAsk, Captioner};
use crate::device::Runtime;
use crate::model::Files;
use crate::model::blip::{Network, Search};
use crate::vision::{Filter, resized};

/// Goes up when other captions come from the same weights.
pub const VERSION: u32 = 1;

/// Describes pictures.
pub struct BlipCaptioner {
    network: Network,
    tokenizer: tokenizers::Tokenizer,
    preprocessing: Preprocessing,
    device: Device,
}

const TOKENIZER: &str = "tokenizer.json";
const PREPROCESSING: &str = "preprocessor_config.json";

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
        let preprocessing = match files.contains(PREPROCESSING) {
            true => files.json(PREPROCESSING)?,
            false => Preprocessing::default(),
        };
        preprocessing.filter().with_context(|| files.describe(PREPROCESSING))?;
        let network = Network::load(files, runtime)?;
        Ok(Self { network, tokenizer, preprocessing, device: runtime.device.clone() })
    }

    /// A text for every picture; with a prompt, each begins with it. Pictures are looked at one by one, so that a text does not
    /// depend on which others are described with it.
    pub fn texts(&self, images: &[&RgbImage], prompt: &str, search: Search) -> Result<Vec<String>> {
        let prompt = self.tokenizer.encode(prompt, false).map_err(|error| anyhow!("prompt {prompt:?}: {error}"))?;
        let text = |image: &&RgbImage| {
            let pixels = self.preprocessing.pixels(image, self.network.image_size())?.to_device(&self.device)?;
            let new = self.network.generate(&pixels, prompt.get_ids(), search)?;
            let ids: Vec<u32> = prompt.get_ids().iter().chain(new.iter().flatten()).copied().collect();
            let text = self.tokenizer.decode(&ids, true).map_err(|error| anyhow!("tokens {ids:?}: {error}"))?;
            Ok(text.trim().to_owned())
        };
        images.iter().map(text).collect()
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
        let text = |ask: &CaptionAsk| {
            let texts = self.captioner.texts(&[ask.image], &self.prompt, self.search)?;
            texts.into_iter().next().context("no text")
        };
        asks.iter().map(text).collect()
    }
}

/// `BlipImageProcessor`: to the network's square whatever the shape, then to the mean and deviation of CLIP's pictures.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct Preprocessing {
    image_mean: [f32; 3],
    image_std: [f32; 3],
    /// Pillow's number of the filter.
    resample: u8,
}

impl Default for Preprocessing {
    fn default() -> Self {
        Self {
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
            resample: 3,
        }
    }
}

impl Preprocessing {
    fn filter(&self) -> Result<Filter> {
        match self.resample {
            2 => Ok(Filter::Bilinear),
            3 => Ok(Filter::Bicubic),
            other => Err(anyhow!("resample is {other}; only 2 (bilinear) and 3 (bicubic) are known")),
        }
    }

    /// # Shapes
    /// - a picture of any shape → `[1, 3, side, side]`
    pub fn pixels(&self, image: &RgbImage, side: usize) -> Result<Tensor> {
        let square = resized(image, (side as u32, side as u32), self.filter()?);
        let mut values = Vec::with_capacity(3 * side * side);
        for channel in 0..3 {
            let (mean, deviation) = (self.image_mean[channel], self.image_std[channel]);
            values.extend(square.pixels().map(|pixel| {
                // Scaled in double, as numpy does.
                let value = (f64::from(pixel.0[channel]) * (1.0 / 255.0)) as f32;
                (value - mean) / deviation
            }));
        }
        Ok(Tensor::from_vec(values, (1, 3, side, side), &Device::Cpu)?)
    }
}

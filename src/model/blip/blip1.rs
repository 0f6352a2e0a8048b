//! BLIP (`BlipForConditionalGeneration`): vision tower and a BERT that writes while it looks at the picture.

use anyhow::{Result, ensure};
use candle_core::{Result as CandleResult, Tensor};

use super::bert::{Attention, FeedForward, Widths, activate};
use super::cache::Cache;
use super::config::{Act, BlipConfig, DecoderConfig};
use super::search::{Next, Search, Writer, search};
use super::vision::VisionTower;
use crate::model::layers::{LayerNorm, Linear};
use crate::model::params::{Init, Params};
use crate::ops::{self, Mask};

/// Pictures to texts.
pub struct Blip {
    config: BlipConfig,
    vision_model: VisionTower,
    text_decoder: Decoder,
}

impl Blip {
    /// Builds the network; every tensor of the checkpoint must have its place, but for [`Blip::is_spare`].
    pub fn new(config: &BlipConfig, params: Params) -> Result<Self> {
        let blip = Self {
            vision_model: VisionTower::new(&config.vision, &params.pp("vision_model"))?,
            text_decoder: Decoder::new(&config.text, config.vision.hidden_size, &params.pp("text_decoder"))?,
            config: config.clone(),
        };
        params.finish()?;
        Ok(blip)
    }

    /// Whether a checkpoint may hold this tensor without it being read: the second name of a bias.
    pub fn is_spare(name: &str) -> bool {
        name == "text_decoder.cls.predictions.decoder.bias"
    }

    /// What it was built from.
    pub fn config(&self) -> &BlipConfig {
        &self.config
    }

    /// # Shapes
    /// - normalised pixels `[b, 3, side, side]` → `[b, patches + 1, vision width]`
    pub fn features(&self, pixels: &Tensor) -> CandleResult<Tensor> {
        self.vision_model.forward(pixels)
    }

    /// Scores of the token behind every one of the prompt, which is the same for all pictures.
    ///
    /// # Shapes
    /// - features `[b, l, vision width]`, prompt of l tokens → `[b, l, vocabulary]`
    pub fn logits(&self, features: &Tensor, prompt: &[u32]) -> CandleResult<Tensor> {
        let decoder = &self.text_decoder;
        let mut writer = BertWriter::new(decoder, features, prompt)?;
        decoder.logits(&writer.read(prompt, features.dim(0)?)?)
    }

    /// The new tokens of every picture behind the same prompt (the start token at least).
    pub fn generate(&self, pixels: &Tensor, prompt: &[u32], settings: Search) -> Result<Vec<Vec<u32>>> {
        let room = self.config.text.max_position_embeddings;
        ensure!(
            prompt.len() + settings.max_new_tokens <= room,
            "a prompt of {} tokens and {} new ones are more than this model's {room}; take a shorter prompt or fewer",
            prompt.len(),
            settings.max_new_tokens
        );
        let mut writer = BertWriter::new(&self.text_decoder, &self.features(pixels)?, prompt)?;
        search(&mut writer, &[self.config.text.sep_token_id], settings)
    }
}

/// `BlipTextLMHeadModel`.
struct Decoder {
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
    transform: Linear,
    transform_norm: LayerNorm,
    act: Act,
    /// None: the table of words.
    output: Option<Tensor>,
    output_bias: Tensor,
}

struct Layer {
    attention: Attention,
    crossattention: Attention,
    feed_forward: FeedForward,
}

impl Decoder {
    fn new(config: &DecoderConfig, features: usize, params: &Params) -> Result<Self> {
        let (d, heads, eps) = (config.hidden_size, config.num_attention_heads, config.layer_norm_eps);
        let (embeddings, head) = (params.pp("bert.embeddings"), params.pp("cls.predictions"));
        let own = Widths { own: d, source: d, heads, eps };
        let layer = |index: usize| -> Result<Layer> {
            let layer = params.pp("bert.encoder.layer").pp(index);
            Ok(Layer {
                attention: Attention::new(&layer.pp("attention"), "self", own)?,
                crossattention: Attention::new(
                    &layer.pp("crossattention"),
                    "self",
                    Widths { source: features, ..own },
                )?,
                feed_forward: FeedForward::new(
                    &layer,
                    ["intermediate", "output"],
                    (d, config.intermediate_size),
                    (config.hidden_act, eps),
                )?,
            })
        };
        let (words, places) = (config.vocab_size, config.max_position_embeddings);
        Ok(Self {
            word_embeddings: embeddings.pp("word_embeddings").get("weight", &[words, d], Init::Normal(0.02))?,
            position_embeddings: embeddings.pp("position_embeddings").get(
                "weight",
                &[places, d],
                Init::Normal(0.02),
            )?,
            norm: LayerNorm::new(&embeddings.pp("LayerNorm"), d, eps)?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            transform: Linear::new(&head.pp("transform.dense"), d, d)?,
            transform_norm: LayerNorm::new(&head.pp("transform.LayerNorm"), d, eps)?,
            act: config.hidden_act,
            output: match head.contains("decoder.weight") {
                true => Some(head.get("decoder.weight", &[words, d], Init::FanIn(d))?),
                false => None,
            },
            output_bias: head.get("bias", &[words], Init::Zeros)?,
        })
    }

    /// # Shapes
    /// - `[.., d]` → `[.., vocabulary]`
    fn logits(&self, hidden: &Tensor) -> CandleResult<Tensor> {
        let hidden = self.transform_norm.forward(&activate(self.act, &self.transform.forward(hidden)?)?)?;
        ops::linear(&hidden, self.output.as_ref().unwrap_or(&self.word_embeddings), Some(&self.output_bias))
    }
}

struct BertWriter<'a> {
    decoder: &'a Decoder,
    prompt: &'a [u32],
    n_pictures: usize,
    /// Keys and values of the pictures, a layer each, `[pictures, patches + 1, d]`.
    seen: Cache,
    cache: Cache,
}

impl<'a> BertWriter<'a> {
    fn new(decoder: &'a Decoder, features: &Tensor, prompt: &'a [u32]) -> CandleResult<Self> {
        let mut seen = Cache::default();
        for (index, layer) in decoder.layers.iter().enumerate() {
            let (keys, values) = layer.crossattention.keys_values(features)?;
            seen.extend(index, keys, values)?;
        }
        Ok(Self { decoder, prompt, n_pictures: features.dim(0)?, seen, cache: Cache::default() })
    }

    /// Reads tokens, `rows` by as many as come.
    ///
    /// # Shapes
    /// - tokens of all rows, or of one that is the same for all → `[rows, l, d]`
    fn read(&mut self, tokens: &[u32], rows: usize) -> CandleResult<Tensor> {
        let decoder = self.decoder;
        let words = decoder.word_embeddings.index_select(&Tensor::new(tokens, decoder.word_embeddings.device())?, 0)?;
        let d = words.dim(1)?;
        let first = self.cache.n_tokens()?;
        let words = match first {
            0 => words.unsqueeze(0)?.repeat((rows, 1, 1))?, // [rows, l, d]
            _ => words.reshape((rows, 1, d))?,
        };
        let l = words.dim(1)?;
        let places = decoder.position_embeddings.narrow(0, first, l)?;
        let mut hidden = decoder.norm.forward(&words.broadcast_add(&places)?)?;
        let mask = if l > 1 { Mask::Causal } else { Mask::None };
        for (index, layer) in decoder.layers.iter().enumerate() {
            let (keys, values) = layer.attention.keys_values(&hidden)?;
            hidden = layer.attention.forward(&hidden, self.cache.extend(index, keys, values)?, mask)?;
            // The rows of a picture look at the same patches: one look with as many queries.
            let together = hidden.reshape((self.n_pictures, (), d))?; // [pictures, rows/pictures·l, d]
            let looked = layer.crossattention.forward(&together, self.seen.layer(index), Mask::None)?;
            hidden = layer.feed_forward.forward(&looked.reshape((rows, l, d))?)?;
        }
        Ok(hidden)
    }

    fn last_scores(&self, hidden: &Tensor) -> CandleResult<Tensor> {
        let last = hidden.narrow(1, hidden.dim(1)? - 1, 1)?.squeeze(1)?; // [rows, d]
        self.decoder.logits(&last.contiguous()?)
    }
}

impl Writer for BertWriter<'_> {
    fn start(&mut self) -> CandleResult<Tensor> {
        let hidden = self.read(self.prompt, self.n_pictures)?;
        self.last_scores(&hidden)
    }

    fn step(&mut self, next: Next) -> CandleResult<Tensor> {
        let device = self.decoder.word_embeddings.device();
        self.cache.select(&Tensor::new(next.rows, device)?)?;
        if next.pictures.len() != self.n_pictures {
            self.seen.select(&Tensor::new(next.pictures, device)?)?;
            self.n_pictures = next.pictures.len();
        }
        let hidden = self.read(next.tokens, next.tokens.len())?;
        self.last_scores(&hidden)
    }
}

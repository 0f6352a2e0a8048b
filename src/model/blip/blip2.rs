//! BLIP-2 (`Blip2ForConditionalGeneration`): vision tower, Q-Former, a projection to the width of words, OPT.

use anyhow::{Result, ensure};
use candle_core::{Result as CandleResult, Tensor};

use super::cache::Cache;
use super::config::Blip2Config;
use super::opt::Opt;
use super::qformer::QFormer;
use super::search::{Next, Search, Writer, search};
use super::vision::VisionTower;
use crate::model::layers::Linear;
use crate::model::params::{Init, Params};

/// Pictures to texts.
pub struct Blip2 {
    config: Blip2Config,
    vision_model: VisionTower,
    query_tokens: Tensor,
    qformer: QFormer,
    language_projection: Linear,
    language_model: Opt,
}

impl Blip2 {
    /// Builds the network; every tensor of the checkpoint must have its place, but for an output layer that the config says is
    /// the table of tokens (see [`Blip2::is_spare`]).
    pub fn new(config: &Blip2Config, params: Params) -> Result<Self> {
        let (queries, words) = (config.qformer.hidden_size, config.text.hidden_size);
        let blip = Self {
            vision_model: VisionTower::new(&config.vision, &params.pp("vision_model"))?,
            query_tokens: params.get("query_tokens", &[1, config.num_query_tokens, queries], Init::Normal(0.02))?,
            qformer: QFormer::new(&config.qformer, config.vision.hidden_size, &params.pp("qformer"))?,
            language_projection: Linear::new(&params.pp("language_projection"), queries, words)?,
            language_model: Opt::new(&config.text, &params.pp("language_model"))?,
            config: config.clone(),
        };
        params.finish()?;
        Ok(blip)
    }

    /// Whether a checkpoint may hold this tensor without it being read.
    pub fn is_spare(config: &Blip2Config, name: &str) -> bool {
        config.text.tie_word_embeddings && name == "language_model.lm_head.weight"
    }

    /// What it was built from.
    pub fn config(&self) -> &Blip2Config {
        &self.config
    }

    /// # Shapes
    /// - normalised pixels `[b, 3, side, side]` → `[b, patches + 1, vision width]`
    pub fn features(&self, pixels: &Tensor) -> CandleResult<Tensor> {
        self.vision_model.forward(pixels)
    }

    /// # Shapes
    /// - features `[b, l, vision width]` → `[b, q, Q-Former width]`
    pub fn queries(&self, features: &Tensor) -> CandleResult<Tensor> {
        self.qformer.forward(&self.query_tokens.repeat((features.dim(0)?, 1, 1))?, features)
    }

    /// The pictures as vectors among words, then the prompt's tokens.
    ///
    /// # Shapes
    /// - pixels `[b, 3, side, side]`, prompt of l tokens → `[b, q + l, d]`
    pub fn embedded(&self, pixels: &Tensor, prompt: &[u32]) -> CandleResult<Tensor> {
        let queries = self.queries(&self.features(pixels)?)?;
        let picture = self.language_projection.forward(&queries)?; // [b, q, d]
        let b = picture.dim(0)?;
        let tokens = Tensor::new(prompt, picture.device())?.unsqueeze(0)?; // [1, l]
        let words = self.language_model.embed(&tokens)?.repeat((b, 1, 1))?; // [b, l, d]
        Tensor::cat(&[picture, words], 1)
    }

    /// Scores of the token behind every vector.
    ///
    /// # Shapes
    /// - embedded `[b, l, d]` → `[b, l, vocabulary]`
    pub fn logits(&self, embedded: &Tensor) -> CandleResult<Tensor> {
        self.language_model.logits(&self.language_model.forward(embedded, &mut Cache::default())?)
    }

    /// The new tokens of every picture behind the same prompt (the start token at least).
    pub fn generate(&self, pixels: &Tensor, prompt: &[u32], settings: Search) -> Result<Vec<Vec<u32>>> {
        let (used, room) = (self.config.num_query_tokens + prompt.len(), self.config.text.max_position_embeddings);
        ensure!(
            used + settings.max_new_tokens <= room,
            "{used} tokens of picture and prompt and {} new ones are more than this model's {room}; take a shorter prompt or \
             fewer",
            settings.max_new_tokens
        );
        let embedded = self.embedded(pixels, prompt)?;
        let mut writer = OptWriter { opt: &self.language_model, embedded, cache: Cache::default() };
        search(&mut writer, &self.config.text.eos_token_id.to_vec(), settings)
    }
}

struct OptWriter<'a> {
    opt: &'a Opt,
    embedded: Tensor,
    cache: Cache,
}

impl OptWriter<'_> {
    fn go_on(&mut self, embedded: &Tensor) -> CandleResult<Tensor> {
        let hidden = self.opt.forward(embedded, &mut self.cache)?;
        let last = hidden.narrow(1, hidden.dim(1)? - 1, 1)?.squeeze(1)?; // [rows, d]
        self.opt.logits(&last.contiguous()?)
    }
}

impl Writer for OptWriter<'_> {
    fn start(&mut self) -> CandleResult<Tensor> {
        let embedded = self.embedded.clone();
        self.go_on(&embedded)
    }

    fn step(&mut self, next: Next) -> CandleResult<Tensor> {
        let device = self.embedded.device();
        self.cache.select(&Tensor::new(next.rows, device)?)?;
        let embedded = self.opt.embed(&Tensor::new(next.tokens, device)?.unsqueeze(1)?)?; // [rows, 1, d]
        self.go_on(&embedded)
    }
}

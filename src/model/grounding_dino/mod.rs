//! Grounding DINO (Liu et al., ECCV 2024; transformers `GroundingDinoForObjectDetection`): finds what a text names in a
//! picture. Tiny and base, forward only; the pictures of a batch have one size, so that none is padded.
//!
//! In this order: `config`; `phrases` and `bert` (the text), `swin` (the picture), `positions`; `encoder` (both enhance
//! each other) with `attention` and `deformable`; `heads` (which positions become queries, scores, boxes); `decoder`.
//! Pictures and texts become these numbers, and boxes become findings, in [`crate::vision`].

mod attention;
mod bert;
mod config;
mod decoder;
mod deformable;
mod encoder;
mod heads;
mod phrases;
mod positions;
mod swin;

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, Result as CandleResult, Tensor};

use self::bert::Bert;
pub use self::config::{Activation, BertConfig, GroundingDinoConfig, SwinConfig};
use self::decoder::{Decoder, Seen};
use self::deformable::Maps;
use self::encoder::{EncoderLayer, Fixed};
use self::heads::{Mlp, best_positions, likeness, proposals, rows_of};
pub use self::phrases::{PHRASE_ENDS, Phrases};
use self::swin::Swin;
use super::files::Files;
use super::layers::{Conv, GroupNorm, LayerNorm, Linear};
use super::params::{Init, Params};
use super::weights::Weights;
use crate::device::Runtime;
use crate::ops::{self, Conv2d, Groups};

/// The network.
pub struct GroundingDino {
    config: GroundingDinoConfig,
    backbone: Swin,
    /// Each map to width d; the last ones halve the map above them.
    input_proj: Vec<(Conv, GroupNorm)>,
    text_backbone: Bert,
    text_projection: Linear,
    encoder: Vec<EncoderLayer>,
    level_embed: Tensor,
    enc_output: Linear,
    enc_output_norm: LayerNorm,
    encoder_output_bbox_embed: Mlp,
    query_vectors: Tensor,
    decoder: Decoder,
}

/// What the network finds, and what it went through on the way; b pictures, t tokens of the longest text, s positions
/// in all maps, q queries.
pub struct Stages {
    /// The backbone's, each `[b, h, w, c]`.
    pub maps: Vec<Tensor>,
    /// Of the encoder alone, at width d: `[b, t, d]`.
    pub text: Tensor,
    /// Enhanced, `[b, s, d]`.
    pub enhanced_picture: Tensor,
    /// Enhanced, `[b, t, d]`.
    pub enhanced_text: Tensor,
    /// The positions that became queries, the best first: b lists of q.
    pub chosen: Vec<Vec<u32>>,
    /// Their scores, `[b, q]`.
    pub chosen_scores: Tensor,
    /// Their boxes, `[b, q, 4]`.
    pub chosen_boxes: Tensor,
    /// The queries after the decoder, `[b, q, d]`.
    pub queries: Tensor,
    /// How much each query is like each token, before the sigmoid; −∞ for padding, `[b, q, t]`.
    pub logits: Tensor,
    /// Middle and size in shares of the picture's width and height, `[b, q, 4]`.
    pub boxes: Tensor,
}

impl GroundingDino {
    /// Reads a transformers folder: `config.json`, `model.safetensors`.
    ///
    /// # Errors
    /// When a file is missing or not a Grounding DINO checkpoint.
    pub fn load(files: &Files, runtime: &Runtime) -> Result<Self> {
        let config: GroundingDinoConfig = files.json("config.json")?;
        config.check().with_context(|| files.describe("config.json"))?;
        Self::new(&config, files.weights("")?, runtime)
    }

    /// From weights by transformers' names.
    pub fn new(config: &GroundingDinoConfig, weights: Weights, runtime: &Runtime) -> Result<Self> {
        config.check()?;
        let (weights, box_heads) = without_doubles(weights, config);
        let params = Params::stored(weights, &runtime.device, runtime.dtype, false);
        let box_heads: Vec<Params> = box_heads.iter().map(|name| params.pp(name)).collect();
        let (root, d) = (params.pp("model"), config.d_model);
        let network = Self {
            backbone: Swin::new(&config.backbone_config, &root.pp("backbone.conv_encoder.model"))?,
            input_proj: input_projections(&root.pp("input_proj_vision"), config)?,
            text_backbone: Bert::new(&config.text_config, &root.pp("text_backbone"))?,
            text_projection: Linear::new(&root.pp("text_projection"), config.text_config.hidden_size, d)?,
            encoder: (0..config.encoder_layers)
                .map(|i| EncoderLayer::new(&root.pp("encoder.layers").pp(i), config))
                .collect::<Result<_>>()?,
            level_embed: root.get("level_embed", &[config.num_feature_levels, d], Init::Normal(1.0))?,
            enc_output: Linear::new(&root.pp("enc_output"), d, d)?,
            enc_output_norm: LayerNorm::new(&root.pp("enc_output_norm"), d, config.layer_norm_eps)?,
            encoder_output_bbox_embed: Mlp::new(&root.pp("encoder_output_bbox_embed"), &[d, d, d, 4])?,
            query_vectors: root.get("query_position_embeddings.weight", &[config.num_queries, d], Init::Normal(1.0))?,
            decoder: Decoder::new(&root.pp("decoder"), &box_heads, config)?,
            config: config.clone(),
        };
        params.finish()?;
        Ok(network)
    }

    /// What it was built from.
    pub fn config(&self) -> &GroundingDinoConfig {
        &self.config
    }

    /// Looks for what each text names in the picture beside it.
    ///
    /// # Shapes
    /// - pixels `[b, 3, h, w]`, normalised; b texts of token ids, `[CLS]` and `[SEP]` included
    pub fn forward(&self, pixels: &Tensor, texts: &[Vec<u32>]) -> CandleResult<Stages> {
        let (b, dtype) = (pixels.dim(0)?, self.level_embed.dtype());
        if texts.len() != b {
            candle_core::bail!("{b} pictures with {} texts", texts.len());
        }
        let phrases = Phrases::new(texts, dtype, pixels.device())?;
        let text = self.text_projection.forward(&self.text_backbone.forward(&phrases)?)?;
        let maps = self.backbone.forward(&ops::to_channels_last(&pixels.to_dtype(dtype)?)?)?;
        let projected = self.projected(&maps)?;
        let sizes: Vec<(usize, usize)> =
            projected.iter().map(|map| Ok((map.dim(1)?, map.dim(2)?))).collect::<CandleResult<_>>()?;
        let (enhanced_picture, enhanced_text) = self.enhanced(&projected, &sizes, &text, &phrases)?;

        let (chosen, chosen_scores, start) =
            self.chosen(&enhanced_picture, &enhanced_text, &sizes, &phrases.tokens_alone)?;
        let q = self.config.num_queries;
        let vectors = self.query_vectors.unsqueeze(0)?.broadcast_as((b, q, self.config.d_model))?.contiguous()?;
        let maps_seen = Maps { values: &enhanced_picture, sizes: &sizes };
        let seen = Seen { maps: maps_seen, text: &enhanced_text, tokens_alone: &phrases.tokens_alone };
        let (queries, boxes) = self.decoder.forward(&vectors, &start, &seen)?;
        let logits = likeness(&queries, &enhanced_text, &phrases.tokens_alone)?;
        Ok(Stages {
            maps,
            text,
            enhanced_picture,
            enhanced_text,
            chosen,
            chosen_scores,
            chosen_boxes: start,
            queries,
            logits,
            boxes,
        })
    }

    /// All maps at width d, those below the backbone's included.
    fn projected(&self, maps: &[Tensor]) -> CandleResult<Vec<Tensor>> {
        let mut projected: Vec<Tensor> = Vec::new();
        for (level, (conv, norm)) in self.input_proj.iter().enumerate() {
            let source = match maps.get(level) {
                Some(map) => map,
                // The first one below halves the backbone's last map itself.
                None if level == maps.len() => &maps[level - 1],
                None => &projected[level - 1],
            };
            projected.push(norm.forward(&conv.forward(source)?)?);
        }
        Ok(projected)
    }

    fn enhanced(
        &self,
        maps: &[Tensor],
        sizes: &[(usize, usize)],
        text: &Tensor,
        phrases: &Phrases,
    ) -> CandleResult<(Tensor, Tensor)> {
        let (b, t, d) = text.dims3()?;
        let (mut rows, mut positions) = (Vec::new(), Vec::new());
        for (level, (map, &size)) in maps.iter().zip(sizes).enumerate() {
            rows.push(map.reshape((b, size.0 * size.1, d))?); // [b, h·w, d]
            let temperature = self.config.positional_embedding_temperature;
            let own = positions::of_map(size, d, temperature, text)?;
            positions.push(own.broadcast_add(&self.level_embed.get(level)?)?);
        }
        let points = points_of(sizes, text)?;
        let positions = Tensor::cat(&positions, 1)?;
        let fixed = Fixed {
            sizes,
            picture_positions: &positions,
            points: &points,
            word_positions: &positions::of_places(&phrases.places, (b, t, d), text)?,
            within: &phrases.within,
            tokens_alone: &phrases.tokens_alone,
        };
        let (mut picture, mut text) = (Tensor::cat(&rows, 1)?, text.clone());
        for layer in &self.encoder {
            (picture, text) = layer.forward(&picture, &text, &fixed)?;
        }
        Ok((picture, text))
    }

    /// The positions most like a token of the text, their scores, and the boxes that queries start from.
    fn chosen(
        &self,
        picture: &Tensor,
        text: &Tensor,
        sizes: &[(usize, usize)],
        tokens_alone: &Tensor,
    ) -> CandleResult<(Vec<Vec<u32>>, Tensor, Tensor)> {
        let (b, s, _) = picture.dims3()?;
        let (boxes, is_valid) = proposals(sizes);
        let kept = is_valid.iter().map(|is_valid| if *is_valid { 1f32 } else { 0.0 }).collect();
        let kept = Tensor::from_vec::<_, f32>(kept, (1, s, 1), &Device::Cpu)?;
        let kept = kept.to_device(picture.device())?.to_dtype(picture.dtype())?;
        let vectors = self.enc_output_norm.forward(&self.enc_output.forward(&picture.broadcast_mul(&kept)?)?)?;
        let (chosen, scores) = best_positions(&likeness(&vectors, text, tokens_alone)?, self.config.num_queries)?;
        let boxes = Tensor::from_vec(boxes, (s, 4), &Device::Cpu)?.to_device(picture.device())?;
        let boxes = rows_of(&boxes.unsqueeze(0)?.broadcast_as((b, s, 4))?.contiguous()?, &chosen)?;
        // In f32: a box before its sigmoid may be infinite.
        let moved = self.encoder_output_bbox_embed.forward(&rows_of(&vectors, &chosen)?)?.to_dtype(DType::F32)?;
        let boxes = candle_nn::ops::sigmoid(&(moved + boxes)?)?.to_dtype(picture.dtype())?;
        Ok((chosen, scores, boxes))
    }
}

fn input_projections(params: &Params, config: &GroundingDinoConfig) -> Result<Vec<(Conv, GroupNorm)>> {
    let (d, groups) = (config.d_model, Groups { count: 32, eps: 1e-5 });
    let widths: Vec<usize> =
        config.backbone_config.out_stages()?.iter().map(|stage| config.backbone_config.width(*stage)).collect();
    let halving = Conv2d { stride: 2, pad: [1; 4] };
    let level = |level: usize| {
        let (conv, norm) = (params.pp(level).pp(0), params.pp(level).pp(1));
        let conv = match widths.get(level) {
            Some(width) => Conv::same(&conv, (*width, d), 1)?,
            None if level == widths.len() => Conv::new(&conv, (widths[level - 1], d), 3, halving)?,
            None => Conv::new(&conv, (d, d), 3, halving)?,
        };
        Ok((conv, GroupNorm::new(&norm, d, groups, ops::Activation::None)?))
    };
    (0..config.num_feature_levels).map(level).collect()
}

/// The middle of every position in shares of the picture, `[1, s, 2]`.
fn points_of(sizes: &[(usize, usize)], like: &Tensor) -> CandleResult<Tensor> {
    let mut points = Vec::new();
    for &(h, w) in sizes {
        for row in 0..h {
            points.extend((0..w).flat_map(|column| [(column as f32 + 0.5) / w as f32, (row as f32 + 0.5) / h as f32]));
        }
    }
    let s = points.len() / 2;
    Tensor::from_vec(points, (1, s, 2), &Device::Cpu)?.to_device(like.device())?.to_dtype(like.dtype())
}

/// The weights that the network reads, and the names of its layers' box heads: checkpoints hold buffers beside them, and a
/// shared head under as many names as transformers found for it.
fn without_doubles(weights: Weights, config: &GroundingDinoConfig) -> (Weights, Vec<String>) {
    let places = ["bbox_embed", "model.decoder.bbox_embed"];
    let has = |name: &String| {
        let below = format!("{name}.");
        weights.tensors().range(below.clone()..).next().is_some_and(|(tensor, _)| tensor.starts_with(&below))
    };
    let of_layer = |layer: usize| places.iter().map(move |place| format!("{place}.{layer}"));
    let layers = 0..config.decoder_layers;
    let heads: Vec<String> = if config.decoder_bbox_embed_share {
        let any = layers.flat_map(of_layer).find(has);
        vec![any.unwrap_or_else(|| "bbox_embed.0".into())]
    } else {
        layers.map(|layer| of_layer(layer).find(has).unwrap_or_else(|| format!("bbox_embed.{layer}"))).collect()
    };
    let is_read = |name: &str| {
        let is_head = places.iter().any(|place| name.strip_prefix(place).is_some_and(|rest| rest.starts_with('.')));
        let is_buffer = name.ends_with("relative_position_index") || name.ends_with("position_ids");
        let is_unused = is_buffer || name.starts_with("model.text_backbone.pooler.");
        match is_head {
            true => heads.iter().any(|head| name.strip_prefix(head.as_str()).is_some_and(|rest| rest.starts_with('.'))),
            false => !is_unused,
        }
    };
    (weights.only(is_read), heads)
}

pub(super) fn activated(x: &Tensor, activation: Activation) -> CandleResult<Tensor> {
    match activation {
        Activation::Relu => x.relu(),
        Activation::Gelu => ops::gelu(x),
    }
}

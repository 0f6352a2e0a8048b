//! The feature enhancer: in each layer picture and text attend to each other, the text to itself, the picture to itself
//! by deformable attention (Grounding DINO, section 3.1).

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::config::{Activation, GroundingDinoConfig};
use super::deformable::{DeformableAttention, Maps, Reference};
use super::{activated, attention::Attention};
use crate::model::layers::{LayerNorm, Linear};
use crate::model::params::{Init, Params};
use crate::ops::{self, Mask};

/// What stays the same through all layers.
pub struct Fixed<'a> {
    /// Height and width of each map.
    pub sizes: &'a [(usize, usize)],
    /// Positions of the picture and the maps that they are in, `[1, s, d]`.
    pub picture_positions: &'a Tensor,
    /// The middle of each position, `[1, s, 2]`.
    pub points: &'a Tensor,
    /// Positions of the words, `[b, t, d]`.
    pub word_positions: &'a Tensor,
    /// −∞ between phrases, `[b, t, t]`.
    pub within: &'a Tensor,
    /// −∞ for padding, `[b, 1, t]`.
    pub tokens_alone: &'a Tensor,
}

/// One layer.
pub struct EncoderLayer {
    fusion: Fusion,
    text: TextLayer,
    picture: PictureLayer,
}

impl EncoderLayer {
    /// `params` stands at the layer.
    pub fn new(params: &Params, config: &GroundingDinoConfig) -> Result<Self> {
        Ok(Self {
            fusion: Fusion::new(&params.pp("fusion_layer"), config)?,
            text: TextLayer::new(&params.pp("text_enhancer_layer"), config)?,
            picture: PictureLayer::new(&params.pp("deformable_layer"), config)?,
        })
    }

    /// # Shapes
    /// - picture `[b, s, d]`, text `[b, t, d]` → the same
    pub fn forward(&self, picture: &Tensor, text: &Tensor, fixed: &Fixed) -> CandleResult<(Tensor, Tensor)> {
        let (picture, text) = self.fusion.forward(picture, text, fixed)?;
        Ok((self.picture.forward(&picture, fixed)?, self.text.forward(&text, fixed)?))
    }
}

/// Both ways of cross-attention from one matrix of scores.
struct Fusion {
    layer_norm_vision: LayerNorm,
    layer_norm_text: LayerNorm,
    vision_proj: Linear,
    text_proj: Linear,
    values_vision_proj: Linear,
    values_text_proj: Linear,
    out_vision_proj: Linear,
    out_text_proj: Linear,
    vision_param: Tensor,
    text_param: Tensor,
    heads: usize,
}

impl Fusion {
    fn new(params: &Params, config: &GroundingDinoConfig) -> Result<Self> {
        let (d, inner) = (config.d_model, config.encoder_ffn_dim / 2);
        let attention = params.pp("attn");
        let into = |name: &str| Linear::new(&attention.pp(name), d, inner);
        Ok(Self {
            layer_norm_vision: LayerNorm::new(&params.pp("layer_norm_vision"), d, config.layer_norm_eps)?,
            layer_norm_text: LayerNorm::new(&params.pp("layer_norm_text"), d, config.layer_norm_eps)?,
            vision_proj: into("vision_proj")?,
            text_proj: into("text_proj")?,
            values_vision_proj: into("values_vision_proj")?,
            values_text_proj: into("values_text_proj")?,
            out_vision_proj: Linear::new(&attention.pp("out_vision_proj"), inner, d)?,
            out_text_proj: Linear::new(&attention.pp("out_text_proj"), inner, d)?,
            vision_param: params.get("vision_param", &[d], Init::Ones)?,
            text_param: params.get("text_param", &[d], Init::Ones)?,
            heads: config.encoder_attention_heads / 2,
        })
    }

    fn forward(&self, picture: &Tensor, text: &Tensor, fixed: &Fixed) -> CandleResult<(Tensor, Tensor)> {
        let (picture, text) = (self.layer_norm_vision.forward(picture)?, self.layer_norm_text.forward(text)?);
        let (from_picture, from_text) = (self.vision_proj.forward(&picture)?, self.text_proj.forward(&text)?);
        let (picture_values, text_values) =
            (self.values_vision_proj.forward(&picture)?, self.values_text_proj.forward(&text)?);
        // transformers cuts the scores at ±50000 from the largest, which changes nothing that a softmax can show.
        let alone = Mask::Biased(fixed.tokens_alone);
        let to_picture = ops::attention(&from_picture, &from_text, &text_values, self.heads, alone)?;
        let to_text = ops::attention(&from_text, &from_picture, &picture_values, self.heads, Mask::None)?;
        let to_picture = self.out_vision_proj.forward(&to_picture)?.broadcast_mul(&self.vision_param)?;
        let to_text = self.out_text_proj.forward(&to_text)?.broadcast_mul(&self.text_param)?;
        Ok((ops::add(&picture, &to_picture)?, ops::add(&text, &to_text)?))
    }
}

struct TextLayer {
    self_attn: Attention,
    layer_norm_before: LayerNorm,
    feed_forward: FeedForward,
    layer_norm_after: LayerNorm,
}

impl TextLayer {
    fn new(params: &Params, config: &GroundingDinoConfig) -> Result<Self> {
        let d = config.d_model;
        Ok(Self {
            self_attn: Attention::new(&params.pp("self_attn"), d, config.encoder_attention_heads / 2)?,
            layer_norm_before: LayerNorm::new(&params.pp("layer_norm_before"), d, config.layer_norm_eps)?,
            feed_forward: FeedForward::new(params, (d, config.encoder_ffn_dim / 2), config.activation_function)?,
            layer_norm_after: LayerNorm::new(&params.pp("layer_norm_after"), d, config.layer_norm_eps)?,
        })
    }

    fn forward(&self, text: &Tensor, fixed: &Fixed) -> CandleResult<Tensor> {
        let queries = ops::add(text, fixed.word_positions)?;
        let attended = self.self_attn.forward([&queries, &queries, text], Mask::Biased(fixed.within))?;
        let text = self.layer_norm_before.forward(&ops::add(text, &attended)?)?;
        self.layer_norm_after.forward(&ops::add(&text, &self.feed_forward.forward(&text)?)?)
    }
}

struct PictureLayer {
    self_attn: DeformableAttention,
    self_attn_layer_norm: LayerNorm,
    feed_forward: FeedForward,
    final_layer_norm: LayerNorm,
}

impl PictureLayer {
    fn new(params: &Params, config: &GroundingDinoConfig) -> Result<Self> {
        let d = config.d_model;
        let places = (config.encoder_attention_heads, config.num_feature_levels, config.encoder_n_points);
        Ok(Self {
            self_attn: DeformableAttention::new(&params.pp("self_attn"), d, places)?,
            self_attn_layer_norm: LayerNorm::new(&params.pp("self_attn_layer_norm"), d, config.layer_norm_eps)?,
            feed_forward: FeedForward::new(params, (d, config.encoder_ffn_dim), config.activation_function)?,
            final_layer_norm: LayerNorm::new(&params.pp("final_layer_norm"), d, config.layer_norm_eps)?,
        })
    }

    fn forward(&self, picture: &Tensor, fixed: &Fixed) -> CandleResult<Tensor> {
        let queries = picture.broadcast_add(fixed.picture_positions)?;
        let maps = Maps { values: picture, sizes: fixed.sizes };
        let attended = self.self_attn.forward(&queries, Reference::Points(fixed.points), &maps)?;
        let picture = self.self_attn_layer_norm.forward(&ops::add(picture, &attended)?)?;
        self.final_layer_norm.forward(&ops::add(&picture, &self.feed_forward.forward(&picture)?)?)
    }
}

/// `fc1`, activation, `fc2`, which lie beside the other layers.
pub struct FeedForward {
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
}

impl FeedForward {
    /// Of width d, `inner` inside.
    pub fn new(params: &Params, (d, inner): (usize, usize), activation: Activation) -> Result<Self> {
        let (fc1, fc2) = (Linear::new(&params.pp("fc1"), d, inner)?, Linear::new(&params.pp("fc2"), inner, d)?);
        Ok(Self { fc1, fc2, activation })
    }

    /// # Shapes
    /// - `[.., d]` → the same
    pub fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        self.fc2.forward(&activated(&self.fc1.forward(x)?, self.activation)?)
    }
}

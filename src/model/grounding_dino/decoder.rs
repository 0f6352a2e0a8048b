//! The decoder: queries attend to each other, to the text, and to the picture inside their boxes; after each layer a
//! box is moved (Grounding DINO, section 3.3).

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::attention::Attention;
use super::config::GroundingDinoConfig;
use super::deformable::{DeformableAttention, Maps, Reference};
use super::encoder::FeedForward;
use super::heads::{Mlp, inverse_sigmoid};
use super::positions;
use crate::model::layers::LayerNorm;
use crate::model::params::Params;
use crate::ops::{self, Mask};

/// All layers.
pub struct Decoder {
    layers: Vec<DecoderLayer>,
    layer_norm: LayerNorm,
    reference_points_head: Mlp,
    /// One a layer, or one for all.
    bbox_embed: Vec<Mlp>,
    d: usize,
}

/// What the decoder looks at.
pub struct Seen<'a> {
    /// The enhanced picture.
    pub maps: Maps<'a>,
    /// The enhanced text, `[b, t, d]`.
    pub text: &'a Tensor,
    /// −∞ for padding, `[b, 1, t]`.
    pub tokens_alone: &'a Tensor,
}

impl Decoder {
    /// `params` stands at the decoder, `heads` at the `bbox_embed` of its layers.
    pub fn new(params: &Params, heads: &[Params], config: &GroundingDinoConfig) -> Result<Self> {
        let d = config.d_model;
        Ok(Self {
            layers: (0..config.decoder_layers)
                .map(|i| DecoderLayer::new(&params.pp("layers").pp(i), config))
                .collect::<Result<_>>()?,
            layer_norm: LayerNorm::new(&params.pp("layer_norm"), d, config.layer_norm_eps)?,
            reference_points_head: Mlp::new(&params.pp("reference_points_head"), &[2 * d, d, d])?,
            bbox_embed: heads.iter().map(|head| Mlp::new(head, &[d, d, d, 4])).collect::<Result<_>>()?,
            d,
        })
    }

    /// The queries after the last layer, normed, and their boxes.
    ///
    /// # Shapes
    /// - queries `[b, q, d]`, boxes `[b, q, 4]` (middle and size in shares of the picture) → the same
    pub fn forward(&self, queries: &Tensor, boxes: &Tensor, seen: &Seen) -> CandleResult<(Tensor, Tensor)> {
        let (mut x, mut boxes) = (queries.clone(), boxes.clone());
        for (index, layer) in self.layers.iter().enumerate() {
            let positions = self.reference_points_head.forward(&positions::of_boxes(&boxes, self.d)?)?;
            x = layer.forward(&x, &positions, &boxes, seen)?;
            let head = &self.bbox_embed[index.min(self.bbox_embed.len() - 1)];
            let is_last = index + 1 == self.layers.len();
            // Only what comes out is normed before the head.
            let moved = if is_last { head.forward(&self.layer_norm.forward(&x)?)? } else { head.forward(&x)? };
            boxes = candle_nn::ops::sigmoid(&(moved + inverse_sigmoid(&boxes)?)?)?;
        }
        Ok((self.layer_norm.forward(&x)?, boxes))
    }
}

struct DecoderLayer {
    self_attn: Attention,
    self_attn_layer_norm: LayerNorm,
    encoder_attn_text: Attention,
    encoder_attn_text_layer_norm: LayerNorm,
    encoder_attn: DeformableAttention,
    encoder_attn_layer_norm: LayerNorm,
    feed_forward: FeedForward,
    final_layer_norm: LayerNorm,
}

impl DecoderLayer {
    fn new(params: &Params, config: &GroundingDinoConfig) -> Result<Self> {
        let (d, heads) = (config.d_model, config.decoder_attention_heads);
        let norm = |name: &str| LayerNorm::new(&params.pp(name), d, config.layer_norm_eps);
        let places = (heads, config.num_feature_levels, config.decoder_n_points);
        Ok(Self {
            self_attn: Attention::new(&params.pp("self_attn"), d, heads)?,
            self_attn_layer_norm: norm("self_attn_layer_norm")?,
            encoder_attn_text: Attention::new(&params.pp("encoder_attn_text"), d, heads)?,
            encoder_attn_text_layer_norm: norm("encoder_attn_text_layer_norm")?,
            encoder_attn: DeformableAttention::new(&params.pp("encoder_attn"), d, places)?,
            encoder_attn_layer_norm: norm("encoder_attn_layer_norm")?,
            feed_forward: FeedForward::new(params, (d, config.decoder_ffn_dim), config.activation_function)?,
            final_layer_norm: norm("final_layer_norm")?,
        })
    }

    fn forward(&self, x: &Tensor, positions: &Tensor, boxes: &Tensor, seen: &Seen) -> CandleResult<Tensor> {
        let placed = ops::add(x, positions)?;
        let attended = self.self_attn.forward([&placed, &placed, x], Mask::None)?;
        let x = self.self_attn_layer_norm.forward(&ops::add(x, &attended)?)?;
        let alone = Mask::Biased(seen.tokens_alone);
        let attended = self.encoder_attn_text.forward([&ops::add(&x, positions)?, seen.text, seen.text], alone)?;
        let x = self.encoder_attn_text_layer_norm.forward(&ops::add(&x, &attended)?)?;
        let placed = ops::add(&x, positions)?;
        let attended = self.encoder_attn.forward(&placed, Reference::Boxes(boxes), &seen.maps)?;
        let x = self.encoder_attn_layer_norm.forward(&ops::add(&x, &attended)?)?;
        self.final_layer_norm.forward(&ops::add(&x, &self.feed_forward.forward(&x)?)?)
    }
}

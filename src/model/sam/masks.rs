//! What makes masks of a picture and a prompt: tokens and picture attend to each other, then the picture is enlarged and
//! each mask's token asks every pixel whether it is in (transformers `SamMaskDecoder`).

use anyhow::Result;
use candle_core::{IndexOp as _, Result as CandleResult, Tensor};

use super::config::SamMaskConfig;
use super::image::EPS;
use crate::model::grounding_dino::{Activation, activated};
use crate::model::layers::{LayerNorm, Linear};
use crate::model::params::{Init, Params};
use crate::ops::{self, Mask};

/// The decoder.
pub struct MaskDecoder {
    iou_token: Tensor,
    mask_tokens: Tensor,
    layers: Vec<TwoWayLayer>,
    final_attn_token_to_image: Attention,
    layer_norm_final_attn: LayerNorm,
    upscale_conv1: Doubling,
    upscale_layer_norm: LayerNorm,
    upscale_conv2: Doubling,
    hypernetworks: Vec<Chain>,
    iou_prediction_head: Chain,
}

impl MaskDecoder {
    /// `params` stands at the decoder.
    pub fn new(config: &SamMaskConfig, params: &Params) -> Result<Self> {
        let (c, n_masks, transformer) =
            (config.hidden_size, config.num_multimask_outputs + 1, params.pp("transformer"));
        let token = |name: &str, n: usize| params.get(&format!("{name}.weight"), &[n, c], Init::Normal(1.0));
        let narrow = Widths { c, inner: c / config.attention_downsample_rate, heads: config.num_attention_heads };
        let layer = |i: usize| TwoWayLayer::new(&transformer.pp("layers").pp(i), config, i == 0);
        let hypernetworks = params.pp("output_hypernetworks_mlps");
        Ok(Self {
            iou_token: token("iou_token", 1)?,
            mask_tokens: token("mask_tokens", n_masks)?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            final_attn_token_to_image: Attention::new(&transformer.pp("final_attn_token_to_image"), narrow)?,
            layer_norm_final_attn: LayerNorm::new(&transformer.pp("layer_norm_final_attn"), c, 1e-5)?,
            upscale_conv1: Doubling::new(&params.pp("upscale_conv1"), c, c / 4)?,
            upscale_layer_norm: LayerNorm::new(&params.pp("upscale_layer_norm"), c / 4, EPS)?,
            upscale_conv2: Doubling::new(&params.pp("upscale_conv2"), c / 4, c / 8)?,
            hypernetworks: (0..n_masks)
                .map(|i| Chain::new(&hypernetworks.pp(i), [c, c, c / 8], 3))
                .collect::<Result<_>>()?,
            iou_prediction_head: Chain::new(
                &params.pp("iou_prediction_head"),
                [c, config.iou_head_hidden_dim, n_masks],
                config.iou_head_depth,
            )?,
        })
    }

    /// The masks that an ambiguous prompt may mean (the first, for several prompts together, is left out), before the sigmoid,
    /// and how good each is thought to be.
    ///
    /// # Shapes
    /// - picture `[1, side, side, c]`, positions `[1, side², c]`, prompts `[n, t, c]` → `[n, masks, 4·side, 4·side]`, `[n, masks]`
    pub fn forward(&self, picture: &Tensor, positions: &Tensor, prompts: &Tensor) -> CandleResult<(Tensor, Tensor)> {
        let ((_, side, _, c), n) = (picture.dims4()?, prompts.dim(0)?);
        let own = Tensor::cat(&[&self.iou_token, &self.mask_tokens], 0)?;
        let n_own = own.dim(0)?;
        let own = own.unsqueeze(0)?.broadcast_as((n, n_own, c))?.contiguous()?;
        let tokens = Tensor::cat(&[&own, prompts], 1)?; // [n, own + t, c]
        let picture = picture.reshape((1, side * side, c))?.broadcast_as((n, side * side, c))?.contiguous()?;
        let positions = positions.broadcast_as((n, side * side, c))?.contiguous()?;
        let (mut x, mut picture) = (tokens.clone(), picture);
        for layer in &self.layers {
            (x, picture) = layer.forward(&x, &picture, (&tokens, &positions))?;
        }
        let (query, key) = (ops::add(&x, &tokens)?, ops::add(&picture, &positions)?);
        let attended = self.final_attn_token_to_image.forward([&query, &key, &picture])?;
        let x = self.layer_norm_final_attn.forward(&ops::add(&x, &attended)?)?;

        let map = self.upscale_conv1.forward(&picture.reshape((n, side, side, c))?)?;
        let map = self.upscale_conv2.forward(&ops::gelu(&self.upscale_layer_norm.forward(&map)?)?)?;
        let map = ops::gelu(&map)?.reshape((n, 16 * side * side, c / 8))?;
        let questions = self.hypernetworks.iter().enumerate().skip(1);
        let questions = questions.map(|(i, chain)| chain.forward(&x.i((.., 1 + i))?.contiguous()?));
        let questions = Tensor::stack(&questions.collect::<CandleResult<Vec<_>>>()?, 1)?; // [n, masks, c/8]
        let masks = questions.matmul(&map.transpose(1, 2)?.contiguous()?)?;
        let quality = self.iou_prediction_head.forward(&x.i((.., 0))?.contiguous()?)?;
        let n_masks = self.hypernetworks.len() - 1;
        Ok((masks.reshape((n, n_masks, 4 * side, 4 * side))?, quality.narrow(1, 1, n_masks)?))
    }
}

#[derive(Clone, Copy)]
struct Widths {
    c: usize,
    /// Of queries, keys and values.
    inner: usize,
    heads: usize,
}

struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    heads: usize,
}

impl Attention {
    fn new(params: &Params, Widths { c, inner, heads }: Widths) -> Result<Self> {
        let linear = |name: &str| Linear::new(&params.pp(name), c, inner);
        let (q_proj, k_proj, v_proj) = (linear("q_proj")?, linear("k_proj")?, linear("v_proj")?);
        Ok(Self { q_proj, k_proj, v_proj, out_proj: Linear::new(&params.pp("out_proj"), inner, c)?, heads })
    }

    fn forward(&self, [query, key, value]: [&Tensor; 3]) -> CandleResult<Tensor> {
        let (q, k, v) = (self.q_proj.forward(query)?, self.k_proj.forward(key)?, self.v_proj.forward(value)?);
        self.out_proj.forward(&ops::attention(&q, &k, &v, self.heads, Mask::None)?)
    }
}

/// Tokens to themselves, tokens to picture, feed-forward, picture to tokens.
struct TwoWayLayer {
    self_attn: Attention,
    cross_attn_token_to_image: Attention,
    cross_attn_image_to_token: Attention,
    norms: [LayerNorm; 4],
    lin1: Linear,
    lin2: Linear,
    act: Activation,
    is_first: bool,
}

impl TwoWayLayer {
    fn new(params: &Params, config: &SamMaskConfig, is_first: bool) -> Result<Self> {
        let (c, heads, mlp) = (config.hidden_size, config.num_attention_heads, params.pp("mlp"));
        let norm = |name: &str| LayerNorm::new(&params.pp(name), c, config.layer_norm_eps);
        // transformers takes its default here, whatever the config says of the last attention.
        let narrow = Widths { c, inner: c / 2, heads };
        Ok(Self {
            self_attn: Attention::new(&params.pp("self_attn"), Widths { c, inner: c, heads })?,
            cross_attn_token_to_image: Attention::new(&params.pp("cross_attn_token_to_image"), narrow)?,
            cross_attn_image_to_token: Attention::new(&params.pp("cross_attn_image_to_token"), narrow)?,
            norms: [norm("layer_norm1")?, norm("layer_norm2")?, norm("layer_norm3")?, norm("layer_norm4")?],
            lin1: Linear::new(&mlp.pp("lin1"), c, config.mlp_dim)?,
            lin2: Linear::new(&mlp.pp("lin2"), config.mlp_dim, c)?,
            act: config.hidden_act,
            is_first,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        picture: &Tensor,
        (tokens, positions): (&Tensor, &Tensor),
    ) -> CandleResult<(Tensor, Tensor)> {
        let x = if self.is_first {
            self.self_attn.forward([x, x, x])?
        } else {
            let placed = ops::add(x, tokens)?;
            ops::add(x, &self.self_attn.forward([&placed, &placed, x])?)?
        };
        let x = self.norms[0].forward(&x)?;
        let placed_picture = ops::add(picture, positions)?;
        let attended = self.cross_attn_token_to_image.forward([&ops::add(&x, tokens)?, &placed_picture, picture])?;
        let x = self.norms[1].forward(&ops::add(&x, &attended)?)?;
        let hidden = self.lin2.forward(&activated(&self.lin1.forward(&x)?, self.act)?)?;
        let x = self.norms[2].forward(&ops::add(&x, &hidden)?)?;
        let attended = self.cross_attn_image_to_token.forward([&placed_picture, &ops::add(&x, tokens)?, &x])?;
        let picture = self.norms[3].forward(&ops::add(picture, &attended)?)?;
        Ok((x, picture))
    }
}

/// A transposed convolution of 2×2 in steps of 2: every position becomes four, each by a matrix of its own.
struct Doubling {
    /// `[2·2·out, in]`.
    weight: Tensor,
    bias: Tensor,
}

impl Doubling {
    fn new(params: &Params, inputs: usize, outputs: usize) -> Result<Self> {
        let weight = params.get("weight", &[inputs, outputs, 2, 2], Init::FanIn(inputs))?;
        let weight = weight.permute((2, 3, 1, 0))?.contiguous()?.reshape((4 * outputs, inputs))?;
        Ok(Self { weight, bias: params.get("bias", &[outputs], Init::Zeros)? })
    }

    /// # Shapes
    /// - x `[n, h, w, in]` → `[n, 2·h, 2·w, out]`
    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let ((n, h, w, _), out) = (x.dims4()?, self.bias.dim(0)?);
        let four = ops::linear(x, &self.weight, None)?.reshape((n * h, w, 2, 2 * out))?; // [n·h, w, rows, columns·out]
        let rows = four.transpose(1, 2)?.contiguous()?.reshape((n, 2 * h, 2 * w, out))?;
        rows.broadcast_add(&self.bias)
    }
}

/// Linear layers with max(x, 0) between them (transformers `SamFeedForward`).
struct Chain(Vec<Linear>);

impl Chain {
    fn new(params: &Params, [inputs, inner, outputs]: [usize; 3], depth: usize) -> Result<Self> {
        let mut layers = vec![Linear::new(&params.pp("proj_in"), inputs, inner)?];
        for i in 0..depth - 2 {
            layers.push(Linear::new(&params.pp("layers").pp(i), inner, inner)?);
        }
        layers.push(Linear::new(&params.pp("proj_out"), inner, outputs)?);
        Ok(Self(layers))
    }

    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let mut x = self.0[0].forward(x)?;
        for layer in &self.0[1..] {
            x = layer.forward(&x.relu()?)?;
        }
        Ok(x)
    }
}

//! The picture's encoder: patches, layers that attend within windows or everywhere, knowing distances, and a neck to the
//! width of the masks (transformers `SamVisionEncoder`).

use std::ops::Range;

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use super::config::SamVisionConfig;
use crate::model::grounding_dino::{Activation, activated};
use crate::model::layers::{Conv, LayerNorm, Linear};
use crate::model::params::{Init, Params};
use crate::model::windows::{attention_with_bias, map_from_windows, windows_from_map};
use crate::ops::{self, Conv2d};

/// What transformers' own channel norm takes.
pub const EPS: f64 = 1e-6;

/// Pictures to a map.
pub struct ImageEncoder {
    patch: Conv,
    positions: Tensor,
    layers: Vec<Layer>,
    neck_weights: [Tensor; 2],
    neck_norms: [LayerNorm; 2],
}

impl ImageEncoder {
    /// `params` stands at the encoder.
    pub fn new(config: &SamVisionConfig, params: &Params) -> Result<Self> {
        let (d, out, size, grid) = (config.hidden_size, config.output_channels, config.patch_size, config.grid());
        let (neck, geometry) = (params.pp("neck"), Conv2d { stride: size, pad: [0; 4] });
        let weight = |name: &str, inputs: usize, kernel: usize| {
            neck.get(name, &[out, inputs, kernel, kernel], Init::FanIn(inputs * kernel * kernel))
        };
        let norm = |name: &str| LayerNorm::new(&neck.pp(name), out, EPS);
        Ok(Self {
            patch: Conv::new(&params.pp("patch_embed.projection"), (3, d), size, geometry)?,
            positions: params.get("pos_embed", &[1, grid, grid, d], Init::Zeros)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::new(&params.pp("layers").pp(i), config, config.global_attn_indexes.contains(&i)))
                .collect::<Result<_>>()?,
            neck_weights: [weight("conv1.weight", d, 1)?, weight("conv2.weight", out, 3)?],
            neck_norms: [norm("layer_norm1")?, norm("layer_norm2")?],
        })
    }

    /// # Shapes
    /// - pixels `[b, side, side, 3]` → `[b, grid, grid, c]`
    pub fn forward(&self, pixels: &Tensor) -> CandleResult<Tensor> {
        let mut x = self.patch.forward(pixels)?.broadcast_add(&self.positions)?;
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        for ((weight, norm), kernel) in self.neck_weights.iter().zip(&self.neck_norms).zip([1, 3]) {
            x = norm.forward(&ops::conv2d(&x, weight, None, Conv2d::same(kernel))?)?;
        }
        Ok(x)
    }
}

struct Layer {
    layer_norm1: LayerNorm,
    qkv: Linear,
    /// By difference of rows, and of columns: `[2·side − 1, d/heads]`.
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    proj: Linear,
    layer_norm2: LayerNorm,
    lin1: Linear,
    lin2: Linear,
    act: Activation,
    heads: usize,
    /// Positions a side that attend to each other.
    side: usize,
    is_global: bool,
}

impl Layer {
    fn new(params: &Params, config: &SamVisionConfig, is_global: bool) -> Result<Self> {
        let (d, heads, attention, mlp) =
            (config.hidden_size, config.num_attention_heads, params.pp("attn"), params.pp("mlp"));
        // Windows of no size are whole pictures.
        let is_global = is_global || config.window_size == 0;
        let side = if is_global { config.grid() } else { config.window_size };
        let qkv = match config.qkv_bias {
            true => Linear::new(&attention.pp("qkv"), d, 3 * d)?,
            false => Linear::without_bias(&attention.pp("qkv"), d, 3 * d)?,
        };
        let distances = |name: &str| attention.get(name, &[2 * side - 1, d / heads], Init::Zeros);
        Ok(Self {
            layer_norm1: LayerNorm::new(&params.pp("layer_norm1"), d, config.layer_norm_eps)?,
            qkv,
            rel_pos_h: by_pair(&distances("rel_pos_h")?, side)?,
            rel_pos_w: by_pair(&distances("rel_pos_w")?, side)?,
            proj: Linear::new(&attention.pp("proj"), d, d)?,
            layer_norm2: LayerNorm::new(&params.pp("layer_norm2"), d, config.layer_norm_eps)?,
            lin1: Linear::new(&mlp.pp("lin1"), d, config.inner())?,
            lin2: Linear::new(&mlp.pp("lin2"), config.inner(), d)?,
            act: config.hidden_act,
            heads,
            side,
            is_global,
        })
    }

    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let (b, h, w, d) = x.dims4()?;
        let normed = self.layer_norm1.forward(x)?;
        let attended = if self.is_global {
            self.attend(&normed.reshape((b, h * w, d))?)?.reshape((b, h, w, d))?
        } else {
            map_from_windows(&self.attend(&windows_from_map(&normed, self.side)?)?, self.side, (h, w))?
        };
        let x = ops::add(x, &attended)?;
        let hidden = activated(&self.lin1.forward(&self.layer_norm2.forward(&x)?)?, self.act)?;
        ops::add(&x, &self.lin2.forward(&hidden)?)
    }

    /// # Shapes
    /// - x `[n, side², d]` → the same
    fn attend(&self, x: &Tensor) -> CandleResult<Tensor> {
        let (_, l, d) = x.dims3()?;
        let qkv = self.qkv.forward(x)?; // [n, l, 3·d]
        let [q, k, v] = [0, 1, 2].map(|part| qkv.narrow(2, part * d, d));
        let (q, k, v) = (q?, k?, v?);
        let (side, c) = (self.side, d / self.heads);
        // Of each query with each row, and with each column, of keys.
        let bias = |items: Range<usize>, heads: Range<usize>| {
            let n = items.len() * heads.len();
            let own = q.narrow(0, items.start, items.len())?.narrow(2, heads.start * c, heads.len() * c)?;
            let own = own.contiguous()?.reshape((items.len(), l, heads.len(), c))?.transpose(1, 2)?.contiguous()?;
            let own = own.reshape((n, side, side, c))?;
            let rows = own.transpose(0, 1)?.contiguous()?.reshape((side, n * side, c))?.matmul(&self.rel_pos_h)?;
            let rows = rows.reshape((side, n, side, side))?.transpose(0, 1)?.contiguous()?; // [n, h, w, rows]
            let columns =
                own.permute((2, 0, 1, 3))?.contiguous()?.reshape((side, n * side, c))?.matmul(&self.rel_pos_w)?;
            let columns = columns.reshape((side, n, side, side))?.permute((1, 2, 0, 3))?.contiguous()?; // [n, h, w, columns]
            let rows = rows.reshape((n * l, side, 1))?.broadcast_as((n * l, side, side))?;
            let columns = columns.reshape((n * l, 1, side))?.broadcast_as((n * l, side, side))?;
            (rows + columns)?.reshape((n, l, l))
        };
        self.proj.forward(&attention_with_bias([&q, &k, &v], self.heads, bias)?)
    }
}

/// For each place of a query the vectors of all places of keys.
///
/// # Shapes
/// - by difference `[2·side − 1, c]` → `[side, c, side]`
fn by_pair(by_difference: &Tensor, side: usize) -> CandleResult<Tensor> {
    let rows: Vec<u32> = (0..side * side).map(|at| (at / side + side - 1 - at % side) as u32).collect();
    let rows = Tensor::from_vec(rows, side * side, by_difference.device())?;
    by_difference.index_select(&rows, 0)?.reshape((side, side, ()))?.transpose(1, 2)?.contiguous()
}

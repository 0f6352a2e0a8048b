//! The picture's backbone: a Swin transformer (transformers `SwinBackbone`). Windows of positions attend within
//! themselves, every other layer with the windows moved by half; between stages four positions become one.

use std::ops::Range;

use anyhow::Result;
use candle_core::{D, Device, Result as CandleResult, Tensor};

use super::activated;
use super::config::{Activation, SwinConfig};
use crate::model::layers::{Conv, LayerNorm, Linear};
use crate::model::params::{Init, Params};
use crate::model::windows::{attention_with_bias, map_from_windows, windows_from_map};
use crate::ops::{self, Conv2d};

/// What nn.LayerNorm takes where transformers gives it nothing.
const EPS: f64 = 1e-5;

/// Pictures to maps of several sizes.
pub struct Swin {
    patch: Conv,
    patch_size: usize,
    norm: LayerNorm,
    stages: Vec<Stage>,
}

struct Stage {
    layers: Vec<Layer>,
    /// The norm of the map that comes out here.
    out: Option<LayerNorm>,
    merging: Option<Merging>,
}

impl Swin {
    /// `params` stands at the backbone.
    pub fn new(config: &SwinConfig, params: &Params) -> Result<Self> {
        let size = config.patch_size;
        let out_stages = config.out_stages()?;
        let stage = |index: usize| -> Result<Stage> {
            let (own, width) = (params.pp("encoder.layers").pp(index), config.width(index));
            let layer = |layer: usize| Layer::new(&own.pp("blocks").pp(layer), config, (index, layer));
            let is_last = index + 1 == config.depths.len();
            let norm =
                || LayerNorm::new(&params.pp("hidden_states_norms").pp(format!("stage{}", index + 1)), width, EPS);
            Ok(Stage {
                layers: (0..config.depths[index]).map(layer).collect::<Result<_>>()?,
                out: if out_stages.contains(&index) { Some(norm()?) } else { None },
                merging: if is_last { None } else { Some(Merging::new(&own.pp("downsample"), width)?) },
            })
        };
        let embeddings = params.pp("embeddings");
        let geometry = Conv2d { stride: size, pad: [0; 4] };
        let channels = (config.num_channels, config.embed_dim);
        Ok(Self {
            patch: Conv::new(&embeddings.pp("patch_embeddings.projection"), channels, size, geometry)?,
            patch_size: size,
            norm: LayerNorm::new(&embeddings.pp("norm"), config.embed_dim, EPS)?,
            stages: (0..config.depths.len()).map(stage).collect::<Result<_>>()?,
        })
    }

    /// The maps of the stages that come out, the largest first.
    ///
    /// # Shapes
    /// - pixels `[b, h, w, 3]` → each `[b, h', w', c']`
    pub fn forward(&self, pixels: &Tensor) -> CandleResult<Vec<Tensor>> {
        let (_, h, w, _) = pixels.dims4()?;
        let missing = |side: usize| side.next_multiple_of(self.patch_size) - side;
        let pixels = pixels.pad_with_zeros(1, 0, missing(h))?.pad_with_zeros(2, 0, missing(w))?;
        let mut x = self.norm.forward(&self.patch.forward(&pixels)?)?;
        let mut maps = Vec::new();
        for stage in &self.stages {
            for layer in &stage.layers {
                x = layer.forward(&x)?;
            }
            if let Some(norm) = &stage.out {
                maps.push(norm.forward(&x)?);
            }
            if let Some(merging) = &stage.merging {
                x = merging.forward(&x)?;
            }
        }
        Ok(maps)
    }
}

/// 2×2 positions side by side, normed, to half as many channels.
struct Merging {
    norm: LayerNorm,
    reduction: Linear,
}

impl Merging {
    fn new(params: &Params, width: usize) -> Result<Self> {
        Ok(Self {
            norm: LayerNorm::new(&params.pp("norm"), 4 * width, EPS)?,
            reduction: Linear::without_bias(&params.pp("reduction"), 4 * width, 2 * width)?,
        })
    }

    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let (rows, columns) = (h.div_ceil(2), w.div_ceil(2));
        let x = x.pad_with_zeros(1, 0, 2 * rows - h)?.pad_with_zeros(2, 0, 2 * columns - w)?;
        // Down the columns of a block first, as the checkpoint has them.
        let x = x.contiguous()?.reshape((b, rows, 2, columns, 2, c))?.permute((0, 1, 3, 4, 2, 5))?;
        let x = x.contiguous()?.reshape((b, rows, columns, 4 * c))?;
        self.reduction.forward(&self.norm.forward(&x)?)
    }
}

struct Layer {
    layernorm_before: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    /// `[heads, side², side²]`.
    position_bias: Tensor,
    dense: Linear,
    layernorm_after: LayerNorm,
    intermediate: Linear,
    output: Linear,
    act: Activation,
    heads: usize,
    side: usize,
    shift: usize,
}

impl Layer {
    fn new(params: &Params, config: &SwinConfig, (stage, layer): (usize, usize)) -> Result<Self> {
        let (width, heads, side) = (config.width(stage), config.num_heads[stage], config.window_size);
        let inner = (config.mlp_ratio * width as f64) as usize;
        let attention = params.pp("attention.self");
        let linear = |name: &str| match config.qkv_bias {
            true => Linear::new(&attention.pp(name), width, width),
            false => Linear::without_bias(&attention.pp(name), width, width),
        };
        let table = attention.get("relative_position_bias_table", &[(2 * side - 1).pow(2), heads], Init::Zeros)?;
        Ok(Self {
            layernorm_before: LayerNorm::new(&params.pp("layernorm_before"), width, config.layer_norm_eps)?,
            query: linear("query")?,
            key: linear("key")?,
            value: linear("value")?,
            position_bias: position_bias(&table, side)?,
            dense: Linear::new(&params.pp("attention.output.dense"), width, width)?,
            layernorm_after: LayerNorm::new(&params.pp("layernorm_after"), width, config.layer_norm_eps)?,
            intermediate: Linear::new(&params.pp("intermediate.dense"), width, inner)?,
            output: Linear::new(&params.pp("output.dense"), inner, width)?,
            act: config.hidden_act,
            heads,
            side,
            shift: if layer % 2 == 1 { side / 2 } else { 0 },
        })
    }

    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let attended = self.attend(&self.layernorm_before.forward(x)?)?;
        let x = ops::add(x, &attended)?;
        let hidden = self.intermediate.forward(&self.layernorm_after.forward(&x)?)?;
        ops::add(&x, &self.output.forward(&activated(&hidden, self.act)?)?)
    }

    fn attend(&self, x: &Tensor) -> CandleResult<Tensor> {
        let (b, h, w, _) = x.dims4()?;
        let (rows, columns) = (h.div_ceil(self.side), w.div_ceil(self.side));
        let (padded_h, padded_w) = (rows * self.side, columns * self.side);
        // Padded before it is moved: the padding is attended to like any other position.
        let x = x.pad_with_zeros(1, 0, padded_h - h)?.pad_with_zeros(2, 0, padded_w - w)?;
        let windows = windows_from_map(&rolled(&x, self.shift)?, self.side)?; // [b·windows, side², c]
        let (q, k, v) = (self.query.forward(&windows)?, self.key.forward(&windows)?, self.value.forward(&windows)?);
        let per_picture = rows * columns;
        let l = self.side * self.side;
        let borders = match self.shift {
            0 => None,
            shift => Some(borders((padded_h, padded_w), self.side, shift, x.device())?.to_dtype(x.dtype())?),
        };
        let mut parts = Vec::new();
        for picture in 0..b {
            let own = |x: &Tensor| x.narrow(0, picture * per_picture, per_picture);
            let bias = |windows: Range<usize>, heads: Range<usize>| {
                let shape = (windows.len(), heads.len(), l, l);
                let positions = self.position_bias.narrow(0, heads.start, heads.len())?;
                let bias = match &borders {
                    None => positions.broadcast_as(shape)?.contiguous()?,
                    Some(borders) => {
                        let borders = borders.narrow(0, windows.start, windows.len())?.unsqueeze(1)?;
                        borders.broadcast_add(&positions.unsqueeze(0)?)?
                    }
                };
                bias.reshape((shape.0 * shape.1, l, l))
            };
            parts.push(attention_with_bias([&own(&q)?, &own(&k)?, &own(&v)?], self.heads, bias)?);
        }
        let windows = self.dense.forward(&Tensor::cat(&parts, 0)?)?;
        let x = map_from_windows(&windows, self.side, (padded_h, padded_w))?;
        rolled_back(&x, self.shift)?.narrow(1, 0, h)?.narrow(2, 0, w)?.contiguous()
    }
}

/// Every position `shift` to the left and up, what leaves coming in at the other end.
fn rolled(x: &Tensor, shift: usize) -> CandleResult<Tensor> {
    match shift {
        0 => Ok(x.clone()),
        shift => turned(&turned(x, 1, shift)?, 2, shift),
    }
}

fn rolled_back(x: &Tensor, shift: usize) -> CandleResult<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    match shift {
        0 => Ok(x.clone()),
        shift => turned(&turned(x, 1, h - shift)?, 2, w - shift),
    }
}

/// Begins at place `first` of a dimension.
fn turned(x: &Tensor, dim: usize, first: usize) -> CandleResult<Tensor> {
    Tensor::cat(&[x.narrow(dim, first, x.dim(dim)? - first)?, x.narrow(dim, 0, first)?], dim)
}

/// The learnt bias of each pair of positions in a window, from the table of differences (Swin, equation 4).
///
/// # Shapes
/// - table `[(2·side − 1)², heads]` → `[heads, side², side²]`
fn position_bias(table: &Tensor, side: usize) -> CandleResult<Tensor> {
    let l = side * side;
    let row_of = |at: usize| {
        let (query, key) = (at / l, at % l);
        let difference = |a: usize, b: usize| a + side - 1 - b;
        let (dy, dx) = (difference(query / side, key / side), difference(query % side, key % side));
        (dy * (2 * side - 1) + dx) as u32
    };
    let rows = Tensor::from_vec((0..l * l).map(row_of).collect::<Vec<_>>(), l * l, table.device())?;
    table.index_select(&rows, 0)?.t()?.contiguous()?.reshape((table.dim(D::Minus1)?, l, l))
}

/// −100 between positions of a moved window that are no neighbours in the picture, 0 elsewhere (`get_attn_mask`).
///
/// # Shapes
/// - → `[windows, side², side²]`
fn borders((h, w): (usize, usize), side: usize, shift: usize, device: &Device) -> CandleResult<Tensor> {
    let part = |at: usize, length: usize| match at {
        at if at < length - side => 0,
        at if at < length - shift => 1,
        _ => 2,
    };
    let (columns, l) = (w / side, side * side);
    let windows = (h / side) * columns;
    let mut mask = vec![0f32; windows * l * l];
    for (window, mask) in mask.chunks_exact_mut(l * l).enumerate() {
        let (top, left) = (window / columns * side, window % columns * side);
        let region: Vec<u8> = (0..l).map(|at| 3 * part(top + at / side, h) + part(left + at % side, w)).collect();
        for (at, value) in mask.iter_mut().enumerate() {
            if region[at / l] != region[at % l] {
                *value = -100.0;
            }
        }
    }
    Tensor::from_vec(mask, (windows, l, l), device)
}

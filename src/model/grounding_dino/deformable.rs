//! Multi-scale deformable attention: a query looks at a few places of each map, near its own point or inside its box,
//! and chooses places and shares itself (Deformable DETR, equation 3).

use anyhow::Result;
use candle_core::{D, Device, Result as CandleResult, Tensor};

use crate::model::layers::Linear;
use crate::model::params::Params;
use crate::ops;

/// The maps that are looked at: `[b, s, d]`, one behind the other, row by row.
pub struct Maps<'a> {
    /// The vectors of all positions.
    pub values: &'a Tensor,
    /// Height and width of each map.
    pub sizes: &'a [(usize, usize)],
}

/// Where a query stands, in shares of the picture's width and height.
pub enum Reference<'a> {
    /// `[1, q, 2]`: offsets count in positions of each map.
    Points(&'a Tensor),
    /// `[b, q, 4]` (middle, size): offsets count in halves of the box.
    Boxes(&'a Tensor),
}

/// The layer.
pub struct DeformableAttention {
    sampling_offsets: Linear,
    attention_weights: Linear,
    value_proj: Linear,
    output_proj: Linear,
    heads: usize,
    levels: usize,
    points: usize,
}

impl DeformableAttention {
    /// Of width d.
    pub fn new(params: &Params, d: usize, (heads, levels, points): (usize, usize, usize)) -> Result<Self> {
        let places = heads * levels * points;
        Ok(Self {
            sampling_offsets: Linear::new(&params.pp("sampling_offsets"), d, 2 * places)?,
            attention_weights: Linear::new(&params.pp("attention_weights"), d, places)?,
            value_proj: Linear::new(&params.pp("value_proj"), d, d)?,
            output_proj: Linear::new(&params.pp("output_proj"), d, d)?,
            heads,
            levels,
            points,
        })
    }

    /// # Shapes
    /// - queries `[b, q, d]` → the same
    pub fn forward(&self, queries: &Tensor, reference: Reference, maps: &Maps) -> CandleResult<Tensor> {
        let (b, q, _) = queries.dims3()?;
        let Self { heads, levels, points, .. } = *self;
        let values = self.value_proj.forward(maps.values)?;
        let offsets = self.sampling_offsets.forward(queries)?.reshape((b, q, heads * levels * points * 2))?;
        let shares = self.attention_weights.forward(queries)?.reshape((b, q, heads, levels * points))?;
        let shares = candle_nn::ops::softmax(&shares, D::Minus1)?.reshape((b, q, heads, levels, points))?;
        // The middle of every place, and how far an offset of 1 goes, both `[1 or b, 1 or q, heads·levels·points·2]`.
        let spread = |xy: &Tensor| {
            let (b, q, _) = xy.dims3()?;
            let xy = xy.unsqueeze(2)?.broadcast_as((b, q, heads * levels * points, 2))?;
            xy.contiguous()?.reshape((b, q, heads * levels * points * 2))
        };
        let (middle, reach) = match reference {
            Reference::Points(points) => (spread(points)?, self.positions(maps.sizes, queries)?),
            Reference::Boxes(boxes) => {
                let size = boxes.narrow(2, 2, 2)?.affine(0.5 / points as f64, 0.0)?;
                (spread(&boxes.narrow(2, 0, 2)?)?, spread(&size)?)
            }
        };
        let places = offsets.broadcast_mul(&reach)?.broadcast_add(&middle)?;
        let places = places.reshape(vec![b, q, heads, levels, points, 2])?;
        self.output_proj.forward(&ops::deformable_sample(&values, maps.sizes, &places, &shares)?)
    }

    /// The size of one position of each map, for every place.
    fn positions(&self, sizes: &[(usize, usize)], like: &Tensor) -> CandleResult<Tensor> {
        let of_head = sizes.iter().flat_map(|&(h, w)| [1.0 / w as f32, 1.0 / h as f32].repeat(self.points));
        let of_head: Vec<f32> = of_head.collect();
        let values = of_head.repeat(self.heads);
        let n = values.len();
        Tensor::from_vec(values, (1, 1, n), &Device::Cpu)?.to_device(like.device())?.to_dtype(like.dtype())
    }
}

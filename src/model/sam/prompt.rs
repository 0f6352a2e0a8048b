//! The prompt's encoder: the corners of a box as tokens (transformers `SamPromptEncoder`, boxes alone).

use std::f64::consts::TAU;

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor};

use crate::model::params::{Init, Params};

/// Where things are, as random waves.
pub struct Places {
    /// `[2, c/2]`.
    frequencies: Tensor,
}

impl Places {
    /// `params` stands at the table.
    pub fn new(params: &Params, c: usize) -> Result<Self> {
        Ok(Self { frequencies: params.get("positional_embedding", &[2, c / 2], Init::Normal(1.0))? })
    }

    /// # Shapes
    /// - points `[n, 2]` (x, y) in shares of the picture → `[n, c]`
    pub fn of_points(&self, points: &Tensor) -> CandleResult<Tensor> {
        let phases = points.affine(2.0, -1.0)?.matmul(&self.frequencies)?.affine(TAU, 0.0)?;
        Tensor::cat(&[phases.sin()?, phases.cos()?], 1)
    }

    /// Of the middle of every position of a square map.
    ///
    /// # Shapes
    /// - → `[1, side², c]`
    pub fn of_map(&self, side: usize) -> CandleResult<Tensor> {
        let share = |at: usize| (at as f32 + 0.5) / side as f32;
        let points: Vec<f32> = (0..side * side).flat_map(|at| [share(at % side), share(at / side)]).collect();
        let points = Tensor::from_vec(points, (side * side, 2), self.frequencies.device())?;
        self.of_points(&points.to_dtype(self.frequencies.dtype())?)?.unsqueeze(0)
    }
}

/// Boxes to tokens.
pub struct Corners {
    upper_left: Tensor,
    lower_right: Tensor,
    /// Added to the picture where no mask is given, `[1, c]`.
    pub no_mask: Tensor,
}

impl Corners {
    /// `params` stands at the prompt's encoder.
    pub fn new(params: &Params, c: usize) -> Result<Self> {
        let vector = |name: &str| params.get(&format!("{name}.weight"), &[1, c], Init::Normal(1.0));
        Ok(Self {
            upper_left: vector("point_embed.2")?,
            lower_right: vector("point_embed.3")?,
            no_mask: vector("no_mask_embed")?,
        })
    }

    /// # Shapes
    /// - boxes: left, upper, right, lower edge in pixels of the picture's square of `side` pixels → `[n, 2, c]`
    pub fn tokens(&self, boxes: &[[f32; 4]], side: usize, places: &Places) -> CandleResult<Tensor> {
        // The middle of the pixel.
        let shares = boxes.iter().flatten().map(|edge| (edge + 0.5) / side as f32).collect::<Vec<f32>>();
        let n = boxes.len();
        let points = Tensor::from_vec(shares, (2 * n, 2), self.no_mask.device())?.to_dtype(self.no_mask.dtype())?;
        let tokens = places.of_points(&points)?.reshape((n, 2, ()))?;
        tokens.broadcast_add(&Tensor::cat(&[&self.upper_left, &self.lower_right], 0)?.unsqueeze(0)?)
    }
}

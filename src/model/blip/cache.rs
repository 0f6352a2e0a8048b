//! Keys and values of the tokens that a decoder has read, so that each is computed once.

use candle_core::{Result, Tensor};

/// Keys and values of every layer, `[rows, tokens, d]`.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    layers: Vec<(Tensor, Tensor)>,
}

impl Cache {
    /// Tokens read.
    pub fn n_tokens(&self) -> Result<usize> {
        self.layers.first().map_or(Ok(0), |(keys, _)| keys.dim(1))
    }

    /// Adds the new tokens' keys and values of `layer`, and gives those of all. Layers come in their order.
    pub fn extend(&mut self, layer: usize, keys: Tensor, values: Tensor) -> Result<(&Tensor, &Tensor)> {
        match self.layers.get_mut(layer) {
            Some(known) => *known = (Tensor::cat(&[&known.0, &keys], 1)?, Tensor::cat(&[&known.1, &values], 1)?),
            None => self.layers.push((keys, values)),
        }
        let (keys, values) = &self.layers[layer];
        Ok((keys, values))
    }

    /// Goes on with these of its rows, some perhaps more than once.
    pub fn select(&mut self, rows: &Tensor) -> Result<()> {
        for (keys, values) in &mut self.layers {
            (*keys, *values) = (keys.index_select(rows, 0)?, values.index_select(rows, 0)?);
        }
        Ok(())
    }

    /// Keys and values of one layer.
    pub fn layer(&self, layer: usize) -> (&Tensor, &Tensor) {
        let (keys, values) = &self.layers[layer];
        (keys, values)
    }
}

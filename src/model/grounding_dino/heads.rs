//! What turns vectors into answers: small feed-forward networks for boxes, likeness to the words for scores; and the
//! choice of the enhancer's positions that become queries (Grounding DINO, section 3.2).

use anyhow::Result;
use candle_core::{D, DType, Device, Result as CandleResult, Tensor, bail};

use crate::model::layers::Linear;
use crate::model::params::Params;

/// Linear layers with max(x, 0) between them.
pub struct Mlp(Vec<Linear>);

impl Mlp {
    /// From the first width to the last.
    pub fn new(params: &Params, widths: &[usize]) -> Result<Self> {
        let layer = |(i, pair): (usize, &[usize])| Linear::new(&params.pp("layers").pp(i), pair[0], pair[1]);
        Ok(Self(widths.windows(2).enumerate().map(layer).collect::<Result<_>>()?))
    }

    /// # Shapes
    /// - `[.., first]` → `[.., last]`
    pub fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let mut x = self.0[0].forward(x)?;
        for layer in &self.0[1..] {
            x = layer.forward(&x.relu()?)?;
        }
        Ok(x)
    }
}

/// ln(x/(1 − x)) of x kept 1e-5 away from 0 and 1 (`torch.special.logit` with that ε).
pub fn inverse_sigmoid(x: &Tensor) -> CandleResult<Tensor> {
    let x = x.clamp(1e-5, 1.0 - 1e-5)?;
    (&x / x.affine(-1.0, 1.0)?)?.log()
}

/// How much each vector is like each token; −∞ for padding.
///
/// # Shapes
/// - x `[b, n, d]`, text `[b, t, d]`, tokens_alone `[b, 1, t]` → `[b, n, t]`
pub fn likeness(x: &Tensor, text: &Tensor, tokens_alone: &Tensor) -> CandleResult<Tensor> {
    x.contiguous()?.matmul(&text.transpose(1, 2)?.contiguous()?)?.broadcast_add(tokens_alone)
}

/// Every position of the maps as a box around it, before the sigmoid, and whether it is away from the border: others
/// are no proposals (`generate_encoder_output_proposals` of a picture without padding).
///
/// # Shapes
/// - → s boxes of 4, s
pub fn proposals(sizes: &[(usize, usize)]) -> (Vec<f32>, Vec<bool>) {
    let (mut boxes, mut is_valid) = (Vec::new(), Vec::new());
    for (level, &(h, w)) in sizes.iter().enumerate() {
        let side = 0.05 * 2f32.powi(level as i32);
        for row in 0..h {
            for column in 0..w {
                let own = [(column as f32 + 0.5) / w as f32, (row as f32 + 0.5) / h as f32, side, side];
                let inside = own.iter().all(|share| *share > 0.01 && *share < 0.99);
                is_valid.push(inside);
                boxes.extend(own.map(|share| if inside { (share / (1.0 - share)).ln() } else { f32::INFINITY }));
            }
        }
    }
    (boxes, is_valid)
}

/// The `count` positions of each picture whose best score is highest, the best first; of equals the earlier one.
///
/// # Shapes
/// - scores `[b, s, t]` → b lists, and their best scores `[b, count]`
pub fn best_positions(scores: &Tensor, count: usize) -> CandleResult<(Vec<Vec<u32>>, Tensor)> {
    let best: Vec<Vec<f32>> = scores.max(D::Minus1)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec2()?;
    let (mut chosen, mut values) = (Vec::new(), Vec::new());
    for scores in &best {
        if scores.len() < count {
            bail!("num_queries {count}: a picture this small has only {} positions; give a larger one", scores.len());
        }
        let mut order: Vec<u32> = (0..scores.len() as u32).collect();
        order.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
        order.truncate(count);
        values.extend(order.iter().map(|position| scores[*position as usize]));
        chosen.push(order);
    }
    let values = Tensor::from_vec(values, (best.len(), count), scores.device())?;
    Ok((chosen, values))
}

/// The rows of each picture's own list.
///
/// # Shapes
/// - x `[b, s, c]`, b lists of q → `[b, q, c]`
pub fn rows_of(x: &Tensor, lists: &[Vec<u32>]) -> CandleResult<Tensor> {
    let own = |(picture, list): (usize, &Vec<u32>)| {
        let rows = Tensor::from_slice(list, list.len(), x.device())?;
        x.get(picture)?.index_select(&rows, 0)
    };
    Tensor::stack(&lists.iter().enumerate().map(own).collect::<CandleResult<Vec<_>>>()?, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proposals_at_the_border_and_too_large_ones_are_none() {
        let (boxes, is_valid) = proposals(&[(1, 60), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1)]);
        // A sixtieth's middle is nearer than a hundredth to the border; level 5 would be 1.6 pictures wide.
        assert_eq!((is_valid[0], is_valid[1], is_valid[60], is_valid[64]), (false, true, true, false));
        assert!(boxes[0].is_infinite() && (boxes[4] - (1.5f32 / 58.5).ln()).abs() < 1e-5);
    }

    #[test]
    fn the_best_positions_come_in_order_and_of_equals_the_earlier() {
        let scores = Tensor::new(&[[[0f32, 3.0], [5.0, 1.0], [3.0, 2.0], [1.0, 1.0]]], &Device::Cpu).unwrap();
        let (chosen, values) = best_positions(&scores, 3).unwrap();
        assert_eq!((chosen, values.to_vec2::<f32>().unwrap()), (vec![vec![1, 0, 2]], vec![vec![5.0, 3.0, 3.0]]));
        assert!(best_positions(&scores, 5).unwrap_err().to_string().contains("only 4 positions"));
    }
}

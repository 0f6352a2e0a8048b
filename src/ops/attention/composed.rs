//! Attention for devices without a kernel of ours, in tensor operations.

use candle_core::{D, DType, Device, Result, Tensor};

use super::Sizes;
use crate::ops::graft::graft_tensor;

/// The same bookkeeping in tensor operations.
pub fn composed(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>, sizes: Sizes) -> Result<Tensor> {
    let bias = bias.map(Tensor::detach);
    let split = move |x: &Tensor, rows: usize| {
        x.detach().reshape((sizes.b, rows, sizes.heads, sizes.d))?.transpose(1, 2)?.contiguous() // [b, heads, rows, d]
    };
    let heads = move |x: &[&Tensor]| -> Result<[Tensor; 3]> {
        Ok([split(x[0], sizes.l)?, split(x[1], sizes.s)?, split(x[2], sizes.s)?])
    };
    let [q_heads, k_heads, v_heads] = heads(&[q, k, v])?;
    let mut tiles = Vec::new();
    for (first, rows) in tiles_of(sizes) {
        let p = probabilities(&q_heads.narrow(2, first, rows)?, &k_heads, bias.as_ref(), first, sizes)?;
        tiles.push(p.matmul(&v_heads)?); // [b, heads, rows, d]
    }
    let out = merged(&Tensor::cat(&tiles, 2)?, sizes.l, sizes)?;
    graft_tensor("attention", &[q, k, v], &out, move |inputs, result, gradient| {
        let [q, k, v] = heads(inputs)?;
        let (o, dy) = (split(result, sizes.l)?, split(gradient, sizes.l)?);
        let scale = sizes.scale::<f64>();
        let (mut dq, mut dk, mut dv) = (Vec::new(), k.zeros_like()?, v.zeros_like()?);
        for (first, rows) in tiles_of(sizes) {
            let [q, o, dy] = [q.narrow(2, first, rows)?, o.narrow(2, first, rows)?, dy.narrow(2, first, rows)?];
            let p = probabilities(&q, &k, bias.as_ref(), first, sizes)?;
            let dot = (o * &dy)?.sum_keepdim(D::Minus1)?;
            let ds = (&p * dy.matmul(&v.t()?)?.broadcast_sub(&dot)?)?;
            dq.push((ds.matmul(&k)? * scale)?);
            dk = (dk + (ds.t()?.matmul(&q.contiguous()?)? * scale)?)?;
            dv = (dv + p.t()?.matmul(&dy.contiguous()?)?)?;
        }
        let dq = merged(&Tensor::cat(&dq, 2)?, sizes.l, sizes)?;
        Ok(vec![Some(dq), Some(merged(&dk, sizes.s, sizes)?), Some(merged(&dv, sizes.s, sizes)?)])
    })
}

/// (first query, number) of tiles whose scores over the whole batch stay near 256 MB in f32.
fn tiles_of(sizes: Sizes) -> impl Iterator<Item = (usize, usize)> {
    let tile = ((64 << 20) / (sizes.b * sizes.heads * sizes.s)).clamp(16, 4096).min(sizes.l);
    (0..sizes.l).step_by(tile).map(move |first| (first, tile.min(sizes.l - first)))
}

/// The softmax of a tile's scores.
fn probabilities(q: &Tensor, k: &Tensor, bias: Option<&Tensor>, first: usize, sizes: Sizes) -> Result<Tensor> {
    let mut scores = (q.contiguous()?.matmul(&k.t()?)? * sizes.scale::<f64>())?.to_dtype(DType::F32)?;
    let rows = q.dim(2)?;
    if sizes.is_causal {
        let hidden = (0..rows * sizes.s)
            .map(|i| if i % sizes.s > first + i / sizes.s { f32::NEG_INFINITY } else { 0.0 })
            .collect();
        let hidden = Tensor::from_vec::<_, f32>(hidden, (rows, sizes.s), &Device::Cpu)?;
        scores = scores.broadcast_add(&hidden.to_device(q.device())?)?;
    }
    if let Some(bias) = bias {
        let values = bias.elem_count();
        let own = (first..first + rows).map(|query| sizes.bias_row(values, (0, query)) as u32).collect();
        let own = Tensor::from_vec::<_, u32>(own, rows, q.device())?;
        let bias = bias.to_device(q.device())?.to_dtype(DType::F32)?.index_select(&own, 1)?; // [b, rows, s]
        scores = scores.broadcast_add(&bias.unsqueeze(1)?)?;
    }
    candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(q.dtype())
}

/// `[b, heads, rows, d]` → `[b, rows, heads·d]`.
fn merged(x: &Tensor, rows: usize, sizes: Sizes) -> Result<Tensor> {
    x.transpose(1, 2)?.contiguous()?.reshape((sizes.b, rows, sizes.width()))
}

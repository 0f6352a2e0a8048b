//! Layer norm (`layer_norm.cu`).

use candle_core::{DType, Result, Tensor};

use super::group_norm::sums_of_slopes;
use super::launch::{Argument, Fresh, Launch, format_of, run, shared_limit};
use crate::ops::graft::graft_storage;

const THREADS: usize = 256;

/// A warp for each.
const ROWS_OF_BLOCK: usize = THREADS / 32;

/// Blocks that the gradients of weight and bias are summed in.
const BLOCKS: usize = 264;

/// [`crate::ops::layer_norm`], differentiable in x, weight and bias. None: no kernel for these.
pub fn layer_norm([x, weight, bias]: [&Tensor; 3], eps: f64) -> Result<Option<Tensor>> {
    let Some(format) = format_of(x) else { return Ok(None) };
    let c = weight.elem_count();
    let n = x.elem_count() / c.max(1);
    let are_alike = [weight, bias].iter().all(|affine| affine.dtype() == x.dtype() && affine.is_contiguous());
    let shared = 2 * (THREADS / c.clamp(1, THREADS)) * c * size_of::<f32>();
    if n == 0 || !are_alike || shared > shared_limit(x.device())? || i32::try_from(x.elem_count()).is_err() {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let by_rows = move |pass: &str, rows_of_block: usize, shared: usize| Launch {
        source: "layer_norm",
        kernel: format!("layer_norm_{pass}_{format}"),
        blocks: [n.div_ceil(rows_of_block), 1, 1],
        threads: THREADS,
        shared,
    };
    let (mut y, mut kept) = (Fresh::like(&x)?, Fresh::new(x.device(), (n, 2), DType::F32)?);
    let tensors = [&x, weight, bias].map(Argument::Read).into_iter();
    let outputs = [Argument::Fill(&mut y), Argument::Fill(&mut kept)];
    let numbers = [Argument::Int(n), Argument::Int(c), Argument::Float(eps as f32)];
    let launch = by_rows("forward", ROWS_OF_BLOCK, 0);
    run(x.device(), &launch, &mut tensors.chain(outputs).chain(numbers).collect::<Vec<_>>())?;
    let kept = kept.tensor();

    let backward = move |inputs: &[&Tensor], _: &Tensor, gradient: &Tensor| {
        let [x, weight, bias] = [inputs[0], inputs[1], inputs[2]];
        let dy = gradient.contiguous()?;
        let mut dx = Fresh::like(x)?;
        let tensors = [x, weight, &kept, &dy].map(Argument::Read).into_iter().chain([Argument::Fill(&mut dx)]);
        let sizes = [n, c].map(Argument::Int);
        let launch = by_rows("dx", ROWS_OF_BLOCK, 0);
        run(x.device(), &launch, &mut tensors.chain(sizes).collect::<Vec<_>>())?;

        let chunk = n.div_ceil(BLOCKS).max(ROWS_OF_BLOCK);
        let chunks = n.div_ceil(chunk);
        let mut partial = Fresh::new(x.device(), (chunks, 2, c), DType::F32)?;
        let tensors = [x, &kept, &dy].map(Argument::Read).into_iter().chain([Argument::Fill(&mut partial)]);
        let sizes = [n, c, chunk].map(Argument::Int);
        let launch = by_rows("slopes", chunk, shared);
        run(x.device(), &launch, &mut tensors.chain(sizes).collect::<Vec<_>>())?;
        let affine = Launch { blocks: [c.div_ceil(THREADS), 1, 1], ..by_rows("affine", 1, 0) };
        let [dw, db] = sums_of_slopes(affine, &partial.tensor(), chunks, [weight, bias])?;
        Ok(vec![Some(dx.tensor()), Some(dw), Some(db)])
    };
    graft_storage("layer_norm", &[&x, weight, bias], y.storage, y.shape, backward).map(Some)
}

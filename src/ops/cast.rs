//! Values in another number format.

use candle_core::{DType, Result, Tensor};

use super::graft::{graft_tensor, on_cpu};

/// `x` as `dtype`; the gradient comes back in x's own format. Networks whose parameters are f32 compute in bf16 by this: the
/// format of what comes in decides, and each layer brings its parameters to it (mixed precision, Micikevicius et al. 2018;
/// PyTorch's autocast).
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    let cast = x.to_dtype(dtype)?;
    if !on_cpu(x) {
        return Ok(cast);
    }
    graft_tensor("cast", &[x], &cast, |inputs, _, gradient| Ok(vec![Some(gradient.to_dtype(inputs[0].dtype())?)]))
}

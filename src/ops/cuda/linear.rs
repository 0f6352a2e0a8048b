//! Linear layers with a bias: matrix products by cuBLAS and the bias by a kernel (`bias.cu`), which convolutions share. As one
//! operation they keep no product for the backward pass, and the bias's gradient is summed in f32 whatever the format.

use candle_core::{D, Result, Shape, Tensor};

use super::launch::{Argument, Fresh, Launch, format_of, run};
use crate::ops::graft::graft_storage;

/// [`crate::ops::linear`] with a weight `[out, in]` or `[out, in, 1, 1]`, differentiable in x, weight and bias. None: no kernel
/// for these.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Option<Tensor>> {
    let Some(format) = format_of(x) else { return Ok(None) };
    if [weight, bias].iter().any(|own| own.dtype() != x.dtype()) || x.elem_count() == 0 {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("the caller has seen it") = bias.elem_count();
    let y = product(&rows(&x)?, &matrix(weight)?.t()?)?;
    let y = with_bias(&y, bias, format)?;
    let backward = |inputs: &[&Tensor], _: &Tensor, gradient: &Tensor| {
        let [x, weight, bias] = [inputs[0], inputs[1], inputs[2]];
        let dy = rows(&gradient.contiguous()?)?;
        let dx = x.track_op().then(|| product(&dy, &matrix(weight)?)?.reshape(x.shape())).transpose()?;
        let dw = weight.track_op().then(|| product(&dy.t()?, &rows(x)?)?.reshape(weight.shape())).transpose()?;
        Ok(vec![dx, dw, bias.track_op().then(|| bias_gradient(&dy)).transpose()?])
    };
    graft_storage("linear", &[&x, weight, bias], y.storage, Shape::from(shape), backward).map(Some)
}

/// `[.., c]` as `[m, c]`, without history.
fn rows(x: &Tensor) -> Result<Tensor> {
    x.detach().reshape(((), x.dim(D::Minus1)?))
}

/// `[out, in]`, without history.
fn matrix(weight: &Tensor) -> Result<Tensor> {
    weight.detach().contiguous()?.flatten_from(1)
}

/// x + bias, x contiguous and as wide as it.
pub fn with_bias(x: &Tensor, bias: &Tensor, format: &str) -> Result<Fresh> {
    let bias = bias.contiguous()?;
    let (few, format) = few(format, &[x, &bias], bias.elem_count());
    let n = x.elem_count() / few;
    let mut y = Fresh::like(x)?;
    let tensors = [Argument::Read(x), Argument::Read(&bias), Argument::Fill(&mut y)];
    let arguments = tensors.into_iter().chain([n, bias.elem_count() / few].map(Argument::Int));
    let launch = Launch::of_values("bias", format!("bias_{format}"), n);
    run(x.device(), &launch, &mut arguments.collect::<Vec<_>>())?;
    Ok(y)
}

/// Σ dy over all but the last dimension, as a product with ones, which cuBLAS sums in f32.
pub fn bias_gradient(dy: &Tensor) -> Result<Tensor> {
    let dy = rows(dy)?;
    product(&Tensor::ones((1, dy.dim(0)?), dy.dtype(), dy.device())?, &dy)?.squeeze(0)
}

/// How many channels a thread takes at a time, and the format of the kernel that does: 16 bytes where no row of `c` of any
/// tensor begins between them.
pub fn few(format: &str, tensors: &[&Tensor], c: usize) -> (usize, String) {
    let few = 16 / tensors[0].dtype().size_in_bytes();
    let fits = |x: &&Tensor| x.layout().start_offset().is_multiple_of(few);
    match c.is_multiple_of(few) && tensors.iter().all(fits) {
        true => (few, format!("{format}_by_{few}")),
        false => (1, format.to_owned()),
    }
}

/// a·b with sums in f32.
pub fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(test)]
    if a.device().is_cpu() {
        // Candle's CPU has no product in bf16, and sums in f16 what is f16.
        use candle_core::DType::F32;
        return a.to_dtype(F32)?.matmul(&b.to_dtype(F32)?)?.to_dtype(a.dtype());
    }
    a.matmul(b)
}

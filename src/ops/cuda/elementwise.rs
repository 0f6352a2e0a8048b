//! GEGLU, and AdamW with the averaged weights (`elementwise.cu`).

use candle_core::{DType, Result, Tensor};

use super::launch::{Argument, Fresh, Launch, format_of, run};
use crate::ops::adamw::{Factors, Moments};
use crate::ops::graft::graft_storage;

const THREADS: usize = 256;

fn launch(kernel: &str, format: &str, n: usize) -> Launch {
    Launch {
        source: "elementwise",
        kernel: format!("{kernel}_{format}"),
        blocks: [n.div_ceil(THREADS), 1, 1],
        threads: THREADS,
        shared: 0,
    }
}

/// [`crate::ops::geglu`] of rows of 2·d values. None: no kernel for these.
pub fn geglu(x: &Tensor, d: usize) -> Result<Option<Tensor>> {
    let Some(format) = format_of(x) else { return Ok(None) };
    let n = x.elem_count() / 2;
    if n == 0 || i32::try_from(x.elem_count()).is_err() {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("the caller has seen it") = d;
    let mut y = Fresh::new(x.device(), shape, x.dtype())?;
    let sizes = move || [n, d].map(Argument::Int);
    let arguments = [Argument::Read(&x), Argument::Fill(&mut y)].into_iter().chain(sizes());
    run(x.device(), &launch("geglu_forward", format, n), &mut arguments.collect::<Vec<_>>())?;
    let backward = move |inputs: &[&Tensor], _: &Tensor, gradient: &Tensor| {
        let dy = gradient.contiguous()?;
        let mut dx = Fresh::like(inputs[0])?;
        let tensors = [Argument::Read(inputs[0]), Argument::Read(&dy), Argument::Fill(&mut dx)];
        let arguments = tensors.into_iter().chain(sizes());
        run(dy.device(), &launch("geglu_backward", format, n), &mut arguments.collect::<Vec<_>>())?;
        Ok(vec![Some(dx.tensor())])
    };
    graft_storage("geglu", &[&x], y.storage, y.shape, backward).map(Some)
}

/// One AdamW update in place. False: no kernel for these, nothing was done.
pub fn adamw(parameter: &Tensor, gradient: &Tensor, moments: &Moments, f: Factors<f32>) -> Result<bool> {
    let Some(format) = format_of(gradient) else { return Ok(false) };
    let ema = moments.ema.as_ref().map(|ema| ema.as_tensor());
    let own = [parameter, moments.first.as_tensor(), moments.second.as_tensor()];
    let n = gradient.elem_count();
    let are_plain = own.into_iter().chain(ema).all(|x| x.dtype() == DType::F32 && x.is_contiguous());
    if n == 0 || !are_plain || i32::try_from(n).is_err() {
        return Ok(false);
    }
    let gradient = gradient.detach().contiguous()?;
    let factors = [f.gradient_scale, f.shrink, f.betas.0, f.betas.1, f.step_size, f.inverse_root, f.eps, f.ema_decay];
    let tensors = own.map(Argument::Change).into_iter().chain([ema.map_or(Argument::Nothing, Argument::Change)]);
    let tensors = tensors.chain([Argument::Read(&gradient), Argument::Int(n)]);
    run(
        gradient.device(),
        &launch("adamw", format, n),
        &mut tensors.chain(factors.map(Argument::Float)).collect::<Vec<_>>(),
    )?;
    Ok(true)
}

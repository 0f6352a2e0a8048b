//! GEGLU (`geglu.cu`).

use candle_core::{Result, Tensor};

use super::launch::{Argument, Fresh, Launch, format_of, run};
use crate::ops::graft::graft_storage;

fn launch(pass: &str, format: &str, n: usize) -> Launch {
    Launch::of_values("geglu", format!("geglu_{pass}_{format}"), n)
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
    run(x.device(), &launch("forward", format, n), &mut arguments.collect::<Vec<_>>())?;
    let backward = move |inputs: &[&Tensor], _: &Tensor, gradient: &Tensor| {
        let dy = gradient.contiguous()?;
        let mut dx = Fresh::like(inputs[0])?;
        let tensors = [Argument::Read(inputs[0]), Argument::Read(&dy), Argument::Fill(&mut dx)];
        let arguments = tensors.into_iter().chain(sizes());
        run(dy.device(), &launch("backward", format, n), &mut arguments.collect::<Vec<_>>())?;
        Ok(vec![Some(dx.tensor())])
    };
    graft_storage("geglu", &[&x], y.storage, y.shape, backward).map(Some)
}

//! Where the works run, for the whole process: the CPU in f32 (or in what a case says), or a GPU in bf16.

use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Result, bail};
use candle_core::{DType, Tensor};
use jedi::device::Runtime;

static PLACE: OnceLock<Runtime> = OnceLock::new();

/// By a name of `--device`. On a GPU tensors and networks that only predict are bf16, and those that are trained compute in it.
pub fn settle(name: &str) -> Result<()> {
    let device = Runtime::open(name)?.device;
    let dtype = if device.is_cpu() { DType::F32 } else { DType::BF16 };
    if PLACE.set(Runtime { device, dtype }).is_err() {
        bail!("--device {name}: the place is settled already");
    }
    Ok(())
}

/// The device, and what works compute in.
pub fn runtime() -> &'static Runtime {
    PLACE.get_or_init(Runtime::cpu)
}

/// Whether works run on a GPU.
pub fn is_gpu() -> bool {
    !runtime().device.is_cpu()
}

/// The tensor there, in what works compute in.
pub fn there(tensor: &Tensor) -> candle_core::Result<Tensor> {
    tensor.to_device(&runtime().device)?.to_dtype(runtime().dtype)
}

/// The time once all that was launched is done.
pub fn now() -> candle_core::Result<Instant> {
    runtime().device.synchronize()?;
    Ok(Instant::now())
}

/// Seconds since `started`, once all that was launched is done.
pub fn since(started: Instant) -> candle_core::Result<f64> {
    Ok(now()?.duration_since(started).as_secs_f64())
}

//! Where and in which precision the networks run: chosen once, here.

use anyhow::{Context, Result};
use candle_core::{DType, Device};

/// The device and compute dtype of a run.
#[derive(Clone, Debug)]
pub struct Runtime {
    /// Where tensors live.
    pub device: Device,
    /// Number format of the networks.
    pub dtype: DType,
}

impl Runtime {
    /// f32 on the CPU.
    pub fn cpu() -> Self {
        Self { device: Device::Cpu, dtype: DType::F32 }
    }

    /// Opens a device by name: `auto` (CUDA when this build has it and a GPU answers, else the CPU), `cpu`, `cuda`, `cuda:N`.
    pub fn open(name: &str) -> Result<Self> {
        Self::open_for(name, 0)
    }

    /// The same for process number `local` of those on this machine: where the name leaves the GPU open, each takes another
    /// one, as far as there are.
    pub fn open_for(name: &str, local: usize) -> Result<Self> {
        let index = local % n_gpus().max(1);
        let device = match name {
            "cpu" => Device::Cpu,
            "auto" => Device::cuda_if_available(index).unwrap_or(Device::Cpu),
            "cuda" => cuda(index)?,
            other => match other.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(index)) => cuda(index)?,
                _ => anyhow::bail!("--device {other}: unknown device; use auto, cpu, cuda or cuda:N"),
            },
        };
        Ok(Self { device, dtype: DType::F32 })
    }
}

/// GPUs that this process sees.
#[cfg(feature = "cuda")]
fn n_gpus() -> usize {
    // Without a driver there are none.
    candle_core::cuda_backend::cudarc::driver::CudaContext::device_count().map_or(0, |n| n.max(0) as usize)
}

#[cfg(not(feature = "cuda"))]
fn n_gpus() -> usize {
    0
}

fn cuda(index: usize) -> Result<Device> {
    Device::new_cuda(index).with_context(|| {
        format!(
            "--device cuda:{index}: no such GPU, or this binary was built without `--features cuda`; use --device cpu"
        )
    })
}

//! One launch of a kernel: what it needs to know, wherever it runs.

use candle_core::backend::BackendDevice;
use candle_core::cpu_backend::CpuDevice;
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Result, Shape, Storage, Tensor, bail};

/// A kernel and how many threads of it.
pub struct Launch {
    /// The source file that it is in, without its ending.
    pub source: &'static str,
    pub kernel: String,
    /// x, y, z.
    pub blocks: [usize; 3],
    /// In a block.
    pub threads: usize,
    /// Bytes of shared memory of a block.
    pub shared: usize,
}

impl Launch {
    /// A thread for each of n values.
    pub fn of_values(source: &'static str, kernel: String, n: usize) -> Self {
        const THREADS: usize = 256;
        Self { source, kernel, blocks: [n.div_ceil(THREADS), 1, 1], threads: THREADS, shared: 0 }
    }
}

/// What a kernel is given.
pub enum Argument<'a> {
    /// Contiguous values that it reads.
    Read(&'a Tensor),
    /// Contiguous values that it changes where they are.
    Change(&'a Tensor),
    /// Memory that it fills.
    Fill(&'a mut Fresh),
    Int(usize),
    Float(f32),
    /// No tensor.
    Nothing,
    /// Words of 8 bytes that the kernel gets by value, in one.
    Table(Vec<Argument<'a>>),
}

impl<'a> Argument<'a> {
    pub fn optional(x: Option<&'a Tensor>) -> Self {
        x.map_or(Self::Nothing, Self::Read)
    }
}

/// Memory not yet written.
pub struct Fresh {
    pub storage: Storage,
    pub shape: Shape,
}

impl Fresh {
    pub fn new(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let shape = shape.into();
        // SAFETY: whoever makes it gives it to a kernel that fills all of it before anyone reads it.
        let storage = unsafe {
            match device {
                Device::Cpu => Storage::Cpu(CpuDevice.alloc_uninit(&shape, dtype)?),
                Device::Cuda(device) => Storage::Cuda(device.alloc_uninit(&shape, dtype)?),
                Device::Metal(_) => bail!("kernels for CUDA on a device of another maker"),
            }
        };
        Ok(Self { storage, shape })
    }

    /// Of the shape and number format of `x`.
    pub fn like(x: &Tensor) -> Result<Self> {
        Self::new(x.device(), x.shape(), x.dtype())
    }

    /// Without history.
    pub fn tensor(self) -> Tensor {
        Tensor::from_storage(self.storage, self.shape, BackpropOp::none(), false)
    }
}

/// The name that kernels give the number format of `x`; None: `x` is on a device or in a format without kernels.
pub fn format_of(x: &Tensor) -> Option<&'static str> {
    let is_served = match x.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => true,
        #[cfg(test)]
        Device::Cpu => super::emulated::is_on(),
        _ => false,
    };
    match x.dtype() {
        DType::F32 if is_served => Some("f32"),
        DType::F16 if is_served => Some("f16"),
        DType::BF16 if is_served => Some("bf16"),
        _ => None,
    }
}

/// Bytes of shared memory that a block may have on this device.
pub fn shared_limit(device: &Device) -> Result<usize> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::driver::shared_limit(device),
        // An A100's.
        _ => Ok(163 << 10),
    }
}

/// Runs after what was launched before, in its time.
pub fn run(device: &Device, launch: &Launch, arguments: &mut [Argument]) -> Result<()> {
    if let Some(blocks) = launch.blocks[1..].iter().find(|blocks| **blocks > 65_535) {
        bail!("{}: a batch of {blocks} is more than a GPU takes at once; make it smaller", launch.kernel);
    }
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::driver::run(device, launch, arguments),
        #[cfg(test)]
        Device::Cpu => super::emulated::run(launch, arguments),
        _ => bail!("{}: no kernels for {device:?}", launch.kernel),
    }
}

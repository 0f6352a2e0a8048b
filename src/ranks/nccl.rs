//! NCCL: tensors from GPU to GPU, without the way through the host. MPI has started the processes and carries NCCL's key to
//! them. It is asked for copies alone: no sum is left to an order of its choosing.

use std::ops::Range;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, group_end, group_start, result::NcclError};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Device, Storage, Tensor};

/// Bytes of a key (`NCCL_UNIQUE_ID_BYTES`).
const KEY_BYTES: usize = 128;

/// The connection of this rank's GPU to those of all others. Its calls are queued behind what the GPU has to do, in the order
/// of the calls.
pub struct Nccl {
    comm: Comm,
    device: CudaDevice,
}

/// What all ranks need to find each other.
pub fn new_key() -> Result<Vec<u8>> {
    Ok(Id::new().map_err(told)?.internal().iter().map(|&byte| byte as u8).collect())
}

/// What tells a GPU from all others, on whatever machine; empty where it is none.
pub fn gpu_of(device: &Device) -> Result<Vec<u8>> {
    let Device::Cuda(device) = device else { return Ok(vec![]) };
    let uuid = device.cuda_stream().context().uuid().context("the GPU does not say which it is")?;
    Ok(uuid.bytes.iter().map(|&byte| byte as u8).collect())
}

/// Parts of these lengths, one behind the other.
pub fn one_by_one(lengths: &[usize]) -> Vec<Range<usize>> {
    let ends = lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end)
    });
    ends.zip(lengths).map(|(end, length)| end - length..end).collect()
}

impl Nccl {
    /// Joins the GPUs of all `count` ranks, whose key is that of [`new_key`] on one of them. It waits for all.
    pub fn join(device: &Device, key: &[u8], rank: usize, count: usize) -> Result<Self> {
        let Device::Cuda(device) = device else { bail!("NCCL connects GPUs") };
        ensure!(key.len() == KEY_BYTES, "NCCL's key has {} bytes, not {KEY_BYTES}", key.len());
        let mut internal = [0; KEY_BYTES];
        internal.iter_mut().zip(key).for_each(|(to, &from)| *to = from as _);
        let comm = Comm::from_rank(device.cuda_stream(), rank, count, Id::uninit(internal)).map_err(told)?;
        Ok(Self { comm, device: device.clone() })
    }

    /// Whether the tensors of `device` are those that it carries.
    pub fn is_on(&self, device: &Device) -> bool {
        matches!(device, Device::Cuda(device) if device.id() == self.device.id())
    }

    /// Sends to each rank r the part `sent[r]` of `values` (None: all are empty), and returns what the ranks sent to this one,
    /// `received[r]` numbers each, in their order; None where there are none.
    ///
    /// # Shapes
    /// - \[length], f32 → \[sum of received], f32
    pub fn swap(&self, values: Option<&Tensor>, sent: &[Range<usize>], received: &[usize]) -> Result<Option<Tensor>> {
        let values = values.map(Tensor::contiguous).transpose()?;
        let values = values.as_ref().map(Tensor::storage_and_layout);
        let own = values.as_ref().map(|(storage, layout)| view(storage, layout.start_offset())).transpose()?;
        let total = received.iter().sum();
        // An empty buffer cannot be had from CUDA.
        let mut all = (total > 0).then(|| self.device.alloc_zeros::<f32>(total)).transpose()?;
        let mut queue = || -> Result<(), NcclError> {
            for (rank, part) in sent.iter().enumerate().filter(|(_, part)| !part.is_empty()) {
                let Some(own) = &own else { continue };
                self.comm.send(&own.slice(part.clone()), rank as i32)?;
            }
            for (rank, part) in one_by_one(received).into_iter().enumerate().filter(|(_, part)| !part.is_empty()) {
                let Some(all) = &mut all else { continue };
                self.comm.recv(&mut all.slice_mut(part), rank as i32)?;
            }
            Ok(())
        };
        // Together, or each rank would wait for another one to receive.
        group_start().map_err(told)?;
        let queued = queue();
        let ended = group_end();
        queued.and(ended.map(drop)).map_err(told)?;
        Ok(all.map(|all| self.tensor(all, total)))
    }

    /// Every rank gets the `length` numbers of rank `from`, which alone gives them.
    ///
    /// # Shapes
    /// - any of `length` numbers, f32 → \[length], f32
    pub fn broadcast(&self, own: Option<&Tensor>, length: usize, from: usize) -> Result<Tensor> {
        let own = own.map(Tensor::contiguous).transpose()?;
        let own = own.as_ref().map(Tensor::storage_and_layout);
        let own = own.as_ref().map(|(storage, layout)| view(storage, layout.start_offset())).transpose()?;
        let own = own.as_ref().map(|own| own.slice(..length));
        let mut all = self.device.alloc_zeros::<f32>(length)?;
        self.comm.broadcast(own.as_ref(), &mut all, from as i32).map_err(told)?;
        Ok(self.tensor(all, length))
    }

    fn tensor(&self, values: CudaSlice<f32>, length: usize) -> Tensor {
        let storage = CudaStorage::wrap_cuda_slice(values, self.device.clone());
        Tensor::from_storage(Storage::Cuda(storage), length, BackpropOp::none(), false)
    }
}

/// From `start` on.
fn view(storage: &Storage, start: usize) -> Result<CudaView<'_, f32>> {
    let Storage::Cuda(storage) = storage else { bail!("NCCL carries what is on a GPU") };
    Ok(storage.as_cuda_slice::<f32>()?.slice(start..))
}

fn told(error: NcclError) -> anyhow::Error {
    anyhow!("NCCL: {:?}; the variable NCCL_DEBUG=INFO makes it say more", error.0)
}

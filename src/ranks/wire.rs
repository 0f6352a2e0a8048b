//! Tensors from rank to rank: from GPU to GPU by NCCL where [`Ranks::connect_gpus`] has connected them, else through the
//! host's memory and MPI. Either only carries: sums are made by the caller, who so has the same bits both ways.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};

use super::Ranks;

/// The way that the tensors of one device take. No call carries more than [`Ranks::MAX_VALUES`] values in all, but for
/// [`Wire::broadcast`].
pub struct Wire<'a> {
    ranks: &'a Ranks,
    device: Device,
}

impl Ranks {
    /// For tensors on `device`, where also what arrives will be.
    pub fn wire(&self, device: &Device) -> Wire<'_> {
        Wire { ranks: self, device: device.clone() }
    }

    /// Connects the GPUs of all ranks, so that tensors need not go through the host. False: they will, for this build has no
    /// NCCL, or a rank has no GPU of its own. To be called by all ranks.
    #[cfg(not(feature = "nccl"))]
    pub fn connect_gpus(&self, _: &Device) -> Result<bool> {
        Ok(false)
    }

    /// Connects the GPUs of all ranks, so that tensors need not go through the host. False: they will, for this build has no
    /// NCCL, or a rank has no GPU of its own. To be called by all ranks.
    #[cfg(feature = "nccl")]
    pub fn connect_gpus(&self, device: &Device) -> Result<bool> {
        use super::nccl::{Nccl, gpu_of, new_key};
        if self.count == 1 {
            return Ok(false);
        }
        let gpu = self.all_succeed(gpu_of(device))?;
        let all = self.gather_bytes(&gpu);
        let is_own = |(rank, gpu): (usize, &Vec<u8>)| !gpu.is_empty() && !all[..rank].contains(gpu);
        if !all.iter().enumerate().all(is_own) {
            return Ok(false);
        }
        let key = self.on_first(new_key)?.unwrap_or_default();
        let key = self.broadcast_bytes(key, 0);
        let joined = self.all_succeed(Nccl::join(device, &key, self.rank, self.count))?;
        Ok(self.nccl.set(joined).is_ok())
    }
}

impl Wire<'_> {
    /// Sends to each rank its part of `values`, where `lengths` has the parts in order, and returns what the ranks sent to
    /// this one, in their order; None where its part is empty.
    ///
    /// # Shapes
    /// - \[sum of lengths], f32 → \[ranks · own length], f32
    pub fn exchange(&self, values: &Tensor, lengths: &[usize]) -> Result<Option<Tensor>> {
        ensure!(values.elem_count() == lengths.iter().sum::<usize>(), "parts that are not the whole");
        let own = lengths[self.ranks.rank()];
        #[cfg(feature = "nccl")]
        if let Some(nccl) = self.nccl() {
            let received = vec![own; self.ranks.count()];
            return nccl.swap(Some(values), &super::nccl::one_by_one(lengths), &received);
        }
        let received = self.ranks.exchange(&on_host(values)?, lengths);
        (own > 0).then(|| self.tensor(received)).transpose()
    }

    /// The values of all ranks in their order; rank r gives `lengths[r]`, of which there are some in all, and None where
    /// there are none of its own.
    ///
    /// # Shapes
    /// - \[own length], f32 → \[sum of lengths], f32
    pub fn gather(&self, own: Option<&Tensor>, lengths: &[usize]) -> Result<Tensor> {
        let length = lengths[self.ranks.rank()];
        ensure!(own.map_or(0, Tensor::elem_count) == length, "another length than was told");
        #[cfg(feature = "nccl")]
        if let Some(nccl) = self.nccl() {
            use anyhow::Context as _;
            let sent = vec![0..length; self.ranks.count()];
            return nccl.swap(own, &sent, lengths)?.context("nothing to gather");
        }
        let own = own.map(on_host).transpose()?.unwrap_or_default();
        self.tensor(self.ranks.gather(&own, lengths))
    }

    /// Every rank gets the tensor of rank `from`; the others' is not looked at.
    ///
    /// # Shapes
    /// - `dims`, f32 → the same
    pub fn broadcast(&self, own: Option<&Tensor>, dims: &[usize], from: usize) -> Result<Tensor> {
        let own = own.filter(|_| self.ranks.rank() == from);
        ensure!(own.is_none_or(|own| own.dims() == dims), "another shape than was told");
        #[cfg(feature = "nccl")]
        if let Some(nccl) = self.nccl() {
            let own = own.map(|own| own.to_device(&self.device)).transpose()?;
            return Ok(nccl.broadcast(own.as_ref(), dims.iter().product(), from)?.reshape(dims)?);
        }
        let mut values = match own {
            Some(own) => on_host(own)?,
            None => vec![0.0; dims.iter().product()],
        };
        values.chunks_mut(Ranks::MAX_VALUES).for_each(|chunk| self.ranks.broadcast(chunk, from));
        Ok(self.tensor(values)?.reshape(dims)?)
    }

    #[cfg(feature = "nccl")]
    fn nccl(&self) -> Option<&super::nccl::Nccl> {
        self.ranks.nccl.get().filter(|nccl| nccl.is_on(&self.device))
    }

    fn tensor(&self, values: Vec<f32>) -> Result<Tensor> {
        let length = values.len();
        Ok(Tensor::from_vec(values, length, &Device::Cpu)?.to_device(&self.device)?)
    }
}

fn on_host(tensor: &Tensor) -> Result<Vec<f32>> {
    ensure!(tensor.dtype() == DType::F32, "what goes from rank to rank is f32, not {:?}", tensor.dtype());
    Ok(tensor.detach().flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_alone_gets_what_it_sends() {
        let ranks = Ranks::alone();
        let wire = ranks.wire(&Device::Cpu);
        let values = Tensor::new(&[1f32, 2.0, 3.0, 4.0], &Device::Cpu).unwrap();
        let flat = |tensor: Tensor| tensor.to_vec1::<f32>().unwrap();
        assert_eq!(flat(wire.exchange(&values, &[4]).unwrap().unwrap()), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(flat(wire.gather(Some(&values), &[4]).unwrap()), [1.0, 2.0, 3.0, 4.0]);
        let square = values.reshape((2, 2)).unwrap();
        assert_eq!(wire.broadcast(Some(&square), &[2, 2], 0).unwrap().dims(), [2, 2]);
        assert!(wire.exchange(&values, &[3]).is_err() && wire.gather(None, &[4]).is_err());
        assert!(wire.gather(Some(&values.to_dtype(DType::F64).unwrap()), &[4]).is_err());
    }
}

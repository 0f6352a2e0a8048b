//! Attaches a backward function to a result that is already computed.
//!
//! A kernel computes its output as a plain `Vec`; `graft` makes it a tensor whose gradient flows to the inputs through
//! the given closure. Nothing is recorded when no input needs a gradient.

use std::any::Any;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, InplaceOp1, Layout, Result, Shape,
    Storage, Tensor, bail, op::BackpropOp,
};

use super::ledger::note_operation;
use super::real::Real;
use super::tape::{self, InputGradients, Node};

/// A [`tape::BackwardFn`].
pub trait Backward: Fn(&[&Tensor], &Tensor, &Tensor) -> Result<InputGradients> + Send + Sync + 'static {}
impl<F: Fn(&[&Tensor], &Tensor, &Tensor) -> Result<InputGradients> + Send + Sync + 'static> Backward for F {}

/// What Candle calls: once for the output that is there already, and at each of its own backward passes.
struct Grafted {
    node: Arc<Node>,
    output: Mutex<Option<Storage>>,
    shape: Shape,
}

/// The tensor of `values` with `shape`, differentiable in `inputs` (one to three, on the CPU).
pub fn graft<T: Real>(
    name: &'static str,
    inputs: &[&Tensor],
    (values, shape): (Vec<T>, impl Into<Shape>),
    backward: impl Backward,
) -> Result<Tensor> {
    let storage = Storage::Cpu(T::to_cpu_storage_owned(values));
    graft_storage(name, inputs, storage, shape.into(), backward)
}

/// The same for an output that was computed by tensor operations on any device.
pub fn graft_tensor(
    name: &'static str,
    inputs: &[&Tensor],
    output: &Tensor,
    backward: impl Backward,
) -> Result<Tensor> {
    if !inputs.iter().any(|input| input.track_op()) {
        return output.detach().contiguous();
    }
    let mut output = output.detach().contiguous()?;
    // What is copied below is the storage from its start.
    if output.layout().start_offset() != 0 {
        output = output.force_contiguous()?;
    }
    let (storage, layout) = output.storage_and_layout();
    let storage = storage.try_clone(layout)?;
    graft_storage(name, inputs, storage, output.shape().clone(), backward)
}

/// The same for memory that a kernel has filled.
pub fn graft_storage(
    name: &'static str,
    inputs: &[&Tensor],
    storage: Storage,
    shape: Shape,
    backward: impl Backward,
) -> Result<Tensor> {
    note_operation();
    if !inputs.iter().any(|input| input.track_op()) {
        return Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false));
    }
    let node = Node::new(name, inputs, Box::new(backward));
    let op = Grafted { node: node.clone(), output: Mutex::new(Some(storage)), shape };
    let output = match inputs {
        [a] => a.apply_op1(op),
        [a, b] => a.apply_op2(b, op),
        [a, b, c] => a.apply_op3(b, c, op),
        _ => bail!("{name}: one to three inputs, got {}", inputs.len()),
    }?;
    tape::record(&node, &output);
    Ok(output)
}

impl Grafted {
    fn take(&self) -> Result<Storage> {
        match self.output.lock().expect("no panic while held").take() {
            Some(storage) => Ok(storage),
            None => bail!("{}: forward called twice", self.node.name),
        }
    }

    fn take_cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            Storage::Cpu(storage) => Ok((storage, self.shape.clone())),
            _ => bail!("{}: inputs and output are on different devices", self.node.name),
        }
    }

    fn take_cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            Storage::Cuda(storage) => Ok((storage, self.shape.clone())),
            _ => bail!("{}: inputs and output are on different devices", self.node.name),
        }
    }
}

impl CustomOp1 for Grafted {
    fn name(&self) -> &'static str {
        self.node.name
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }
    fn bwd(&self, a: &Tensor, result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let mut gradients = (self.node.backward)(&[a], result, gradient)?;
        Ok(gradients.remove(0))
    }
}

impl CustomOp2 for Grafted {
    fn name(&self) -> &'static str {
        self.node.name
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut gradients = (self.node.backward)(&[a, b], result, gradient)?.into_iter();
        Ok((gradients.next().flatten(), gradients.next().flatten()))
    }
}

impl CustomOp3 for Grafted {
    fn name(&self) -> &'static str {
        self.node.name
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = (self.node.backward)(&[a, b, c], result, gradient)?.into_iter();
        Ok((gradients.next().flatten(), gradients.next().flatten(), gradients.next().flatten()))
    }
}

#[cfg(test)]
thread_local! {
    static COMPOSED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs `f` with the CPU kernels off on this thread: its operations are composed as on the other devices.
#[cfg(test)]
pub fn composed<R>(f: impl FnOnce() -> R) -> R {
    struct KernelsBack;
    impl Drop for KernelsBack {
        fn drop(&mut self) {
            COMPOSED.set(false);
        }
    }
    COMPOSED.set(true);
    let _back = KernelsBack;
    f()
}

/// Whether the CPU kernels serve this tensor; the others go through Candle's primitives.
pub fn on_cpu(x: &Tensor) -> bool {
    #[cfg(test)]
    if COMPOSED.get() {
        return false;
    }
    matches!(x.device(), Device::Cpu) && matches!(x.dtype(), DType::F32 | DType::F64)
}

/// Calls `f` with the values of a contiguous CPU tensor.
pub fn with_values<T: Real, R>(x: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    Ok(f(values_in(&storage, layout)?))
}

/// The values of a contiguous CPU tensor in its storage.
pub fn values_in<'a, T: Real>(storage: &'a Storage, layout: &Layout) -> Result<&'a [T]> {
    let Storage::Cpu(storage) = storage else { bail!("the CPU kernels need tensors on the CPU") };
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("the CPU kernels need contiguous tensors") };
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
}

/// Calls `f` with the values of a contiguous CPU tensor, to change them where they are (parameters and their moments,
/// gradients that are added up).
pub fn with_values_mut<T: Real, R: Send>(x: &Tensor, f: impl FnOnce(&mut [T]) -> R + Send) -> Result<R> {
    struct InPlace<F, T, R>(Mutex<(Option<F>, Option<R>)>, PhantomData<fn(T)>);
    impl<T: Real, R: Send, F: FnOnce(&mut [T]) -> R + Send> InplaceOp1 for InPlace<F, T, R> {
        fn name(&self) -> &'static str {
            "with_values_mut"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let values: &mut dyn Any = match storage {
                CpuStorage::F32(values) => values,
                CpuStorage::F64(values) => values,
                _ => bail!("with_values_mut: the tensor must be f32 or f64"),
            };
            let Some(values) = values.downcast_mut::<Vec<T>>() else {
                bail!("with_values_mut: the tensor must be {:?}", T::DTYPE)
            };
            let Some((start, end)) = layout.contiguous_offsets() else {
                bail!("with_values_mut: the tensor must be contiguous")
            };
            let mut slot = self.0.lock().expect("no panic while held");
            if let Some(f) = slot.0.take() {
                slot.1 = Some(f(&mut values[start..end]));
            }
            Ok(())
        }
    }
    let op = InPlace(Mutex::new((Some(f), None)), PhantomData);
    x.inplace_op1(&op)?;
    let result = op.0.into_inner().expect("no panic while held").1;
    result.ok_or_else(|| candle_core::Error::Msg("with_values_mut: the kernel did not run".into()))
}

/// A CPU tensor from kernel output, without history.
pub fn tensor<T: Real>(values: Vec<T>, shape: impl Into<Shape>) -> Tensor {
    let storage = Storage::Cpu(T::to_cpu_storage_owned(values));
    let tensor = Tensor::from_storage(storage, shape, BackpropOp::none(), false);
    tape::note_made(&tensor);
    tensor
}

/// Runs a kernel generic over the float type of `$x` with `$T` bound to f32 or f64.
macro_rules! for_float {
    ($x:expr, $T:ident => $body:expr) => {
        match $x.dtype() {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => candle_core::bail!("the CPU kernels compute in f32 or f64, not {other:?}"),
        }
    };
}
pub(super) use for_float;

//! Convolution by cuDNN (feature `cudnn`), channel-last, sums in f32. Its algorithms are asked for once for each shape; shapes
//! that it does not take, and paddings of unequal sides, are left to the products of patches in `conv`.
//!
//! f32 is multiplied as f32, not in the 10 bits of TF32.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cudnn::sys::{
    cudnnConvolutionBwdDataAlgo_t, cudnnConvolutionBwdFilterAlgo_t, cudnnConvolutionFwdAlgo_t, cudnnConvolutionMode_t,
    cudnnDataType_t, cudnnMathType_t, cudnnTensorFormat_t,
};
use candle_core::cuda_backend::cudarc::cudnn::{
    ConvBackwardData, ConvBackwardFilter, ConvDescriptor, ConvForward, Cudnn, CudnnDataType, FilterDescriptor,
    TensorDescriptor,
};
use candle_core::cuda_backend::cudarc::driver::{CudaView, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, DeviceId};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType, bail};

use super::conv::Pass;
use crate::ops::conv::Geometry;

/// Bytes that tensors begin at a multiple of, for an algorithm chosen by their shapes alone; memory does of itself.
const ALIGNMENT: usize = 16;

/// How cuDNN computes a shape.
#[derive(Clone, Copy)]
struct Choice {
    algorithm: Algorithm,
    /// Bytes that it works in.
    workspace: usize,
}

#[derive(Clone, Copy)]
enum Algorithm {
    Forward(cudnnConvolutionFwdAlgo_t),
    InputGradient(cudnnConvolutionBwdDataAlgo_t),
    WeightGradient(cudnnConvolutionBwdFilterAlgo_t),
}

/// What a thread has of a GPU: cuDNN's handles must not pass from one to another.
struct Library {
    handle: Arc<Cudnn>,
    /// None: cuDNN does not take it.
    chosen: HashMap<(Pass, DType, Geometry), Option<Choice>>,
}

thread_local! {
    static LIBRARIES: RefCell<HashMap<DeviceId, Library>> = RefCell::default();
}

/// One pass of a convolution of contiguous tensors, without bias. None: cuDNN does not take it, or they are not on a GPU.
pub fn convolve(pass: Pass, factors: [&Tensor; 2], geometry: Geometry) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = factors[0].device() else { return Ok(None) };
    let [top, bottom, left, right] = geometry.conv.pad;
    let begins_evenly = |x: &&Tensor| (x.layout().start_offset() * x.dtype().size_in_bytes()).is_multiple_of(ALIGNMENT);
    if top != bottom || left != right || !factors.iter().all(begins_evenly) {
        return Ok(None);
    }
    LIBRARIES.with_borrow_mut(|libraries| {
        let library = match libraries.entry(device.id()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                new.insert(Library { handle: Cudnn::new(device.cuda_stream())?, chosen: HashMap::new() })
            }
        };
        match factors[0].dtype() {
            DType::F32 => library.convolve::<f32>(pass, factors, geometry, device),
            DType::F16 => library.convolve::<half::f16>(pass, factors, geometry, device),
            DType::BF16 => library.convolve::<half::bf16>(pass, factors, geometry, device),
            _ => Ok(None),
        }
    })
}

impl Library {
    fn convolve<T: WithDType + CudaDType + CudnnDataType + DeviceRepr>(
        &mut self,
        pass: Pass,
        factors: [&Tensor; 2],
        geometry: Geometry,
        device: &CudaDevice,
    ) -> Result<Option<Tensor>> {
        let shapes = Shapes::<T>::new(&self.handle, geometry)?;
        let choice = self.chosen.entry((pass, T::DTYPE, geometry)).or_insert_with(|| shapes.choose(pass).ok());
        let Some(Choice { algorithm, workspace }) = *choice else { return Ok(None) };
        let Geometry { images, input: (h, w), output: (h_out, w_out), channels: (c, out), .. } = geometry;
        let shape = match pass {
            Pass::Forward => Shape::from((images, h_out, w_out, out)),
            Pass::InputGradient => Shape::from((images, h, w, c)),
            Pass::WeightGradient => Shape::from((out, geometry.patch())),
        };
        let [first, second] = factors.map(Tensor::storage_and_layout);
        let (a, b) = (values::<T>(&first.0, first.1)?, values::<T>(&second.0, second.1)?);
        let once = (T::from_f64(1.0), T::from_f64(0.0)); // the product, and nothing of what lies there
        // SAFETY: tensors are as large as their descriptors say, the result is filled whole, and the workspace has the bytes
        // that were asked for.
        let result = unsafe {
            let mut result = device.alloc::<T>(shape.elem_count())?;
            let workspace = &mut device.alloc::<u8>(workspace.max(1))?;
            let workspace = Some(workspace);
            match algorithm {
                Algorithm::Forward(way) => shapes.forward().launch(way, workspace, once, &a, &b, &mut result),
                Algorithm::InputGradient(way) => {
                    shapes.input_gradient().launch(way, workspace, once, &mut result, &b, &a)
                }
                Algorithm::WeightGradient(way) => {
                    shapes.weight_gradient().launch(way, workspace, once, &b, &mut result, &a)
                }
            }?;
            result
        };
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(result, device.clone()));
        Ok(Some(Tensor::from_storage(storage, shape, BackpropOp::none(), false)))
    }
}

/// The values of a contiguous tensor.
fn values<'a, T: CudaDType>(storage: &'a Storage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let Storage::Cuda(storage) = storage else { bail!("convolution: tensors of one on different devices") };
    let Some((first, last)) = layout.contiguous_offsets() else {
        bail!("convolution: a tensor that is not contiguous")
    };
    Ok(storage.as_cuda_slice::<T>()?.slice(first..last))
}

/// cuDNN's descriptors of a convolution. It names dimensions in the order of channel-first tensors, wherever they lie.
struct Shapes<T> {
    x: TensorDescriptor<T>,
    weight: FilterDescriptor<T>,
    y: TensorDescriptor<T>,
    convolution: ConvDescriptor<f32>,
}

impl<T: CudnnDataType> Shapes<T> {
    fn new(handle: &Arc<Cudnn>, geometry: Geometry) -> Result<Self> {
        const LAST: cudnnTensorFormat_t = cudnnTensorFormat_t::CUDNN_TENSOR_NHWC;
        let Geometry { images, input: (h, w), output: (h_out, w_out), channels: (c, out), kernel, conv } = geometry;
        let [top, _, left, _] = conv.pad;
        let correlation = cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
        let stride = conv.stride as i32;
        let mut convolution = handle.create_conv2d([top as i32, left as i32], [stride; 2], [1; 2], correlation)?;
        // What f32 is multiplied in; the narrower formats have tensor cores of their own.
        convolution.set_math_type(match T::DATA_TYPE {
            cudnnDataType_t::CUDNN_DATA_FLOAT => cudnnMathType_t::CUDNN_FMA_MATH,
            _ => cudnnMathType_t::CUDNN_DEFAULT_MATH,
        })?;
        let sizes = |sizes: [usize; 4]| sizes.map(|size| size as i32);
        Ok(Self {
            x: handle.create_4d_tensor(LAST, sizes([images, c, h, w]))?,
            weight: handle.create_4d_filter(LAST, sizes([out, c, kernel, kernel]))?,
            y: handle.create_4d_tensor(LAST, sizes([images, out, h_out, w_out]))?,
            convolution,
        })
    }

    fn forward(&self) -> ConvForward<'_, T, f32, T> {
        ConvForward { conv: &self.convolution, x: &self.x, w: &self.weight, y: &self.y }
    }

    fn input_gradient(&self) -> ConvBackwardData<'_, T, f32, T> {
        ConvBackwardData { conv: &self.convolution, dx: &self.x, w: &self.weight, dy: &self.y }
    }

    fn weight_gradient(&self) -> ConvBackwardFilter<'_, T, f32, T> {
        ConvBackwardFilter { conv: &self.convolution, x: &self.x, dw: &self.weight, dy: &self.y }
    }

    /// What cuDNN expects to be the fastest, but in place of those that add in an order that varies the first that does not.
    fn choose(&self, pass: Pass) -> Result<Choice> {
        use cudnnConvolutionBwdDataAlgo_t as Data;
        use cudnnConvolutionBwdFilterAlgo_t as Filter;
        Ok(match pass {
            Pass::Forward => {
                let way = self.forward().pick_algorithm()?;
                Choice { algorithm: Algorithm::Forward(way), workspace: self.forward().get_workspace_size(way)? }
            }
            Pass::InputGradient => {
                let gradient = self.input_gradient();
                let way = match gradient.pick_algorithm()? {
                    Data::CUDNN_CONVOLUTION_BWD_DATA_ALGO_0 => Data::CUDNN_CONVOLUTION_BWD_DATA_ALGO_1,
                    way => way,
                };
                Choice { algorithm: Algorithm::InputGradient(way), workspace: gradient.get_workspace_size(way)? }
            }
            Pass::WeightGradient => {
                let gradient = self.weight_gradient();
                let way = match gradient.pick_algorithm()? {
                    Filter::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_0 | Filter::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_3 => {
                        Filter::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1
                    }
                    way => way,
                };
                Choice { algorithm: Algorithm::WeightGradient(way), workspace: gradient.get_workspace_size(way)? }
            }
        })
    }
}

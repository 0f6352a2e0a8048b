//! Launches through the driver, on the stream that Candle's own operations run on.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use candle_core::cuda_backend::cudarc::driver::sys::{CUdevice_attribute_enum, CUfunction_attribute_enum};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, LaunchConfig, PushKernelArg, SyncOnDrop,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Result, Storage, StorageRef, bail};

use super::launch::{Argument, Launch};

/// Machine code for sm_80 and sm_90, and PTX that later GPUs compile for themselves, from `build.rs`.
const IMAGES: [(&str, &[u8]); 8] = [
    ("attention_forward", include_bytes!(concat!(env!("OUT_DIR"), "/attention_forward.fatbin"))),
    ("attention_backward", include_bytes!(concat!(env!("OUT_DIR"), "/attention_backward.fatbin"))),
    ("group_norm", include_bytes!(concat!(env!("OUT_DIR"), "/group_norm.fatbin"))),
    ("layer_norm", include_bytes!(concat!(env!("OUT_DIR"), "/layer_norm.fatbin"))),
    ("bias", include_bytes!(concat!(env!("OUT_DIR"), "/bias.fatbin"))),
    ("conv", include_bytes!(concat!(env!("OUT_DIR"), "/conv.fatbin"))),
    ("geglu", include_bytes!(concat!(env!("OUT_DIR"), "/geglu.fatbin"))),
    ("update", include_bytes!(concat!(env!("OUT_DIR"), "/update.fatbin"))),
];

/// What was loaded stays: there are few kernels, and a process uses most of them.
#[derive(Default)]
struct Loaded {
    /// By GPU and source.
    modules: HashMap<(usize, &'static str), Arc<CudaModule>>,
    /// By GPU and name.
    functions: HashMap<(usize, String), CudaFunction>,
}

static LOADED: LazyLock<Mutex<Loaded>> = LazyLock::new(Mutex::default);

fn function(stream: &CudaStream, launch: &Launch) -> Result<CudaFunction> {
    let context = stream.context();
    let mut loaded = LOADED.lock().expect("no panic while held");
    let key = (context.ordinal(), launch.kernel.clone());
    if let Some(function) = loaded.functions.get(&key) {
        return Ok(function.clone());
    }
    let module = match loaded.modules.get(&(context.ordinal(), launch.source)) {
        Some(module) => module.clone(),
        None => {
            let Some((_, image)) = IMAGES.iter().find(|(source, _)| *source == launch.source) else {
                bail!("{}: no image of {}", launch.kernel, launch.source)
            };
            let module = context.load_module(Ptx::from_binary(image.to_vec())).w()?;
            loaded.modules.insert((context.ordinal(), launch.source), module.clone());
            module
        }
    };
    let function = module.load_function(&launch.kernel).w()?;
    // More than 48 kB have to be asked for; later launches of a norm may take more than this one.
    let most = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    function.set_attribute(most, shared_limit_of(stream)? as i32).w()?;
    loaded.functions.insert(key, function.clone());
    Ok(function)
}

fn shared_limit_of(stream: &CudaStream) -> Result<usize> {
    let most = CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    Ok(stream.context().attribute(most).w()?.max(0) as usize)
}

/// Bytes of shared memory that a block may have.
pub fn shared_limit(device: &CudaDevice) -> Result<usize> {
    shared_limit_of(&device.cuda_stream())
}

/// Puts a launch on the stream.
pub fn run(device: &CudaDevice, launch: &Launch, arguments: &mut [Argument]) -> Result<()> {
    let stream = device.cuda_stream();
    let function = function(&stream, launch)?;
    if let Some(value) = arguments.iter().find_map(too_large) {
        bail!("{}: {value} is more than the kernel can count", launch.kernel);
    }
    let words: Vec<&Argument> = arguments.iter().flat_map(words_of).collect();
    // Tensors are held until the launch is on the stream; what frees or changes them comes behind it there.
    let mut held = Vec::with_capacity(words.len());
    for word in &words {
        held.push(match word {
            Argument::Read(x) | Argument::Change(x) => Some(storage_of(x)?),
            _ => None,
        });
    }
    // Of 8 bytes each; numbers of 4 bytes are in the lower ones, which come first.
    let mut values: Vec<u64> = Vec::with_capacity(words.len());
    let mut uses = Vec::new();
    for (word, held) in words.iter().zip(&held) {
        values.push(match (word, held) {
            (Argument::Fill(fresh), _) => {
                let Storage::Cuda(storage) = &fresh.storage else { bail!("{}: not on the GPU", launch.kernel) };
                address(storage, &stream, &mut uses)?
            }
            (_, Some((storage, start))) => {
                let Storage::Cuda(storage) = &**storage else { bail!("{}: not on the GPU", launch.kernel) };
                address(storage, &stream, &mut uses)? + start
            }
            (Argument::Int(value), _) => *value as u64,
            (Argument::Float(value), _) => value.to_bits().into(),
            _ => 0,
        });
    }
    let [x, y, z] = launch.blocks.map(|blocks| blocks as u32);
    let config = LaunchConfig {
        grid_dim: (x, y, z),
        block_dim: (launch.threads as u32, 1, 1),
        shared_mem_bytes: launch.shared as u32,
    };
    let mut builder = stream.launch_builder(&function);
    let mut rest = &*values;
    for argument in arguments.iter() {
        let (own, others) = rest.split_at(words_of(argument).len());
        builder.arg(&own[0]);
        rest = others;
    }
    // SAFETY: the arguments are those of the kernel, in its order, a table as long as the kernel's; each tensor is as large
    // as the sizes given say.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

fn words_of<'a, 'b>(argument: &'b Argument<'a>) -> &'b [Argument<'a>] {
    match argument {
        Argument::Table(words) => words,
        own => std::slice::from_ref(own),
    }
}

/// A number that a kernel's `int` cannot hold.
fn too_large(argument: &Argument) -> Option<usize> {
    match argument {
        Argument::Int(value) if i32::try_from(*value).is_err() => Some(*value),
        _ => None,
    }
}

/// Where a tensor is, and its first byte there.
fn storage_of(x: &candle_core::Tensor) -> Result<(StorageRef<'_>, u64)> {
    if !x.is_contiguous() {
        bail!("a kernel was given a tensor that is not contiguous");
    }
    let (storage, layout) = x.storage_and_layout();
    Ok((storage, (layout.start_offset() * x.dtype().size_in_bytes()) as u64))
}

/// The address of the memory, and what keeps other streams from it meanwhile.
fn address<'a>(storage: &'a CudaStorage, stream: &'a CudaStream, uses: &mut Vec<SyncOnDrop<'a>>) -> Result<u64> {
    fn of<'a, T>(slice: &'a CudaSlice<T>, stream: &'a CudaStream, uses: &mut Vec<SyncOnDrop<'a>>) -> u64 {
        let (address, guard) = slice.device_ptr(stream);
        uses.push(guard);
        address
    }
    Ok(match &storage.slice {
        CudaStorageSlice::F32(slice) => of(slice, stream, uses),
        CudaStorageSlice::F16(slice) => of(slice, stream, uses),
        CudaStorageSlice::BF16(slice) => of(slice, stream, uses),
        _ => bail!("kernels take f32, f16 and bf16"),
    })
}

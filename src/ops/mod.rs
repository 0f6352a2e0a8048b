//! Differentiable operations, channel-last: pictures are `[b, h, w, c]`, tokens `[b, l, c]`.
//!
//! Every one but [`deformable_sample`] has gradients for all its inputs (several of Candle's own fused ones lose them without an error), for
//! [`backward()`] and for Candle's own backward pass, which is the reference in tests. On the CPU [`backward()`] follows
//! nothing but the operations of this room: trainable code takes its additions and reshapes from here too.
//!
//! On the CPU they are kernels in f32 or f64, multi-threaded, their matrix products done on the tile unit where a machine
//! has one (`tiles`), else by `product`, which leaves f64 and CPUs other than x86 to the `gemm` crate; on NVIDIA GPUs kernels of ours (`cuda`) where there are, else, and on
//! other devices, compositions of Candle's differentiable primitives.
//! `finite_differences.rs` holds the kernels' gradients to central differences in f64, `twins.rs` the compositions to the
//! kernels, `tests/parity.rs` the kernels to PyTorch, and `gradient_flow.rs` the backward pass to its promises.

mod abilities;
mod any_batch;
mod backward;
mod buffer;
mod cast;
mod checkpoint;
#[cfg(any(feature = "cuda", test))]
mod cuda;
#[cfg(not(any(feature = "cuda", test)))]
#[path = "cuda/absent.rs"]
mod cuda;
mod graft;
mod joined;
mod lanes;
mod ledger;
mod memory;
mod packed;
mod parallel;
mod precision;
mod product;
mod real;
mod tape;
mod threads;
#[cfg(target_arch = "x86_64")]
mod tiles;
#[cfg(not(target_arch = "x86_64"))]
#[path = "tiles/elsewhere.rs"]
mod tiles;
mod transpose;

mod activation;
mod adamw;
mod agreement;
mod attention;
mod conv;
mod conv_wide;
mod deformable;
mod elementwise;
mod embedding;
mod group_norm;
mod layer_norm;
mod linear;
mod resample;
mod shape;
mod sums;
mod winograd;

pub use abilities::{instructions, threads};
pub use activation::{geglu, gelu, quick_gelu, silu};
pub use adamw::{AdamW, Moments, Parameter};
pub use agreement::{Agreement, agreement};
pub use any_batch::alike_in_any_batch;
pub use attention::{Mask, attention};
pub use backward::{Gradients, backward, backward_from};
pub use cast::cast;
pub use checkpoint::checkpoint;
pub use conv::{Conv2d, conv2d, conv2d_packed};
pub use deformable::deformable_sample;
pub use elementwise::{abs, add, affine, clamp, exp, mul, square, sub};
pub use embedding::embed;
pub use group_norm::{Activation, Groups, group_norm};
pub use layer_norm::layer_norm;
pub use ledger::trace_memory;
pub use linear::{add_per_image, linear, linear_packed};
pub use memory::{fit_threads, keep_freed_memory, peak_resident_bytes, resident_bytes};
pub use packed::Packed;
pub use precision::{Precision, set_matmul_precision};
pub use resample::upsample2x;
pub use shape::{concat, narrow, repeat_rows, reshape, to_channels_first, to_channels_last};
pub use sums::{global_norm, mean_all};

#[cfg(test)]
mod finite_differences;
#[cfg(test)]
mod gradient_flow;
#[cfg(test)]
mod twins;

//! Kernels of ours for NVIDIA GPUs, behind the same functions as the CPU's, in f32, f16 and bf16 with sums in f32.
//!
//! They are CUDA C++ (`*.cu`), compiled by `build.rs` for sm_80 and sm_90 with PTX for later ones. Each operation here says
//! with `None` that it has no kernel for such inputs; the composition of Candle's operations serves them then. The tests
//! run the very same sources on the CPU (`emulated`), watched for races and for accesses outside of the tensors, against
//! the CPU's kernels.

mod attention;
mod conv;
mod geglu;
mod group_norm;
mod launch;
mod layer_norm;
mod linear;
mod update;

#[cfg(feature = "cudnn")]
mod cudnn;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(test)]
mod emulated;
#[cfg(test)]
mod twins;

pub use attention::attention;
pub use conv::conv2d;
pub use geglu::geglu;
pub use group_norm::group_norm;
pub use layer_norm::layer_norm;
pub use linear::linear;
pub use update::{adamw, sum_of_squares};

//! The mathematics of diffusion, without networks: noise schedule, loss, guidance, samplers.

pub mod guidance;
pub mod samplers;
pub mod schedule;

pub use guidance::{Branch, Guidance, Restraint};
pub use samplers::{Level, Sampler};
pub use schedule::{NoiseSchedule, ScheduleConfig};

use candle_core::{DType, Result, Tensor};

use crate::ops;

/// Mean squared error over all images of all sets (equation 2), in f32.
///
/// # Shapes
/// - prediction, target of one shape → scalar
pub fn mse(prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
    let difference = ops::sub(&prediction.to_dtype(DType::F32)?, &target.to_dtype(DType::F32)?)?;
    ops::mean_all(&ops::square(&difference)?)
}

//! In builds without CUDA no operation has a kernel for other devices.

use candle_core::{Result, Tensor};

use super::adamw::{Factors, Parameter};
use super::attention::Sizes;
use super::conv::Geometry;
use super::group_norm::{Activation, Groups};

/// None.
pub fn attention(_: [&Tensor; 3], _: Option<&Tensor>, _: Sizes) -> Result<Option<Tensor>> {
    Ok(None)
}

/// None.
pub fn conv2d(_: [&Tensor; 2], _: Option<&Tensor>, _: Geometry) -> Result<Option<Tensor>> {
    Ok(None)
}

/// None.
pub fn group_norm(_: [&Tensor; 3], _: Groups, _: Activation) -> Result<Option<Tensor>> {
    Ok(None)
}

/// None.
pub fn linear(_: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
    Ok(None)
}

/// None.
pub fn layer_norm(_: [&Tensor; 3], _: f64) -> Result<Option<Tensor>> {
    Ok(None)
}

/// None.
pub fn geglu(_: &Tensor, _: usize) -> Result<Option<Tensor>> {
    Ok(None)
}

/// False.
pub fn adamw(_: &[Parameter], _: Factors<f32>) -> Result<bool> {
    Ok(false)
}

/// None.
pub fn sum_of_squares(_: &[Tensor]) -> Result<Option<f64>> {
    Ok(None)
}

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

/// [`mse`] with weights of images, or of places.
///
/// # Shapes
/// - prediction, target of one shape, weights of one that broadcasts to it → scalar
pub fn weighted_mse(prediction: &Tensor, target: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let difference = ops::sub(&prediction.to_dtype(DType::F32)?, &target.to_dtype(DType::F32)?)?;
    let weights = weights.broadcast_as(difference.shape())?.contiguous()?;
    ops::mean_all(&ops::mul(&ops::square(&difference)?, &weights)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn weights_multiply_the_errors_and_their_gradients() {
        let prediction = Var::new(&[[1f32, 2.0], [3.0, 5.0]], &Device::Cpu).unwrap();
        let target = Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
        let loss = weighted_mse(&prediction, &target, &Tensor::new(&[[0.5f32], [2.0]], &Device::Cpu).unwrap()).unwrap();
        // (0.5·(1 + 4) + 2·(9 + 25)) / 4
        assert_eq!(loss.to_scalar::<f32>().unwrap(), 17.625);
        let gradients = ops::backward(loss).unwrap();
        // 2·weight·difference / 4
        let found = gradients.get(&prediction).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(found, [[0.25, 0.5], [3.0, 5.0]]);
        let plain = mse(&prediction, &target).unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(
            weighted_mse(&prediction, &target, &Tensor::ones((2, 1), DType::F32, &Device::Cpu).unwrap())
                .unwrap()
                .to_scalar::<f32>()
                .unwrap(),
            plain
        );
    }
}

//! The U-Net against diffusers with a coupling attention processor: prediction, loss and every parameter's gradient.

use candle_core::Tensor;
use jedi::diffusion::mse;
use jedi::model::{JointUnet, UnetConfig};
use jedi::ops::backward;
use jedi::shape::SetShape;

use crate::compare::Comparison;
use crate::golden::{Golden, compare_digests, compare_gradients, gradients, pipeline_part};

fn weights_of(name: &str) -> (UnetConfig, Golden) {
    let golden = Golden::open(name);
    (golden.fact("config"), golden)
}

fn check(name: &str, (config, weights): (UnetConfig, Golden)) {
    let (unet, vars) = JointUnet::new(&config, weights.params(name)).unwrap();
    let cases = Golden::open(&format!("{name}-cases"));
    let whole = Golden::open(&format!("{name}-gradients"));
    let (tolerance, gradient_tolerance): (f64, f64) = (cases.fact("tolerance"), cases.fact("gradient_tolerance"));
    let mut comparison = Comparison::default();
    comparison.names("parameters", &vars, &whole.tensors);
    for images in 1..=4 {
        let case = cases.below(&format!("n{images}."));
        let input = Tensor::cat(&[&case["noisy"], &case["mask"], &case["reference"]], 1).unwrap();
        let shape = SetShape::from_total(input.dim(0).unwrap(), images).unwrap();
        let eps = unet.forward(&input, &case["timesteps"], &case["context"], shape).unwrap();
        comparison.tensor(&format!("{name} n{images} eps"), &eps, &case["eps"], tolerance);
        let loss = mse(&eps, &case["noise"]).unwrap();
        comparison.tensor(&format!("{name} n{images} loss"), &loss.reshape(1).unwrap(), &case["loss"], tolerance);
        let found = gradients(&vars, &backward(loss).unwrap(), &mut comparison);
        compare_digests(&mut comparison, &format!("n{images}"), &found, &case["gradients"], gradient_tolerance);
        if images == 3 {
            compare_gradients(&mut comparison, &found, &whole.tensors, gradient_tolerance);
        }
    }
    comparison.finish();
}

#[test]
fn sd1_unet_is_diffusers_with_coupled_attention() {
    check("unet-sd1", pipeline_part("unet", "diffusion_pytorch_model"));
}

#[test]
fn sd2_unet_is_diffusers_with_coupled_attention() {
    check("unet-sd2", weights_of("unet-sd2"));
}

#[test]
fn cross_attention_blocks_are_diffusers() {
    check("block-cross", weights_of("block-cross"));
}

#[test]
fn plain_blocks_are_diffusers() {
    check("block-plain", weights_of("block-plain"));
}

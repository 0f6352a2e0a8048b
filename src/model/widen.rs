//! A plain Stable Diffusion U-Net becomes a joint one by a first layer that does not yet see mask and reference.

use anyhow::{Context as _, Result, ensure};
use candle_core::Tensor;

use super::weights::Weights;

/// The layer that takes the U-Net's input.
pub const CONV_IN: &str = "conv_in.weight";

/// Channels that the first layer takes.
pub fn input_channels(unet: &Weights) -> Result<usize> {
    let origin = unet.origin();
    let conv_in = unet.tensors().get(CONV_IN).with_context(|| format!("{origin}: tensor {CONV_IN} is missing"))?;
    let shape = conv_in.shape();
    ensure!(shape.len() == 4, "{origin}: {CONV_IN} has shape {shape:?}, not that of a convolution");
    Ok(shape[1])
}

/// The first layer takes so many channels and does not look at the new ones, which stand behind the old.
pub fn widen(unet: &mut Weights, channels: usize) -> Result<()> {
    let weight = unet.load(CONV_IN)?; // [out, c, kh, kw]
    let (out, c, kh, kw) = weight.dims4()?;
    ensure!(channels >= c, "{}: {CONV_IN} takes {c} channels, more than {channels}", unet.origin());
    let zeros = Tensor::zeros((out, channels - c, kh, kw), weight.dtype(), weight.device())?;
    unet.insert(CONV_IN, Tensor::cat(&[&weight, &zeros], 1)?); // [out, channels, kh, kw]
    Ok(())
}

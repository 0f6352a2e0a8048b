//! What is measured: `benches/cases.json`, on a GPU `benches/gpu_cases.json`, which `scripts/bench_vs_torch.py` reads too, so
//! that both sides do the same.

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::place;

/// A work under the name that asks for it.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    pub name: String,
    #[serde(flatten)]
    pub work: Work,
}

/// Which part of a differentiable work is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pass {
    /// Without history.
    Forward,
    /// The gradients of all inputs; the forward pass before it is not timed.
    Backward,
    Both,
}

/// One operation or network with its shapes. Pictures have `size` pixels (or latent pixels) a side.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Work {
    /// Padding that keeps the size at stride 1.
    Conv {
        images: usize,
        size: usize,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        stride: usize,
        pass: Pass,
    },
    Attention {
        batch: usize,
        queries: usize,
        keys: usize,
        heads: usize,
        width: usize,
        pass: Pass,
    },
    GroupNorm {
        images: usize,
        size: usize,
        channels: usize,
        groups: usize,
        silu: bool,
        pass: Pass,
    },
    LayerNorm {
        rows: usize,
        width: usize,
        pass: Pass,
    },
    /// From 2·width to width.
    Geglu {
        rows: usize,
        width: usize,
        pass: Pass,
    },
    Linear {
        rows: usize,
        inputs: usize,
        outputs: usize,
        pass: Pass,
    },
    Upsample {
        images: usize,
        size: usize,
        channels: usize,
        pass: Pass,
    },
    /// Sum of two tensors; of a residual block in the profile.
    Add {
        length: usize,
    },
    /// Two pictures side by side in their channels; of the skip connections in the profile.
    Concatenate {
        pixels: usize,
        left: usize,
        right: usize,
    },
    /// One update of all parameters with clipping and averaged weights.
    Adamw {
        tensors: usize,
        length: usize,
    },
    /// Pictures of `size` pixels; the latents are an eighth of it.
    Unet {
        model: Model,
        sets: usize,
        images: usize,
        size: usize,
        pass: Pass,
        #[serde(default)]
        dtype: Precision,
        #[serde(default)]
        checkpointing: bool,
        /// With the optimizer's update behind the gradients.
        #[serde(default)]
        update: bool,
    },
    /// The toybox recipe: loss, gradients, clipping, AdamW, averaged weights.
    TrainStep {
        images: usize,
        set_size: usize,
        #[serde(default)]
        dtype: Precision,
    },
    VaeDecode {
        images: usize,
        size: usize,
    },
    TextEncoder {
        prompts: usize,
    },
    /// The embedded model from pictures and words to a picture.
    Sample {
        steps: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Model {
    /// `benches/sd14`.
    Sd14,
    /// `configs/toybox/architecture`.
    Toybox,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    #[default]
    F32,
    Bf16,
}

/// All cases of the place, in the file's order.
pub fn all() -> Result<Vec<Case>> {
    match place::is_gpu() {
        false => serde_json::from_str(include_str!("../cases.json")).context("benches/cases.json"),
        true => serde_json::from_str(include_str!("../gpu_cases.json")).context("benches/gpu_cases.json"),
    }
}

impl Pass {
    /// Products of a pass, in those of the forward one: a gradient for each factor of each product.
    fn products(self) -> f64 {
        match self {
            Self::Forward => 1.0,
            Self::Backward => 2.0,
            Self::Both => 3.0,
        }
    }
}

impl Work {
    /// Floating-point operations of its matrix products, by the direct method; None where products are not what it does
    /// or where they are not counted.
    pub fn flops(&self) -> Option<f64> {
        let product = |m: usize, n: usize, k: usize| 2.0 * m as f64 * n as f64 * k as f64;
        match *self {
            Self::Conv { images, size, inputs, outputs, kernel, stride, pass } => {
                let positions = images * size.div_ceil(stride).pow(2);
                Some(pass.products() * product(positions, outputs, kernel * kernel * inputs))
            }
            Self::Attention { batch, queries, keys, heads, width, pass } => {
                Some(pass.products() * 2.0 * product(batch * heads * queries, keys, width))
            }
            Self::Linear { rows, inputs, outputs, pass } => Some(pass.products() * product(rows, outputs, inputs)),
            _ => None,
        }
    }

    /// What kind of work it is, for sums over a profile.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Conv { kernel: 1, .. } => "convolution 1x1",
            Self::Conv { .. } => "convolution 3x3",
            Self::Attention { queries, keys, .. } if queries == keys => "self-attention",
            Self::Attention { .. } => "cross-attention",
            Self::GroupNorm { .. } => "group norm",
            Self::LayerNorm { .. } => "layer norm",
            Self::Geglu { .. } => "GEGLU",
            Self::Linear { .. } => "linear",
            Self::Upsample { .. } => "upsampling",
            Self::Add { .. } => "addition",
            Self::Concatenate { .. } => "concatenation",
            Self::Adamw { .. } => "AdamW",
            Self::Unet { .. } => "U-Net",
            Self::TrainStep { .. } => "training step",
            Self::VaeDecode { .. } => "VAE",
            Self::TextEncoder { .. } => "text encoder",
            Self::Sample { .. } => "sampling",
        }
    }

    /// Its shapes, short.
    pub fn shapes(&self) -> String {
        match *self {
            Self::Conv { images, size, inputs, outputs, stride, .. } => {
                let stride = if stride == 1 { String::new() } else { format!(", stride {stride}") };
                format!("{images} x {size}^2, {inputs} to {outputs}{stride}")
            }
            Self::Attention { batch, queries, keys, heads, width, .. } => {
                format!("{batch} x {heads} x {queries} x {keys} x {width}")
            }
            Self::GroupNorm { images, size, channels, silu, .. } => {
                format!("{images} x {size}^2, {channels}{}", if silu { " + SiLU" } else { "" })
            }
            Self::LayerNorm { rows, width, .. } | Self::Geglu { rows, width, .. } => format!("{rows} x {width}"),
            Self::Linear { rows, inputs, outputs, .. } => format!("{rows} x {inputs} to {outputs}"),
            Self::Upsample { images, size, channels, .. } => format!("{images} x {size}^2, {channels}"),
            Self::Add { length } => format!("{length}"),
            Self::Concatenate { pixels, left, right } => format!("{pixels} x {left} and {right}"),
            Self::Adamw { tensors, length } => format!("{tensors} x {length}"),
            Self::Unet { sets, images, size, .. } => format!("{sets} x {images} x {size}^2"),
            Self::TrainStep { images, set_size, .. } => format!("{images}, sets of {set_size}"),
            Self::VaeDecode { images, size } => format!("{images} x {size}^2"),
            Self::TextEncoder { prompts } => format!("{prompts} prompts"),
            Self::Sample { steps } => format!("{steps} steps"),
        }
    }
}

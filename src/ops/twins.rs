//! Every operation's CPU kernel against its composition of Candle's primitives, which the other devices run: the output
//! and the gradients of all inputs, in f32.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::graft::{composed, on_cpu};
use super::*;
use crate::rng::Rng;

/// Of the largest magnitude in the tensor. f32 rounds at 6e-8; the longest sums here (some thousand terms, added in
/// another order) and Candle's six-digit constant in GELU's slope stay below ten times that.
const TOLERANCE: f32 = 1e-5;

pub fn random(name: &str, shape: &[usize]) -> Tensor {
    Rng::new(11, name, 0).normal_tensor(shape).unwrap()
}

/// What bf16, and so every format, holds exactly.
pub fn rounded(x: Tensor) -> Tensor {
    x.to_dtype(DType::BF16).and_then(|x| x.to_dtype(DType::F32)).unwrap()
}

/// The output of `f`, then the gradient of Σ cotangent·output for each input, in f32.
pub fn evaluated(inputs: &[Tensor], f: &impl Fn(&[Tensor]) -> Result<Tensor>) -> Vec<Tensor> {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let output = f(&tracked).unwrap();
    let cotangent = rounded(random("cotangent", output.dims())).to_dtype(output.dtype()).unwrap();
    let gradients = (&output * cotangent).unwrap().sum_all().unwrap().backward().unwrap();
    let of_inputs = vars.iter().map(|var| gradients.get(var).expect("a gradient for every input").clone());
    std::iter::once(output.detach()).chain(of_inputs).map(|x| x.to_dtype(DType::F32).unwrap()).collect()
}

/// Holds what was [`evaluated`] one way to the CPU's kernel, but for a share of each tensor's largest magnitude.
pub fn assert_near(case: &str, found: &[Tensor], kernel: &[Tensor], tolerance: f32) {
    for (i, (found, kernel)) in found.iter().zip(kernel).enumerate() {
        let what = if i == 0 { "output".to_owned() } else { format!("gradient of input {}", i - 1) };
        assert_eq!(found.dims(), kernel.dims(), "{case}: {what}");
        let [found, kernel] = [found, kernel].map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        let largest = kernel.iter().fold(0f32, |largest, v| largest.max(v.abs()));
        assert!(largest > 0.0, "{case}: {what} is all zero, which compares nothing");
        for (at, (f, k)) in found.iter().zip(&kernel).enumerate() {
            let gap = (f - k).abs();
            assert!(gap <= tolerance * largest, "{case}: {what}[{at}]: {f}, the kernel {k}, largest {largest}");
        }
    }
}

fn agree(case: &str, shapes: &[&[usize]], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let inputs: Vec<Tensor> = shapes.iter().enumerate().map(|(i, s)| random(&format!("input {i}"), s)).collect();
    assert_near(case, &composed(|| evaluated(&inputs, &f)), &evaluated(&inputs, &f), TOLERANCE);
}

#[test]
fn composed_turns_the_kernels_off_and_a_panic_turns_them_on_again() {
    let x = random("x", &[1]);
    assert!(on_cpu(&x) && composed(|| !on_cpu(&x)));
    assert!(std::panic::catch_unwind(|| composed(|| panic!("inside composed"))).is_err());
    assert!(on_cpu(&x));
}

#[test]
fn attention_self_cross_and_causal() {
    let qkv = |l: usize, s: usize, width: usize| [[2, l, width], [2, s, width], [2, s, width]];
    let check = |case: &str, shapes: [[usize; 3]; 3], heads: usize, mask: Mask| {
        agree(case, &shapes.each_ref().map(|s| s.as_slice()), |x| attention(&x[0], &x[1], &x[2], heads, mask));
    };
    check("self", qkv(37, 37, 12), 3, Mask::None);
    check("one head", qkv(9, 9, 10), 1, Mask::None);
    check("cross", qkv(20, 7, 16), 2, Mask::None);
    check("two keys", qkv(5, 2, 4), 2, Mask::None);
    check("causal", qkv(23, 23, 8), 2, Mask::Causal);
    let hidden = |i: usize| if i % 5 == 1 { f32::NEG_INFINITY } else { (i as f32).sin() };
    let bias = Tensor::from_vec((0..2 * 4 * 20).map(hidden).collect(), (2, 4, 20), &Device::Cpu).unwrap();
    check("biased", qkv(20, 20, 8), 2, Mask::Biased(&bias));
}

#[test]
fn attention_in_several_tiles() {
    // The compositions take at most 4096 queries at a time; the second tile begins in the middle of the mask.
    let l = 4100;
    agree("cross", &[&[1, l, 4], &[1, 3, 4], &[1, 3, 4]], |x| attention(&x[0], &x[1], &x[2], 2, Mask::None));
    agree("causal", &[&[1, l, 2], &[1, l, 2], &[1, l, 2]], |x| attention(&x[0], &x[1], &x[2], 1, Mask::Causal));
}

#[test]
fn conv2d_stride_1() {
    let shapes: [&[usize]; 3] = [&[2, 7, 6, 5], &[4, 5, 3, 3], &[4]];
    agree("3x3", &shapes, |x| conv2d(&x[0], &x[1], Some(&x[2]), Conv2d::same(3)));
    agree("no bias", &shapes[..2], |x| conv2d(&x[0], &x[1], None, Conv2d::same(3)));
    let uneven = Conv2d { stride: 1, pad: [0, 2, 1, 0] };
    agree("uneven padding", &shapes, |x| conv2d(&x[0], &x[1], Some(&x[2]), uneven));
    agree("1x1", &[&[2, 3, 5, 4], &[6, 4, 1, 1], &[6]], |x| conv2d(&x[0], &x[1], Some(&x[2]), Conv2d::same(1)));
}

#[test]
fn conv2d_by_winograd() {
    // Odd maps cut tiles short, odd numbers of channels cut lanes short; the smaller ones are not by Winograd.
    let shapes: [&[usize]; 3] = [&[2, 17, 11, 19], &[37, 19, 3, 3], &[37]];
    agree("odd", &shapes, |x| conv2d(&x[0], &x[1], Some(&x[2]), Conv2d::same(3)));
    agree("no bias", &shapes[..2], |x| conv2d(&x[0], &x[1], None, Conv2d::same(3)));
    let uneven = Conv2d { stride: 1, pad: [0, 2, 1, 1] };
    agree("uneven padding", &shapes, |x| conv2d(&x[0], &x[1], Some(&x[2]), uneven));
    let wide: [&[usize]; 3] = [&[5, 8, 8, 32], &[80, 32, 3, 3], &[80]];
    agree("even", &wide, |x| conv2d(&x[0], &x[1], Some(&x[2]), Conv2d::same(3)));
}

#[test]
fn winograd_in_f32_keeps_the_precision_of_a_single_operation() {
    let mut rng = Rng::new(3, "winograd precision", 0);
    let mut draw = |dims: &[usize]| rng.normal_tensor(dims).unwrap();
    let (x, weight) = (draw(&[1, 16, 16, 320]), draw(&[32, 320, 3, 3]));
    let conv = |dtype| {
        let y = conv2d(&x.to_dtype(dtype).unwrap(), &weight.to_dtype(dtype).unwrap(), None, Conv2d::same(3)).unwrap();
        y.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap()
    };
    let (single, double) = (conv(DType::F32), conv(DType::F64));
    let largest = double.iter().fold(0f64, |max, v| max.max(v.abs()));
    let error = single.iter().zip(&double).fold(0f64, |max, (a, b)| max.max((a - b).abs())) / largest;
    assert!(error < 1e-6, "{error:e}"); // design: a single operation within 1e-6 of the output's largest magnitude
}

#[test]
fn conv2d_with_many_weights() {
    let shapes: [&[usize]; 3] = [&[1, 4, 3, 450], &[460, 450, 3, 3], &[460]];
    for stride in [1, 2] {
        let conv = Conv2d { stride, pad: [1; 4] };
        agree(&format!("stride {stride}"), &shapes, |x| conv2d(&x[0], &x[1], Some(&x[2]), conv));
    }
    agree("no bias", &shapes[..2], |x| conv2d(&x[0], &x[1], None, Conv2d::same(3)));
}

#[test]
fn conv2d_stride_2_on_maps_of_every_parity() {
    // The U-Net pads all sides, the VAE's encoder bottom and right only. Candle's own backward fails on 8×7 and 7×8.
    for (h, w) in [(8, 8), (9, 5), (8, 7), (7, 8)] {
        for pad in [[1; 4], [0, 1, 0, 1], [0; 4]] {
            let conv = Conv2d { stride: 2, pad };
            let case = format!("{h}x{w}, padding {pad:?}");
            let shapes: [&[usize]; 3] = [&[2, h, w, 3], &[4, 3, 3, 3], &[4]];
            agree(&case, &shapes, |x| conv2d(&x[0], &x[1], Some(&x[2]), conv));
            agree(&case, &shapes[..2], |x| conv2d(&x[0], &x[1], None, conv));
        }
    }
    let conv = Conv2d { stride: 2, pad: [0; 4] };
    agree("1x1", &[&[2, 6, 5, 3], &[4, 3, 1, 1], &[4]], |x| conv2d(&x[0], &x[1], Some(&x[2]), conv));
}

#[test]
fn group_norm_plain_and_with_silu() {
    for activation in [Activation::None, Activation::Silu] {
        for (count, eps) in [(4, 1e-5), (1, 1e-6), (12, 1e-5)] {
            let groups = Groups { count, eps };
            let case = format!("{activation:?}, {count} groups");
            agree(&case, &[&[2, 5, 7, 12], &[12], &[12]], |x| group_norm(&x[0], &x[1], &x[2], groups, activation));
        }
    }
}

#[test]
fn layer_norm_over_the_last_dimension() {
    agree("layer_norm", &[&[2, 9, 20], &[20], &[20]], |x| layer_norm(&x[0], &x[1], &x[2], 1e-5));
}

#[test]
fn linear_with_and_without_bias() {
    agree("bias", &[&[2, 9, 10], &[7, 10], &[7]], |x| linear(&x[0], &x[1], Some(&x[2])));
    agree("no bias", &[&[33, 10], &[7, 10]], |x| linear(&x[0], &x[1], None));
}

#[test]
fn add_per_image_reaches_both_inputs() {
    agree("add_per_image", &[&[3, 4, 5, 6], &[3, 6]], |x| add_per_image(&x[0], &x[1]));
}

#[test]
fn activations_also_far_from_zero() {
    for scale in [1.0, 40.0] {
        agree("silu", &[&[6, 50]], |x| silu(&(&x[0] * scale)?));
        agree("gelu", &[&[6, 50]], |x| gelu(&(&x[0] * scale)?));
        agree("quick_gelu", &[&[6, 50]], |x| quick_gelu(&(&x[0] * scale)?));
        agree("geglu", &[&[2, 6, 50]], |x| geglu(&(&x[0] * scale)?));
    }
}

#[test]
fn upsample_also_when_its_input_is_used_elsewhere() {
    agree("upsample2x", &[&[2, 3, 5, 4]], |x| upsample2x(&x[0]));
    agree("another branch", &[&[2, 3, 2, 4]], |x| upsample2x(&x[0])?.mean_all()?.broadcast_mul(&x[0]));
}

#[test]
fn arithmetic_of_whole_tensors() {
    let pair: [&[usize]; 2] = [&[5, 7], &[5, 7]];
    agree("add", &pair, |x| add(&x[0], &x[1]));
    agree("sub", &pair, |x| sub(&x[0], &x[1]));
    agree("mul", &pair, |x| mul(&x[0], &x[1]));
    agree("affine", &pair[..1], |x| affine(&x[0], -1.5, 0.25));
    agree("square", &pair[..1], |x| square(&x[0]));
    agree("abs", &pair[..1], |x| abs(&x[0]));
    agree("exp", &pair[..1], |x| exp(&x[0]));
    agree("clamp", &pair[..1], |x| clamp(&x[0], -0.5, 0.75));
    agree("mean_all", &pair[..1], |x| mean_all(&x[0]));
    // More than one thread's share.
    agree("add, long", &[&[300, 101], &[300, 101]], |x| add(&x[0], &x[1]));
}

#[test]
fn values_in_another_shape_order_or_company() {
    agree("reshape", &[&[4, 6]], |x| reshape(&square(&x[0])?, (3, 8)));
    agree("reshape of a variable", &[&[4, 6]], |x| reshape(&x[0], (3, 8)));
    agree("concat", &[&[70, 30, 9], &[70, 30, 12]], |x| concat(&x[0], &x[1]));
    agree("narrow", &[&[3, 4, 5]], |x| narrow(&x[0], 1, 1, 2));
    agree("repeat_rows", &[&[3, 4]], |x| repeat_rows(&x[0], 3));
    agree("to_channels_first", &[&[2, 3, 4, 5]], |x| to_channels_first(&x[0]));
    agree("to_channels_last", &[&[2, 3, 4, 5]], |x| to_channels_last(&x[0]));
    let tokens = Tensor::new(&[[1u32, 0, 1], [3, 0, 0]], &Device::Cpu).unwrap();
    agree("embed", &[&[4, 2], &[4, 2]], |x| embed(&tokens, &x[0], &x[1]));
}

#[test]
fn inputs_that_are_not_contiguous() {
    let affine: [&[usize]; 3] = [&[6, 5, 2], &[6], &[6]];
    let turned = |x: &Tensor| x.transpose(0, 2);
    agree("layer_norm", &affine, |x| layer_norm(&turned(&x[0])?, &x[1], &x[2], 1e-5));
    let groups = Groups { count: 3, eps: 1e-5 };
    agree("group_norm", &affine, |x| group_norm(&turned(&x[0])?, &x[1], &x[2], groups, Activation::Silu));
    agree("linear", &[&[6, 5, 2], &[7, 6]], |x| linear(&turned(&x[0])?, &x[1], None));
    agree("add_per_image", &[&[6, 5, 2], &[2, 6]], |x| add_per_image(&turned(&x[0])?, &x[1]));
    agree("geglu", &[&[6, 5, 2]], |x| geglu(&turned(&x[0])?));
    agree("upsample2x", &[&[3, 5, 2, 4]], |x| upsample2x(&turned(&x[0])?));
    let conv = Conv2d { stride: 2, pad: [1; 4] };
    agree("conv2d", &[&[5, 4, 2, 3], &[2, 3, 3, 3]], |x| conv2d(&turned(&x[0])?, &x[1], None, conv));
    // Queries, keys and values cut from one projection.
    let cut = |x: &Tensor, part: usize| x.narrow(2, part * 4, 4);
    agree("attention", &[&[2, 7, 12]], |x| attention(&cut(&x[0], 0)?, &cut(&x[0], 1)?, &cut(&x[0], 2)?, 2, Mask::None));
}

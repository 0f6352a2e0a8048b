//! Every kernel for GPUs, run on the CPU, against the CPU's kernel of the same operation: the output and the gradients of
//! all inputs, in each number format.

use candle_core::{DType, Device, Result, Tensor};

use super::conv::in_bands;
use super::emulated::{built, emulated, is_on};
use super::launch::{Argument, Fresh, Launch, run};
use crate::ops::agreement::updated;
use crate::ops::conv::Geometry;
use crate::ops::twins::{assert_near, evaluated, random, rounded};
use crate::ops::{Activation, Conv2d, Groups, Mask, attention, conv2d, geglu, group_norm, layer_norm, linear};

/// Of the largest magnitude in the tensor. f32 adds in another order; f16 and bf16 round inputs of the products inside,
/// the output and what the backward pass is given, at 2⁻¹¹ and 2⁻⁸ of each value.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 5e-6,
        DType::F16 => 3e-3,
        _ => 2e-2,
    }
}

/// Holds the kernels for `dtype` to the CPU's in f32, both given inputs that bf16 holds exactly.
fn agree(case: &str, dtype: DType, shapes: &[&[usize]], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    if !built() {
        return;
    }
    let input = |(i, shape): (usize, &&[usize])| rounded(random(&format!("input {i}"), shape));
    let inputs: Vec<Tensor> = shapes.iter().enumerate().map(input).collect();
    let twin = evaluated(&inputs, &f);
    let given: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
    let kernel = emulated(|| evaluated(&given, &f));
    assert_near(&format!("{case}, {dtype:?}"), &kernel, &twin, tolerance(dtype));
}

/// Attention of one head width.
fn attends(dtype: DType, d: usize, (l, s): (usize, usize), mask: Mask) {
    let heads = 2;
    let shapes: [&[usize]; 3] = [&[2, l, heads * d], &[2, s, heads * d], &[2, s, heads * d]];
    let case = format!("width {d}, {l} queries, {s} keys, {mask:?}");
    agree(&case, dtype, &shapes, |x| attention(&x[0], &x[1], &x[2], heads, mask));
}

#[test]
#[ignore = "takes a minute or two: a step of its own of scripts/check.sh"]
fn attention_of_every_width_and_format() {
    for (i, d) in [32, 40, 64, 80, 128, 160].into_iter().enumerate() {
        // f16 and bf16 differ in nothing but the rounding: each has every other width.
        for dtype in [DType::F32, [DType::F16, DType::BF16][i % 2]] {
            attends(dtype, d, (33, 77), Mask::None);
        }
    }
}

#[test]
#[ignore = "takes a minute or two: a step of its own of scripts/check.sh"]
fn attention_over_several_blocks_and_tiles() {
    // The last of each is cut short, and a set's keys are as many as its queries, or more, or fewer.
    for (dtype, d) in [(DType::F32, 40), (DType::BF16, 40)] {
        attends(dtype, d, (130, 130), Mask::None);
        attends(dtype, d, (7, 193), Mask::None);
        attends(dtype, d, (131, 2), Mask::None);
        attends(dtype, d, (131, 131), Mask::Causal);
    }
}

#[test]
#[ignore = "takes a minute or two: a step of its own of scripts/check.sh"]
fn attention_with_weights_and_masks_of_references() {
    // Three images to a set; the first tile of keys is hidden from the second image altogether.
    let (images, l) = (3, 192);
    let bias = |i: usize| {
        let (group, key) = (i / l % images, i % l);
        if (group == 1 && key < 64) || key == 100 { f32::NEG_INFINITY } else { (i as f32).sin() }
    };
    let bias: Vec<f32> = (0..2 * images * l).map(bias).collect();
    let bias = Tensor::from_vec(bias, (2, images, l), &Device::Cpu).unwrap();
    for (dtype, d) in [(DType::F32, 40), (DType::F16, 80)] {
        attends(dtype, d, (l, l), Mask::Biased(&bias));
    }
}

#[test]
#[ignore = "takes a minute or two: a step of its own of scripts/check.sh"]
fn linear_layers_with_a_bias() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        // Outputs that 16 bytes hold a whole number of, and others; as a 1×1 convolution.
        for shapes in [[vec![2, 35, 24], vec![16, 24], vec![16]], [vec![33, 6], vec![5, 6], vec![5]]] {
            agree("linear", dtype, &shapes.each_ref().map(Vec::as_slice), |x| linear(&x[0], &x[1], Some(&x[2])));
        }
        let shapes: [&[usize]; 3] = [&[2, 3, 4, 8], &[24, 8, 1, 1], &[24]];
        agree("linear", dtype, &shapes, |x| linear(&x[0], &x[1], Some(&x[2])));
    }
}

/// A convolution of x `[b, h, w, c]` to `out` channels, with a bias where `has_bias`, in bands of `patch_bytes`.
fn convolves(
    dtype: DType,
    x: [usize; 4],
    (out, k): (usize, usize),
    conv: Conv2d,
    (has_bias, patch_bytes): (bool, usize),
) {
    let [images, h, w, c] = x;
    let [top, bottom, left, right] = conv.pad;
    let geometry = Geometry {
        images,
        input: (h, w),
        output: ((h + top + bottom - k) / conv.stride + 1, (w + left + right - k) / conv.stride + 1),
        channels: (c, out),
        kernel: k,
        conv,
    };
    let shapes: [&[usize]; 3] = [&x, &[out, c, k, k], &[out]];
    let case = format!("{x:?} to {out}, {k}×{k}, {conv:?}, {patch_bytes} bytes at a time");
    agree(&case, dtype, &shapes[..2 + usize::from(has_bias)], |x| match is_on() {
        true => Ok(in_bands([&x[0], &x[1]], x.get(2), geometry, patch_bytes)?.expect("there is a kernel")),
        false => conv2d(&x[0], &x[1], x.get(2), conv),
    });
}

#[test]
#[ignore = "takes a minute or two: a step of its own of scripts/check.sh"]
fn convolutions_of_every_format_kernel_stride_and_padding() {
    let cases = [
        ([2, 7, 6, 5], (4, 3), 1, [1; 4]),
        // Channels that 16 bytes hold a whole number of.
        ([2, 5, 6, 16], (24, 3), 1, [1; 4]),
        ([1, 9, 8, 16], (8, 3), 2, [1; 4]),
        // Of the VAE's encoder.
        ([1, 7, 8, 6], (8, 3), 2, [0, 1, 0, 1]),
        ([2, 5, 6, 3], (7, 3), 1, [0, 2, 1, 0]),
        ([2, 5, 4, 6], (5, 1), 2, [0; 4]),
        // Patches, beside which a row and some columns are left over.
        ([2, 9, 11, 3], (8, 4), 4, [0; 4]),
    ];
    for (i, (x, weight, stride, pad)) in cases.into_iter().enumerate() {
        // f16 and bf16 differ in nothing but the rounding: each has every other case.
        for dtype in [DType::F32, [DType::F16, DType::BF16][i % 2]] {
            convolves(dtype, x, weight, Conv2d { stride, pad }, (true, 1 << 20));
        }
    }
    convolves(DType::F32, [1, 5, 6, 3], (4, 3), Conv2d::same(3), (false, 1 << 20));
}

#[test]
#[ignore = "takes a minute or two: a step of its own of scripts/check.sh"]
fn convolutions_in_several_bands() {
    let row_bytes = 4 * 45 * DType::F32.size_in_bytes();
    // Of some rows, the last band shorter, and of two images and one.
    for patch_bytes in [3 * row_bytes, 2 * 5 * row_bytes] {
        convolves(DType::F32, [3, 5, 4, 5], (4, 3), Conv2d::same(3), (true, patch_bytes));
    }
    // Of one row.
    convolves(DType::BF16, [2, 6, 4, 5], (4, 3), Conv2d { stride: 2, pad: [0, 1, 0, 1] }, (true, 1));
    // Of which some have no patch.
    convolves(DType::F32, [1, 9, 8, 3], (8, 2), Conv2d { stride: 4, pad: [0; 4] }, (true, 1));
}

#[test]
#[ignore = "takes a minute or two: a step of its own of scripts/check.sh"]
fn group_norm_plain_and_with_silu() {
    // Few channels lie side by side in a block, many take a thread several; 41 positions make chunks of unlike length.
    let shapes: [(&[usize], usize); 4] =
        [(&[2, 41, 12], 4), (&[1, 3, 7, 96], 32), (&[2, 5, 320], 32), (&[3, 1, 1, 640], 1)];
    for (dims, count) in shapes {
        let c = dims[dims.len() - 1];
        let plain = (c == 12).then_some((DType::F32, Activation::None));
        let half = (c == 96).then_some((DType::BF16, Activation::Silu));
        for (dtype, activation) in [Some((DType::F32, Activation::Silu)), plain, half].into_iter().flatten() {
            let groups = Groups { count, eps: 1e-5 };
            let case = format!("{dims:?} in {count} groups, {activation:?}");
            agree(&case, dtype, &[dims, &[c], &[c]], |x| group_norm(&x[0], &x[1], &x[2], groups, activation));
        }
    }
}

#[test]
#[ignore = "takes a minute or two: a step of its own of scripts/check.sh"]
fn group_norm_of_several_chunks_far_from_zero() {
    // Around an offset that would eat the precision of Σx².
    let groups = Groups { count: 2, eps: 1e-5 };
    agree("far from zero", DType::F32, &[&[1, 400, 4], &[4], &[4]], |x| {
        group_norm(&(&x[0] + 20.0)?, &x[1], &x[2], groups, Activation::None)
    });
}

#[test]
#[ignore = "takes a minute or two: a step of its own of scripts/check.sh"]
fn layer_norm_over_the_last_dimension() {
    for dims in [[2, 9, 20], [1, 11, 320], [3, 2, 1281]] {
        for dtype in [DType::F32, DType::BF16] {
            let c = dims[2];
            agree(&format!("{dims:?}"), dtype, &[&dims, &[c], &[c]], |x| layer_norm(&x[0], &x[1], &x[2], 1e-5));
        }
    }
}

#[test]
#[ignore = "takes a minute or two: a step of its own of scripts/check.sh"]
fn geglu_also_far_from_zero() {
    for (dtype, scale) in [(DType::F32, 1.0), (DType::F32, 40.0), (DType::F16, 1.0), (DType::BF16, 1.0)] {
        agree(&format!("times {scale}"), dtype, &[&[2, 5, 74]], |x| geglu(&(&x[0] * scale)?));
    }
}

#[test]
#[ignore = "takes a minute or two: a step of its own of scripts/check.sh"]
fn the_norm_and_adamw_of_many_tensors_with_and_without_averages() {
    if !built() {
        return;
    }
    let updated = |dtype: DType| updated(&Device::Cpu, dtype).unwrap();
    let twin = updated(DType::F32);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        // What is f32 has gaps of f32, whatever the format of the gradients, which hold the same values in each.
        assert_near(&format!("{dtype:?}"), &emulated(|| updated(dtype)), &twin, 1e-6);
    }
}

#[test]
#[ignore = "takes a minute or two: a step of its own of scripts/check.sh"]
fn faults_in_kernels_are_found() {
    if !built() {
        return;
    }
    let found = |kernel: &str, blocks: usize| {
        let x = random("x", &[64]);
        let mut y = Fresh::like(&x).unwrap();
        let launch = Launch {
            source: "emulation/faults",
            kernel: kernel.into(),
            blocks: [blocks, 1, 1],
            threads: 64,
            shared: 256,
        };
        let run = emulated(|| run(&Device::Cpu, &launch, &mut [Argument::Read(&x), Argument::Fill(&mut y)]));
        run.expect_err(kernel).to_string()
    };
    for (kernel, blocks, fault) in [
        ("fault_race", 1, "data race"),
        ("fault_blocks", 2, "data race"),
        ("fault_bounds", 1, "heap-buffer-overflow"),
        ("fault_barrier", 1, "wait for others that do not come"),
        ("fault_unseen", 1, "data race"),
    ] {
        let says = found(kernel, blocks);
        assert!(says.contains(fault), "{kernel}: {says}");
    }
    assert!(!found("fault_unwaited", 1).is_empty());
}

//! Every operation's gradients against central differences in f64, for every input.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::*;
use crate::rng::Rng;

fn random(name: &str, shape: &[usize]) -> Tensor {
    Rng::new(7, name, 0).normal_tensor(shape).unwrap().to_dtype(DType::F64).unwrap()
}

/// Compares the gradient of Σ cotangent·f(inputs), by our backward pass and by Candle's, with (L(x+h) − L(x−h))/2h at every
/// element of every input.
fn check(shapes: &[&[usize]], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let inputs: Vec<Tensor> = shapes.iter().enumerate().map(|(i, s)| random(&format!("input {i}"), s)).collect();
    let cotangent = random("cotangent", f(&inputs).unwrap().dims());
    let loss = |inputs: &[Tensor]| (f(inputs)? * &cotangent)?.sum_all();
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let gradients = backward_from(f(&tracked).unwrap(), cotangent.clone()).unwrap();
    let by_candle = loss(&tracked).unwrap().backward().unwrap();
    let h = 1e-5;
    for (i, input) in inputs.iter().enumerate() {
        let values = input.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let values_of = |gradient: Option<&Tensor>| {
            let gradient = gradient.expect("a gradient for every input");
            gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap()
        };
        let gradient = values_of(gradients.get(&vars[i]));
        assert_eq!(gradient, values_of(by_candle.get(&vars[i])), "input {i}, by Candle's backward");
        for j in 0..values.len() {
            let at = |step: f64| {
                let mut moved = values.clone();
                moved[j] += step;
                let mut inputs = inputs.clone();
                inputs[i] = Tensor::from_vec(moved, input.shape(), &Device::Cpu).unwrap();
                loss(&inputs).unwrap().to_scalar::<f64>().unwrap()
            };
            let difference = (at(h) - at(-h)) / (2.0 * h);
            let error = (difference - gradient[j]).abs();
            assert!(error < 1e-6 * (1.0 + difference.abs()), "input {i}[{j}]: {} against {difference}", gradient[j]);
        }
    }
}

#[test]
fn linear_with_and_without_bias() {
    check(&[&[2, 3, 4], &[5, 4], &[5]], |x| linear(&x[0], &x[1], Some(&x[2])));
    check(&[&[6, 4], &[5, 4]], |x| linear(&x[0], &x[1], None));
}

#[test]
fn add_per_image_reaches_both_inputs() {
    check(&[&[2, 3, 2, 4], &[2, 4]], |x| add_per_image(&x[0], &x[1]));
}

#[test]
fn conv2d_same_padding() {
    check(&[&[2, 4, 3, 3], &[2, 3, 3, 3], &[2]], |x| conv2d(&x[0], &x[1], Some(&x[2]), Conv2d::same(3)));
}

#[test]
fn conv2d_stride_2_on_an_odd_map_with_one_sided_padding() {
    let conv = Conv2d { stride: 2, pad: [0, 1, 0, 1] };
    check(&[&[2, 5, 4, 2], &[3, 2, 3, 3], &[3]], |x| conv2d(&x[0], &x[1], Some(&x[2]), conv));
    let conv = Conv2d { stride: 2, pad: [1; 4] };
    check(&[&[1, 8, 7, 2], &[2, 2, 3, 3]], |x| conv2d(&x[0], &x[1], None, conv));
}

#[test]
fn conv2d_1x1() {
    check(&[&[2, 2, 3, 4], &[3, 4, 1, 1], &[3]], |x| conv2d(&x[0], &x[1], Some(&x[2]), Conv2d::same(1)));
}

#[test]
fn group_norm_plain_and_with_silu() {
    for activation in [Activation::None, Activation::Silu] {
        let groups = Groups { count: 2, eps: 1e-5 };
        check(&[&[2, 3, 2, 4], &[4], &[4]], |x| group_norm(&x[0], &x[1], &x[2], groups, activation));
    }
}

#[test]
fn layer_norm_over_the_last_dimension() {
    check(&[&[2, 3, 5], &[5], &[5]], |x| layer_norm(&x[0], &x[1], &x[2], 1e-5));
}

#[test]
fn attention_self_cross_and_causal() {
    check(&[&[2, 5, 6], &[2, 5, 6], &[2, 5, 6]], |x| attention(&x[0], &x[1], &x[2], 2, Mask::None));
    check(&[&[1, 3, 4], &[1, 7, 4], &[1, 7, 4]], |x| attention(&x[0], &x[1], &x[2], 1, Mask::None));
    check(&[&[2, 4, 4], &[2, 4, 4], &[2, 4, 4]], |x| attention(&x[0], &x[1], &x[2], 2, Mask::Causal));
    let bias = [0.3, f32::NEG_INFINITY, -0.5, 0.1, 1.0, 0.0, -1.0, f32::NEG_INFINITY, 0.2, 0.7, -0.2, 0.4];
    let bias = Tensor::from_slice(&bias, (2, 2, 3), &Device::Cpu).unwrap();
    check(&[&[2, 4, 4], &[2, 3, 4], &[2, 3, 4]], |x| attention(&x[0], &x[1], &x[2], 2, Mask::Biased(&bias)));
}

#[test]
fn activations() {
    check(&[&[3, 4]], |x| silu(&x[0]));
    check(&[&[3, 4]], |x| gelu(&x[0]));
    check(&[&[3, 4]], |x| quick_gelu(&x[0]));
    check(&[&[3, 4]], |x| geglu(&x[0]));
}

#[test]
fn upsample_also_when_its_input_is_used_elsewhere() {
    check(&[&[2, 2, 3, 2]], |x| upsample2x(&x[0]));
    // Candle's own upsampling overwrites the gradient of another branch.
    check(&[&[1, 2, 2, 1]], |x| mul(&upsample2x(&x[0])?, &upsample2x(&square(&x[0])?)?));
}

#[test]
fn arithmetic_of_whole_tensors() {
    check(&[&[3, 4], &[3, 4]], |x| add(&x[0], &x[1]));
    check(&[&[3, 4], &[3, 4]], |x| sub(&x[0], &x[1]));
    check(&[&[3, 4], &[3, 4]], |x| mul(&x[0], &x[1]));
    check(&[&[3, 4]], |x| affine(&x[0], -1.5, 0.25));
    check(&[&[3, 4]], |x| square(&x[0]));
    check(&[&[3, 4]], |x| abs(&x[0]));
    check(&[&[3, 4]], |x| exp(&x[0]));
    check(&[&[3, 4]], |x| clamp(&x[0], -0.5, 0.75));
    check(&[&[3, 4]], |x| mean_all(&x[0]));
}

#[test]
fn values_in_another_shape_order_or_company() {
    check(&[&[2, 6]], |x| reshape(&x[0], (3, 4)));
    check(&[&[2, 6]], |x| reshape(&reshape(&square(&x[0])?, (3, 4))?, 12));
    check(&[&[2, 3, 4], &[2, 3, 5]], |x| concat(&x[0], &x[1]));
    for (dim, first, count) in [(0, 1, 1), (1, 0, 2), (1, 1, 3), (2, 2, 3)] {
        check(&[&[2, 4, 5]], |x| narrow(&x[0], dim, first, count));
    }
    check(&[&[2, 3]], |x| repeat_rows(&x[0], 4));
    check(&[&[2, 3, 4, 5]], |x| to_channels_first(&x[0]));
    check(&[&[2, 3, 4, 5]], |x| to_channels_last(&x[0]));
    // Token 1 comes twice, token 2 never; the last place is not used.
    let tokens = Tensor::new(&[[1u32, 0, 1], [3, 0, 0]], &Device::Cpu).unwrap();
    check(&[&[4, 2], &[4, 2]], |x| embed(&tokens, &x[0], &x[1]));
}

#[test]
fn many_tiles_give_the_result_of_one() {
    // More queries and positions than one tile holds, against the composition of primitives.
    let (q, k, v) = (random("q", &[1, 300, 8]), random("k", &[1, 700, 8]), random("v", &[1, 700, 8]));
    let ours = attention(&q, &k, &v, 1, Mask::None).unwrap();
    let scores = (q.matmul(&k.t().unwrap()).unwrap() / 8f64.sqrt()).unwrap();
    let plain = candle_nn::ops::softmax(&scores, 2).unwrap().matmul(&v).unwrap();
    let error = (ours - plain).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
    assert!(error < 1e-12, "{error}");
    let (x, w) = (random("x", &[3, 24, 20, 5]), random("w", &[6, 5, 3, 3]));
    let ours = conv2d(&x, &w, None, Conv2d::same(3)).unwrap();
    let plain = to_channels_last(&to_channels_first(&x).unwrap().conv2d(&w, 1, 1, 1, 1).unwrap()).unwrap();
    let error = (ours - plain).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
    assert!(error < 1e-12, "{error}");
}

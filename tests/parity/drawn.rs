//! Weights and pictures by the rules of `scripts/golden/drawn.py`: no file holds them.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use image::RgbImage;

/// `count` numbers in [−1, 1): SplitMix64 of the name's FNV-1a hash and the place.
fn numbers(name: &str, count: usize) -> impl Iterator<Item = f64> {
    let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
    (1..=count as u64).map(move |place| {
        let mut z = seed.wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 40) as f64 / f64::from(1 << 23) - 1.0
    })
}

/// Biases around zero, scales of norms around one, weights by fan-in.
pub fn tensor(name: &str, shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let scaled = |value: f64| match shape {
        _ if name.ends_with("bias") => 0.1 * value,
        [] | [_] => 1.0 + 0.3 * value,
        _ => (3.0 / (count / shape[0]) as f64).sqrt() * value,
    };
    let values: Vec<f32> = numbers(name, count).map(|value| scaled(value) as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("as many values as the shape has")
}

/// A checkpoint of these shapes.
pub fn tensors(shapes: &BTreeMap<String, Vec<usize>>) -> BTreeMap<String, Tensor> {
    shapes.iter().map(|(name, shape)| (name.clone(), tensor(name, shape))).collect()
}

/// A picture by rule: slopes, fine stripes and a coarse pattern.
pub fn picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        image::Rgb([0, 1, 2].map(|channel| {
            let slope = 3 * x + 5 * y + 40 * channel;
            ((slope + 90 * ((x / 7 + y / 5 + channel) % 2) + 25 * (x % 2)) % 256) as u8
        }))
    })
}

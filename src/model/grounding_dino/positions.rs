//! Sines and cosines of positions: of pixels in their map, of words in their phrase, of boxes.

use std::f32::consts::TAU;

use candle_core::{DType, Device, Result, Tensor};

/// Sines (even places) and cosines (odd ones) of 2π·x in `n` falling frequencies (`get_sine_pos_embed`). In f32, as
/// transformers computes them: the phases of late words are rounded alike.
fn waves(x: f32, frequencies: &[f32], out: &mut Vec<f32>) {
    let phase = x * TAU;
    out.extend(frequencies.iter().enumerate().map(|(place, frequency)| match place % 2 {
        0 => (phase / frequency).sin(),
        _ => (phase / frequency).cos(),
    }));
}

fn frequencies(n: usize, temperature: f64) -> Vec<f32> {
    (0..n).map(|place| temperature.powf((2 * (place / 2)) as f64 / n as f64) as f32).collect()
}

/// Of the words of texts.
///
/// # Shapes
/// - places: b·t → `[b, t, d]`
pub fn of_places(places: &[u32], (b, t, d): (usize, usize, usize), like: &Tensor) -> Result<Tensor> {
    let frequencies = frequencies(d, 10_000.0);
    let mut values = Vec::with_capacity(places.len() * d);
    places.iter().for_each(|place| waves(*place as f32, &frequencies, &mut values));
    Tensor::from_vec(values, (b, t, d), like.device())?.to_dtype(like.dtype())
}

/// Of boxes: the middle's y, its x, width, height, each in d/2 values.
///
/// # Shapes
/// - boxes `[b, q, 4]` (x, y, width, height) → `[b, q, 2·d]`
pub fn of_boxes(boxes: &Tensor, d: usize) -> Result<Tensor> {
    let (b, q, _) = boxes.dims3()?;
    let frequencies = frequencies(d / 2, 10_000.0);
    let mut values = Vec::with_capacity(b * q * 2 * d);
    for own in boxes.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?.chunks_exact(4) {
        [own[1], own[0], own[2], own[3]].iter().for_each(|x| waves(*x, &frequencies, &mut values));
    }
    Tensor::from_vec(values, (b, q, 2 * d), boxes.device())?.to_dtype(boxes.dtype())
}

/// Of the positions of a map, y before x (`GroundingDinoSinePositionEmbedding` of a picture without padding).
///
/// # Shapes
/// - → `[1, h·w, d]`
pub fn of_map((h, w): (usize, usize), d: usize, temperature: f64, like: &Tensor) -> Result<Tensor> {
    let frequencies = frequencies(d / 2, temperature);
    // Counted from 1, as shares of the last one.
    let along = |side: usize| -> Vec<Vec<f32>> {
        let wave = |at: usize| {
            let mut values = Vec::with_capacity(d / 2);
            // TAU comes in before the division by the wavelength, here as there.
            waves((at + 1) as f32 / (side as f32 + 1e-6), &frequencies, &mut values);
            values
        };
        (0..side).map(wave).collect()
    };
    let (rows, columns) = (along(h), along(w));
    let mut values = Vec::with_capacity(h * w * d);
    for row in &rows {
        for column in &columns {
            values.extend_from_slice(row);
            values.extend_from_slice(column);
        }
    }
    Tensor::from_vec(values, (1, h * w, d), like.device())?.to_dtype(like.dtype())
}

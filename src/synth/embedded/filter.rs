//! Styles as filters of colour and texture. Radii follow the picture's size.

use anyhow::Context as _;
use image::{Rgb, RgbImage, imageops};
use rayon::prelude::*;

use crate::rng::Rng;
use crate::synth::stage::{Answers, StyleAsk, Styler};

/// Goes up when the pictures change.
pub const VERSION: u32 = 1;

/// What a style does to a picture.
type Paint = fn(&RgbImage, &mut Rng) -> RgbImage;

/// As captions call them.
const STYLES: [(&str, Paint); 8] = [
    ("as a pencil sketch", pencil),
    ("as a watercolour", watercolour),
    ("as an oil painting", oil),
    ("as an old photo", old_photo),
    ("as a comic", comic),
    ("in black and white", black_and_white),
    ("in pale colours", pale),
    ("in cold blue light", cold),
];

/// Paints over by filters.
pub struct Filter;

impl Styler for Filter {
    fn styles(&self) -> Vec<String> {
        STYLES.iter().map(|(name, _)| (*name).to_owned()).collect()
    }

    fn styled(&mut self, asks: &[StyleAsk]) -> Answers<RgbImage> {
        let styled = |ask: &StyleAsk| {
            let (_, paint) = STYLES
                .iter()
                .find(|(name, _)| *name == ask.style)
                .with_context(|| format!("stylise: there is no style {:?}", ask.style))?;
            Ok(paint(ask.image, &mut Rng::new(ask.seed, "synth filter", 0)))
        };
        asks.par_iter().map(styled).collect()
    }
}

/// A pixel for every 48 of the picture's side, at least one.
fn radius(image: &RgbImage) -> i64 {
    i64::from(image.width().min(image.height()) / 48).max(1)
}

fn grey(pixel: &Rgb<u8>) -> f32 {
    0.299 * f32::from(pixel.0[0]) + 0.587 * f32::from(pixel.0[1]) + 0.114 * f32::from(pixel.0[2])
}

fn rgb(values: [f32; 3]) -> Rgb<u8> {
    // A float cast to u8 saturates.
    Rgb(values.map(|value| value.round() as u8))
}

/// Each pixel by a function of its colour.
fn mapped(image: &RgbImage, map: impl Fn([f32; 3]) -> [f32; 3]) -> RgbImage {
    RgbImage::from_fn(image.width(), image.height(), |x, y| rgb(map(image.get_pixel(x, y).0.map(f32::from))))
}

fn at(image: &RgbImage, x: i64, y: i64) -> &Rgb<u8> {
    let inside = |value: i64, length: u32| value.clamp(0, i64::from(length) - 1) as u32;
    image.get_pixel(inside(x, image.width()), inside(y, image.height()))
}

/// How fast brightness changes at a pixel, 0 to about 255.
fn edge(image: &RgbImage, x: u32, y: u32) -> f32 {
    let (x, y) = (i64::from(x), i64::from(y));
    let across = grey(at(image, x + 1, y)) - grey(at(image, x - 1, y));
    let down = grey(at(image, x, y + 1)) - grey(at(image, x, y - 1));
    (across * across + down * down).sqrt()
}

fn pencil(image: &RgbImage, rng: &mut Rng) -> RgbImage {
    // Dodging: grey divided by its blurred self is white in flats and dark at edges.
    let blurred = imageops::blur(image, radius(image) as f32 * 1.5);
    let slant: i64 = *rng.pick(&[1, -1]);
    RgbImage::from_fn(image.width(), image.height(), |x, y| {
        let tone = grey(image.get_pixel(x, y));
        let dodged = (255.0 * (tone + 8.0) / (grey(blurred.get_pixel(x, y)) + 8.0)).min(255.0);
        // Hatching where the picture is dark.
        let line = (i64::from(x) + slant * i64::from(y)).rem_euclid(4) < 2;
        let hatched = if line && tone < 110.0 { dodged - (110.0 - tone) * 0.9 } else { dodged - (255.0 - tone) * 0.12 };
        rgb([hatched; 3])
    })
}

/// The mean of that quarter around each pixel whose colours differ least (Kuwahara): flat strokes with sharp borders.
fn kuwahara(image: &RgbImage, radius: i64) -> RgbImage {
    RgbImage::from_fn(image.width(), image.height(), |x, y| {
        let (x, y) = (i64::from(x), i64::from(y));
        let quarter = |dx: i64, dy: i64| {
            let (mut sum, mut squares, mut count) = ([0f32; 3], 0f32, 0f32);
            for j in 0..=radius {
                for i in 0..=radius {
                    let pixel = at(image, x + i * dx, y + j * dy);
                    sum.iter_mut().zip(pixel.0).for_each(|(sum, value)| *sum += f32::from(value));
                    squares += grey(pixel).powi(2);
                    count += 1.0;
                }
            }
            let mean = sum.map(|sum| sum / count);
            let tone = 0.299 * mean[0] + 0.587 * mean[1] + 0.114 * mean[2];
            (squares / count - tone * tone, mean)
        };
        let quarters = [quarter(1, 1), quarter(-1, 1), quarter(1, -1), quarter(-1, -1)];
        let [first, rest @ ..] = quarters;
        rgb(rest.into_iter().fold(first, |best, next| if next.0 < best.0 { next } else { best }).1)
    })
}

fn saturated(colour: [f32; 3], by: f32) -> [f32; 3] {
    let tone = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2];
    colour.map(|value| tone + (value - tone) * by)
}

fn oil(image: &RgbImage, _: &mut Rng) -> RgbImage {
    mapped(&kuwahara(image, radius(image) + 1), |colour| saturated(colour, 1.3))
}

fn watercolour(image: &RgbImage, rng: &mut Rng) -> RgbImage {
    let flat = kuwahara(image, radius(image));
    // Paper takes paint unevenly: coarse noise, smoothed.
    let (width, height) = image.dimensions();
    let coarse = RgbImage::from_fn(width.div_ceil(6), height.div_ceil(6), |_, _| Rgb([rng.below(256) as u8; 3]));
    let paper = imageops::resize(&coarse, width, height, imageops::FilterType::CatmullRom);
    RgbImage::from_fn(width, height, |x, y| {
        let thin = 0.28 + 0.22 * f32::from(paper.get_pixel(x, y).0[0]) / 255.0;
        // Paint gathers at the borders of a wash.
        let rim = (edge(&flat, x, y) / 255.0).min(0.5) * 90.0;
        let colour = saturated(flat.get_pixel(x, y).0.map(f32::from), 1.15);
        rgb(colour.map(|value| value + (255.0 - value) * thin - rim))
    })
}

fn old_photo(image: &RgbImage, rng: &mut Rng) -> RgbImage {
    let (width, height) = image.dimensions();
    let far = |value: u32, length: u32| (2.0 * (value as f32 + 0.5) / length as f32 - 1.0).powi(2);
    RgbImage::from_fn(width, height, |x, y| {
        let grain = rng.between(-9.0, 9.0) as f32;
        let tone = 30.0 + 0.82 * grey(image.get_pixel(x, y)) + grain;
        let vignette = 1.0 - 0.22 * (far(x, width) + far(y, height));
        rgb([tone * 1.08, tone * 0.92, tone * 0.7].map(|value| value * vignette))
    })
}

fn comic(image: &RgbImage, _: &mut Rng) -> RgbImage {
    let flat = kuwahara(image, radius(image));
    RgbImage::from_fn(image.width(), image.height(), |x, y| {
        let colour = saturated(flat.get_pixel(x, y).0.map(f32::from), 1.5);
        let stepped = colour.map(|value| (value.clamp(0.0, 255.0) / 64.0).round() * 64.0);
        let ink = if edge(&flat, x, y) > 70.0 { 0.25 } else { 1.0 };
        rgb(stepped.map(|value| value * ink))
    })
}

fn black_and_white(image: &RgbImage, _: &mut Rng) -> RgbImage {
    mapped(image, |colour| [1.15 * (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) - 12.0; 3])
}

fn pale(image: &RgbImage, _: &mut Rng) -> RgbImage {
    mapped(image, |colour| saturated(colour, 0.6).map(|value| 96.0 + value * 0.62))
}

fn cold(image: &RgbImage, _: &mut Rng) -> RgbImage {
    mapped(image, |colour| {
        let [red, green, blue] = saturated(colour, 0.7);
        [red * 0.6, green * 0.78, blue * 0.95 + 24.0]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> RgbImage {
        RgbImage::from_fn(64, 64, |x, y| {
            let inside = (x as f32 - 30.0).powi(2) + (y as f32 - 34.0).powi(2) < 300.0;
            if inside { Rgb([210, 60, 50]) } else { Rgb([90, (120 + y) as u8, 220]) }
        })
    }

    #[test]
    fn every_style_changes_the_picture_and_leaves_the_thing_to_be_seen() {
        let image = picture();
        let styles = Filter.styles();
        let asks: Vec<StyleAsk> = styles.iter().map(|style| StyleAsk { image: &image, style, seed: 1 }).collect();
        let pictures: Vec<RgbImage> = Filter.styled(&asks).into_iter().map(Result::unwrap).collect();
        let tone = |image: &RgbImage, x: u32, y: u32| {
            let around = (0..5).flat_map(|j| (0..5).map(move |i| (x + i, y + j)));
            around.map(|(x, y)| grey(image.get_pixel(x, y))).sum::<f32>() / 25.0
        };
        for (number, (style, styled)) in styles.iter().zip(&pictures).enumerate() {
            assert_eq!(styled.dimensions(), (64, 64), "{style}");
            let change: i64 = styled.as_raw().iter().zip(image.as_raw()).map(|(a, b)| i64::from(a.abs_diff(*b))).sum();
            assert!(change > 64 * 64 * 6, "{style}: hardly changes anything: {change}");
            assert!((tone(styled, 28, 32) - tone(styled, 2, 2)).abs() > 4.0, "{style}: the thing is gone");
            assert!(pictures[..number].iter().all(|other| other != styled), "{style}: is there twice");
        }
    }

    #[test]
    fn a_style_that_is_not_there_is_an_error() {
        let image = picture();
        let ask = StyleAsk { image: &image, style: "as a fresco", seed: 1 };
        assert!(Filter.styled(&[ask]).remove(0).unwrap_err().to_string().contains("no style \"as a fresco\""));
    }
}

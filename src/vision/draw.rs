//! Findings drawn into their picture, each in a colour that has a name, since there are no letters to draw.

use image::{Rgb, RgbImage};

use super::{Finding, Mask};

/// Colours by turns, the first for the first finding.
const COLOURS: [(&str, [u8; 3]); 8] = [
    ("red", [230, 30, 30]),
    ("green", [30, 190, 60]),
    ("blue", [40, 90, 255]),
    ("yellow", [250, 220, 20]),
    ("magenta", [230, 40, 230]),
    ("cyan", [30, 220, 230]),
    ("orange", [255, 140, 20]),
    ("white", [255, 255, 255]),
];

/// The name of the colour of the finding with this number, counted from 0.
pub fn colour_name(number: usize) -> &'static str {
    COLOURS[number % COLOURS.len()].0
}

/// The picture with an outline a finding and, where there are masks, its pixels tinted. The last finding is drawn first, so
/// that the surest of sorted ones lies on top.
pub fn drawn(picture: &RgbImage, findings: &[Finding], masks: Option<&[Mask]>) -> RgbImage {
    let mut picture = picture.clone();
    let (width, height) = picture.dimensions();
    let thickness = (width.max(height) / 300).max(2);
    for (number, finding) in findings.iter().enumerate().rev() {
        let colour = COLOURS[number % COLOURS.len()].1;
        if let Some(mask) = masks.map(|masks| &masks[number].mask) {
            for (pixel, own) in picture.pixels_mut().zip(mask.pixels()) {
                if own.0[0] > 127 {
                    let mixed = |c: usize| ((u16::from(pixel.0[c]) + u16::from(colour[c])) / 2) as u8;
                    *pixel = Rgb([0, 1, 2].map(mixed));
                }
            }
        }
        let [left, top, right, bottom] = pixels_of(finding.edges, (width, height));
        for y in top..bottom {
            for x in left..right {
                let from_edge = (x - left).min(right - 1 - x).min(y - top).min(bottom - 1 - y);
                if from_edge < thickness {
                    picture.put_pixel(x, y, Rgb(colour));
                }
            }
        }
    }
    picture
}

/// The pixels that a box covers, at least one a side: first column and row, and those behind the last.
pub fn pixels_of(edges: [f32; 4], (width, height): (u32, u32)) -> [u32; 4] {
    // Casts from below zero give zero.
    let first = |edge: f32, side: u32| (edge.round() as u32).min(side - 1);
    let [left, top] = [first(edges[0], width), first(edges[1], height)];
    let end = |edge: f32, first: u32, side: u32| (edge.round() as u32).clamp(first + 1, side);
    [left, top, end(edges[2], left, width), end(edges[3], top, height)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_are_kept_inside_the_picture() {
        let size = (10, 20);
        assert_eq!(pixels_of([-3.0, 2.4, 12.0, 7.6], size), [0, 2, 10, 8]);
        assert_eq!(pixels_of([30.0, 25.0, 31.0, 26.0], size), [9, 19, 10, 20]);
        assert_eq!(pixels_of([5.0, 5.0, 5.0, 5.0], size), [5, 5, 6, 6]);
    }

    #[test]
    fn an_outline_and_a_tint_are_drawn_and_the_rest_stays() {
        let black = RgbImage::new(30, 30);
        let finding = Finding { edges: [5.0, 5.0, 25.0, 25.0], score: 0.5, phrase: "toy".into() };
        let mask = image::GrayImage::from_fn(30, 30, |x, _| image::Luma([if x == 15 { 255 } else { 0 }]));
        let picture = drawn(&black, &[finding], Some(&[Mask { mask, score: 1.0 }]));
        assert_eq!(picture.get_pixel(5, 20).0, [230, 30, 30]);
        assert_eq!((picture.get_pixel(15, 15).0, picture.get_pixel(12, 15).0), ([115, 15, 15], [0; 3]));
        assert_eq!(colour_name(8), "red");
    }
}

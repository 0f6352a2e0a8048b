//! Pictures of the coupled self-attention: where a place looks, and which places of two pictures look at each other.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use image::{Rgb, RgbImage, imageops};
use tiny_skia::{Color, LineCap, Paint, PathBuilder, Pixmap, PixmapPaint, Stroke, Transform};

use crate::data::sheet;
use crate::model::coupling::Heard;

/// Places whose shares are computed at once, so that a large layer's [l, n·l] never stands whole in memory.
const PLACES_AT_ONCE: usize = 256;
/// Pictures are drawn at least this large: correspondences between toybox pictures of 64 pixels would be a thicket.
const MIN_SIDE: u32 = 256;

/// A place of one picture and a place of another, by their row-major numbers, of which one attends most to the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Correspondence {
    /// In the first picture.
    pub a: usize,
    /// In the second picture.
    pub b: usize,
    /// The share of attention.
    pub strength: f32,
}

/// The `most` strongest pairs of places of images `a` and `b` of a set, of which one is the other's first choice in that
/// image; no place has two partners.
pub fn correspondences(heard: &Heard, set: usize, (a, b): (usize, usize), most: usize) -> Result<Vec<Correspondence>> {
    let (from_a, from_b) = (first_choices(heard, set, a, b)?, first_choices(heard, set, b, a)?);
    let forth = from_a.iter().enumerate().map(|(place, &(choice, strength))| (place, choice, strength));
    let back = from_b.iter().enumerate().map(|(place, &(choice, strength))| (choice, place, strength));
    let mut pairs: Vec<_> = forth.chain(back).map(|(a, b, strength)| Correspondence { a, b, strength }).collect();
    pairs.sort_by(|x, y| y.strength.total_cmp(&x.strength).then((x.a, x.b).cmp(&(y.a, y.b))));
    let (mut taken_a, mut taken_b) = (BTreeSet::new(), BTreeSet::new());
    pairs.retain(|pair| {
        let is_free = !taken_a.contains(&pair.a) && !taken_b.contains(&pair.b);
        if is_free {
            taken_a.insert(pair.a);
            taken_b.insert(pair.b);
        }
        is_free
    });
    pairs.truncate(most);
    Ok(pairs)
}

/// For every place of image `from` the place of image `to` that it attends to most, with its share.
fn first_choices(heard: &Heard, set: usize, from: usize, to: usize) -> Result<Vec<(usize, f32)>> {
    let l = heard.height * heard.width;
    let places: Vec<usize> = (0..l).collect();
    let mut choices = Vec::with_capacity(l);
    for some in places.chunks(PLACES_AT_ONCE) {
        let shares = heard.of_places(set, from, some)?.narrow(1, to, 1)?.squeeze(1)?; // [places, l]
        for row in shares.to_vec2::<f32>()? {
            let best = row.iter().copied().enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best });
            choices.push(best.context("an image without places")?);
        }
    }
    Ok(choices)
}

/// The pictures of a set side by side, dark where the place in picture `image` at `point` (x, y in pixels) does not attend
/// and lit up to the hottest place; a ring marks the point.
///
/// # Shapes
/// - shares: n times h·w, `width` places a row
pub fn heat_map(
    images: &[RgbImage],
    shares: &[Vec<f32>],
    width: usize,
    (image, (x, y)): (usize, (usize, usize)),
) -> Result<RgbImage> {
    let hottest = shares.iter().flatten().fold(f32::MIN_POSITIVE, |max, share| max.max(*share));
    let mut lit = Vec::with_capacity(images.len());
    for (number, (picture, shares)) in images.iter().zip(shares).enumerate() {
        let large = enlarged(picture);
        let side = large.width();
        let grid =
            image::ImageBuffer::<image::Luma<f32>, _>::from_fn(width as u32, (shares.len() / width) as u32, |x, y| {
                image::Luma([shares[y as usize * width + x as usize] / hottest])
            });
        let heat = imageops::resize(&grid, side, side, imageops::FilterType::Triangle);
        let mut glowing = large.clone();
        for (pixel, heat) in glowing.pixels_mut().zip(heat.pixels()) {
            *pixel = glow(*pixel, heat.0[0].clamp(0.0, 1.0));
        }
        if number == image {
            let scale = side as f32 / picture.width() as f32;
            let centre = ((x as f32 + 0.5) * scale, (y as f32 + 0.5) * scale);
            glowing = Drawing::over(&glowing)?.ring(centre, side as f32 / 32.0).finished();
        }
        lit.push(glowing);
    }
    sheet(&[lit.iter().collect()], 1)
}

/// A darkened grey where there is no heat, over red to yellow where it is hottest.
fn glow(pixel: Rgb<u8>, heat: f32) -> Rgb<u8> {
    let [r, g, b] = pixel.0.map(f32::from);
    let grey = 0.5 * (0.299 * r + 0.587 * g + 0.114 * b);
    // Small shares are seen too.
    let heat = heat.sqrt();
    let fire = [255.0, 230.0 * heat, 40.0 * heat];
    Rgb(fire.map(|fire| (grey + (fire - grey) * heat * 0.85).round() as u8))
}

/// Two pictures side by side with a line from each place to the one that it corresponds to, the strongest most opaque.
pub fn matches_picture(
    first: &RgbImage,
    second: &RgbImage,
    matches: &[Correspondence],
    (columns, rows): (usize, usize),
) -> Result<RgbImage> {
    let pair = [enlarged(first), enlarged(second)];
    let side = pair[0].width() as f32;
    let both = sheet(&[pair.iter().collect()], 1)?;
    let shift = both.width() as f32 - side;
    let strongest = matches.first().map_or(1.0, |pair| pair.strength);
    let mut drawing = Drawing::over(&both)?;
    for (number, pair) in matches.iter().enumerate().rev() {
        let at = |place: usize, left: f32| {
            let (column, row) = ((place % columns) as f32 + 0.5, (place / columns) as f32 + 0.5);
            (left + column * side / columns as f32, row * side / rows as f32)
        };
        let opacity = 0.35 + 0.65 * pair.strength / strongest;
        drawing = drawing.line(at(pair.a, 0.0), at(pair.b, shift), hue(number), opacity);
    }
    Ok(drawing.finished())
}

/// Colours that neighbouring numbers do not share: steps of the golden angle round the hues.
fn hue(number: usize) -> [f32; 3] {
    let turn = (number as f32 * 0.618_034).fract() * 6.0;
    let channel = |offset: f32| ((turn + offset).rem_euclid(6.0) - 3.0).abs() - 1.0;
    [0.0, 4.0, 2.0].map(|offset| channel(offset).clamp(0.0, 1.0))
}

/// A small picture by whole multiples, every pixel a square.
fn enlarged(picture: &RgbImage) -> RgbImage {
    let side = picture.width() * MIN_SIDE.div_ceil(picture.width());
    imageops::resize(picture, side, side, imageops::FilterType::Nearest)
}

/// Lines over a picture.
struct Drawing(Pixmap);

impl Drawing {
    fn over(picture: &RgbImage) -> Result<Self> {
        let (width, height) = picture.dimensions();
        let size = tiny_skia::IntSize::from_wh(width, height).context("a picture without pixels")?;
        let rgba = picture.pixels().flat_map(|pixel| [pixel.0[0], pixel.0[1], pixel.0[2], 255]).collect();
        let mut pixmap = Pixmap::new(width, height).context("a picture that is too large to draw on")?;
        let given = Pixmap::from_vec(rgba, size).context("a picture that is too large to draw on")?;
        pixmap.draw_pixmap(0, 0, given.as_ref(), &PixmapPaint::default(), Transform::identity(), None);
        Ok(Self(pixmap))
    }

    fn line(mut self, from: (f32, f32), to: (f32, f32), [r, g, b]: [f32; 3], opacity: f32) -> Self {
        let mut path = PathBuilder::new();
        path.move_to(from.0, from.1);
        path.line_to(to.0, to.1);
        for (x, y) in [from, to] {
            path.push_circle(x, y, 2.5);
        }
        self.stroke(path, Color::from_rgba(r, g, b, opacity.clamp(0.0, 1.0)).unwrap_or(Color::WHITE), 1.5);
        self
    }

    fn ring(mut self, (x, y): (f32, f32), radius: f32) -> Self {
        for (radius, colour) in [(radius, Color::BLACK), (radius - 1.5, Color::WHITE)] {
            let mut path = PathBuilder::new();
            path.push_circle(x, y, radius);
            self.stroke(path, colour, 1.5);
        }
        self
    }

    fn stroke(&mut self, path: PathBuilder, colour: Color, width: f32) {
        let mut paint = Paint { anti_alias: true, ..Paint::default() };
        paint.set_color(colour);
        let stroke = Stroke { width, line_cap: LineCap::Round, ..Stroke::default() };
        if let Some(path) = path.finish() {
            self.0.stroke_path(&path, &paint, &stroke, Transform::identity(), None);
        }
    }

    fn finished(self) -> RgbImage {
        let (width, height) = (self.0.width(), self.0.height());
        let pixels = self.0.pixels();
        RgbImage::from_fn(width, height, |x, y| {
            let pixel = pixels[(y * width + x) as usize]; // opaque, so that nothing is premultiplied
            Rgb([pixel.red(), pixel.green(), pixel.blue()])
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::model::Probe;

    #[test]
    fn the_strongest_choices_pair_off() {
        // Two images of two places; the first of one and the second of the other are alike, and so are the rest, less.
        let q = [[[4f32, 0.0], [0.0, 2.0], [0.0, 2.0], [4.0, 0.0]]];
        let q = Tensor::new(&q, &Device::Cpu).unwrap();
        let probe = Probe::default();
        probe.hear("layer", (&q, &q), 1, 2, (1, 2), None).unwrap();
        let heard = probe.take();
        let pairs = correspondences(&heard[0], 0, (0, 1), 9).unwrap();
        let places: Vec<_> = pairs.iter().map(|pair| (pair.a, pair.b)).collect();
        assert_eq!(places, [(0, 1), (1, 0)]);
        assert!(pairs[0].strength > pairs[1].strength);
        assert_eq!(correspondences(&heard[0], 0, (0, 1), 1).unwrap().len(), 1);
    }

    #[test]
    fn the_hottest_place_glows_and_the_point_is_ringed() {
        let images = [RgbImage::from_pixel(64, 64, Rgb([90; 3])), RgbImage::from_pixel(64, 64, Rgb([90; 3]))];
        let shares = [vec![0.0, 0.0, 0.0, 0.9], vec![0.0; 4]];
        let map = heat_map(&images, &shares, 2, (1, (10, 20))).unwrap();
        assert_eq!(map.dimensions(), (514, 256));
        let red = |x, y| i32::from(map.get_pixel(x, y).0[0]) - i32::from(map.get_pixel(x, y).0[2]);
        assert!(red(250, 250) > 150 && red(5, 5) == 0 && red(400, 250) == 0);
        assert_ne!(map.get_pixel(258 + 42 - 8, 82), map.get_pixel(258 + 150, 82), "a ring round 4·10, 4·20");
    }
}

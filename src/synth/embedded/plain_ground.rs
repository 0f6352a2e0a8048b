//! Things on plain ground: whatever is not of the ground's colour, in connected pieces. The ground may be lit unevenly: its
//! colour is a plane over the picture, fitted to the border.

use image::{GrayImage, Luma, RgbImage};
use rayon::prelude::*;

use crate::synth::stage::{Answers, Area, DetectAsk, Detection, Detector, Segment, SegmentAsk, Segmenter};

/// Goes up when the answers change.
pub const VERSION: u32 = 1;

/// Pixels of the border that the ground is taken from.
const BORDER: u32 = 4;
/// Rounds of fitting the plane, each without what the last one did not explain.
const ROUNDS: usize = 4;
/// Least distance (RGB, 0 to 255 a channel) that counts as another colour.
const MIN_DISTANCE: f32 = 26.0;
/// The same in deviations of the ground's noise.
const DEVIATIONS: f32 = 6.0;
/// Holes and specks of fewer pixels are noise.
const SPECK: usize = 24;

/// Finds and cuts out by colour distance and connected components.
pub struct PlainGround;

impl Detector for PlainGround {
    fn detections(&mut self, asks: &[DetectAsk]) -> Answers<Vec<Detection>> {
        asks.par_iter().map(|ask| Ok(detections(ask))).collect()
    }
}

impl Segmenter for PlainGround {
    fn segments(&mut self, asks: &[SegmentAsk]) -> Answers<Vec<Segment>> {
        let segments = |ask: &SegmentAsk| {
            let pieces = Pieces::of(ask.image);
            ask.areas.iter().map(|area| pieces.largest_in(*area)).collect()
        };
        asks.par_iter().map(|ask| Ok(segments(ask))).collect()
    }
}

fn detections(ask: &DetectAsk) -> Vec<Detection> {
    let pieces = Pieces::of(ask.image);
    let detection =
        |piece: &Piece| Detection { area: piece.area, score: piece.clearness, phrase: ask.phrase.to_owned() };
    pieces.list.iter().map(detection).collect()
}

/// The connected pieces of a picture that are not ground.
struct Pieces {
    width: usize,
    height: usize,
    /// Number of its piece in `list` + 1 for each pixel; 0 the ground.
    labels: Vec<u32>,
    list: Vec<Piece>,
}

struct Piece {
    area: Area,
    /// Share of its pixels that are twice as far from the ground's colour as they must be.
    clearness: f32,
}

impl Pieces {
    fn of(image: &RgbImage) -> Self {
        let (width, height) = (image.width() as usize, image.height() as usize);
        let (distance, noise) = distances(image);
        let least = MIN_DISTANCE.max(DEVIATIONS * noise);
        let mut is_thing: Vec<bool> = distance.iter().map(|&d| d > least).collect();
        drop_specks(&mut is_thing, width, false);
        drop_specks(&mut is_thing, width, true);
        trim_edges(&mut is_thing, &distance, width);
        let labels = components(&is_thing, width, true);
        let n_pieces = labels.iter().copied().max().unwrap_or(0) as usize;
        let mut list: Vec<(Area, usize, usize)> = vec![(Area::default(), 0, 0); n_pieces];
        for (at, &label) in labels.iter().enumerate().filter(|(_, label)| **label > 0) {
            let (area, n_pixels, n_clear) = &mut list[label as usize - 1];
            let (x, y) = ((at % width) as u32, (at / width) as u32);
            if *n_pixels == 0 {
                *area = Area { left: x, top: y, width: 1, height: 1 };
            }
            let (right, bottom) = ((area.left + area.width).max(x + 1), (area.top + area.height).max(y + 1));
            let (left, top) = (area.left.min(x), area.top.min(y));
            *area = Area { left, top, width: right - left, height: bottom - top };
            *n_pixels += 1;
            *n_clear += usize::from(distance[at] > 2.0 * least);
        }
        let piece = |(area, n_pixels, n_clear)| Piece { area, clearness: n_clear as f32 / n_pixels as f32 };
        Self { width, height, labels, list: list.into_iter().map(piece).collect() }
    }

    /// The piece that has most pixels in `area`.
    fn largest_in(&self, area: Area) -> Segment {
        let mut counts = vec![0usize; self.list.len()];
        let columns = area.left as usize..((area.left + area.width) as usize).min(self.width);
        for y in area.top as usize..((area.top + area.height) as usize).min(self.height) {
            for &label in &self.labels[y * self.width..][columns.clone()] {
                if label > 0 {
                    counts[label as usize - 1] += 1;
                }
            }
        }
        let best = (0..counts.len()).max_by_key(|&piece| (counts[piece], std::cmp::Reverse(piece)));
        let best = best.filter(|&piece| counts[piece] > 0);
        let mask = GrayImage::from_fn(self.width as u32, self.height as u32, |x, y| {
            let label = self.labels[y as usize * self.width + x as usize];
            Luma([if best.is_some_and(|piece| label as usize == piece + 1) { 255 } else { 0 }])
        });
        Segment { mask, score: best.map_or(0.0, |piece| self.list[piece].clearness) }
    }
}

/// Distance of each pixel from the ground's colour, and the ground's noise.
fn distances(image: &RgbImage) -> (Vec<f32>, f32) {
    let (width, height) = image.dimensions();
    let is_border = |x: u32, y: u32| x < BORDER || y < BORDER || x + BORDER >= width || y + BORDER >= height;
    let border: Vec<(f64, f64, [f64; 3])> = image
        .enumerate_pixels()
        .filter(|&(x, y, _)| is_border(x, y))
        .map(|(x, y, pixel)| {
            (f64::from(x) / f64::from(width), f64::from(y) / f64::from(height), pixel.0.map(f64::from))
        })
        .collect();
    let mut planes = [0, 1, 2].map(|channel| [median(border.iter().map(|(.., colour)| colour[channel])), 0.0, 0.0]);
    let mut noise = 0.0;
    // What stands at the border is no ground; after the median everything near it is, then what is near the plane.
    let mut reach = 40.0;
    for _ in 0..ROUNDS {
        let near: Vec<&(f64, f64, [f64; 3])> =
            border.iter().filter(|(x, y, colour)| far(&planes, *x, *y, *colour) < reach).collect();
        if near.len() < 16 {
            break;
        }
        for (channel, plane) in planes.iter_mut().enumerate() {
            *plane = fitted(near.iter().map(|(x, y, colour)| (*x, *y, colour[channel])));
        }
        let squares = near.iter().map(|(x, y, colour)| far(&planes, *x, *y, *colour).powi(2)).sum::<f64>();
        noise = (squares / near.len() as f64).sqrt();
        reach = (4.0 * noise).max(6.0);
    }
    let distance = |x: u32, y: u32| {
        let colour = image.get_pixel(x, y).0.map(f64::from);
        far(&planes, f64::from(x) / f64::from(width), f64::from(y) / f64::from(height), colour) as f32
    };
    ((0..height).flat_map(|y| (0..width).map(move |x| (x, y))).map(|(x, y)| distance(x, y)).collect(), noise as f32)
}

fn far(planes: &[[f64; 3]; 3], x: f64, y: f64, colour: [f64; 3]) -> f64 {
    let squares = planes.iter().zip(colour).map(|([c, by_x, by_y], value)| (value - c - by_x * x - by_y * y).powi(2));
    squares.sum::<f64>().sqrt()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Least squares of c + by_x·x + by_y·y.
fn fitted(points: impl Iterator<Item = (f64, f64, f64)>) -> [f64; 3] {
    // The normal equations, a row each: [Σ1 Σx Σy | Σv] …
    let mut rows = [[0.0f64; 4]; 3];
    for (x, y, value) in points {
        for (row, a) in rows.iter_mut().zip([1.0, x, y]) {
            row.iter_mut().zip([1.0, x, y, value]).for_each(|(sum, b)| *sum += a * b);
        }
    }
    // Gauss without pivoting: the matrix is positive definite, made so by the small ridge where the points lie on a line.
    for at in 0..3 {
        rows[at][at] += 1e-6;
        let row = rows[at];
        for other in (0..3).filter(|&other| other != at) {
            let factor = rows[other][at] / row[at];
            rows[other].iter_mut().zip(row).for_each(|(value, above)| *value -= factor * above);
        }
    }
    [0, 1, 2].map(|at| rows[at][3] / rows[at][at])
}

/// Turns small connected pieces of `value` over.
fn drop_specks(is_thing: &mut [bool], width: usize, value: bool) {
    let wanted: Vec<bool> = is_thing.iter().map(|&is| is == value).collect();
    // Ground is connected by sides, things by corners too: so a diagonal line keeps the ground on its two sides apart.
    let labels = components(&wanted, width, value);
    let mut sizes = vec![0usize; labels.iter().copied().max().unwrap_or(0) as usize + 1];
    labels.iter().for_each(|&label| sizes[label as usize] += 1);
    for (is, label) in is_thing.iter_mut().zip(labels) {
        if label > 0 && sizes[label as usize] < SPECK {
            *is = !value;
        }
    }
}

/// Pixels at the edge that are less than half a thing's colour are ground.
fn trim_edges(is_thing: &mut [bool], distance: &[f32], width: usize) {
    for _ in 0..2 {
        let before = is_thing.to_vec();
        for at in (0..before.len()).filter(|&at| before[at]) {
            let around = neighbours(at, width, before.len(), true);
            let (mut is_edge, mut clearest) = (false, distance[at]);
            for other in around.into_iter().flatten() {
                is_edge |= !before[other];
                clearest = clearest.max(distance[other]);
            }
            if is_edge && distance[at] < 0.5 * clearest {
                is_thing[at] = false;
            }
        }
    }
}

/// Numbers, from 1 in reading order, of the connected pieces of what is true; 0 elsewhere.
fn components(is_thing: &[bool], width: usize, by_corners: bool) -> Vec<u32> {
    let mut labels = vec![0u32; is_thing.len()];
    let mut next = 0;
    let mut open = vec![];
    for start in 0..is_thing.len() {
        if !is_thing[start] || labels[start] > 0 {
            continue;
        }
        next += 1;
        labels[start] = next;
        open.push(start);
        while let Some(at) = open.pop() {
            for other in neighbours(at, width, is_thing.len(), by_corners).into_iter().flatten() {
                if is_thing[other] && labels[other] == 0 {
                    labels[other] = next;
                    open.push(other);
                }
            }
        }
    }
    labels
}

/// The pixels beside a pixel; those at its corners last.
fn neighbours(at: usize, width: usize, count: usize, by_corners: bool) -> [Option<usize>; 8] {
    let (x, y, height) = (at % width, at / width, count / width);
    let steps: [(isize, isize); 8] = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)];
    let step = |(number, (dx, dy)): (usize, (isize, isize))| {
        let x = x.checked_add_signed(dx).filter(|&x| x < width)?;
        let y = y.checked_add_signed(dy).filter(|&y| y < height)?;
        (by_corners || number < 4).then_some(y * width + x)
    };
    let mut found = [None; 8];
    found.iter_mut().zip(steps.into_iter().enumerate()).for_each(|(found, each)| *found = step(each));
    found
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;
    use crate::rng::Rng;

    /// Two discs, one with a hole, on unevenly lit noisy ground, one of them cut by the border.
    fn picture() -> RgbImage {
        let mut rng = Rng::new(1, "plain ground test", 0);
        let from = |x: u32, y: u32, cx: f32, cy: f32| ((x as f32 - cx).powi(2) + (y as f32 - cy).powi(2)).sqrt();
        RgbImage::from_fn(120, 100, |x, y| {
            let noise = |value: i32, rng: &mut Rng| (value + rng.below(9) as i32 - 4).clamp(0, 255) as u8;
            let light = (x / 8 + y / 10) as i32;
            let colour = if (6.0..20.0).contains(&from(x, y, 40.0, 50.0)) {
                [200, 60, 40]
            } else if from(x, y, 119.0, 50.0) < 22.0 {
                [40, 60, 190]
            } else {
                [170 + light, 190 + light, 200 + light]
            };
            Rgb(colour.map(|value| noise(value, &mut rng)))
        })
    }

    #[test]
    fn things_are_found_on_uneven_noisy_ground_even_at_the_border() {
        let image = picture();
        let found = PlainGround.detections(&[DetectAsk { image: &image, phrase: "disc" }]).remove(0).unwrap();
        assert_eq!(found.len(), 2, "{found:?}");
        let disc = found.iter().find(|found| found.area.left < 60).unwrap().area;
        assert!(disc.left.abs_diff(21) <= 1 && disc.width.abs_diff(39) <= 2 && disc.top.abs_diff(31) <= 1, "{disc:?}");
        assert!(found.iter().all(|found| found.score > 0.9 && found.phrase == "disc"));
    }

    #[test]
    fn a_segment_is_the_piece_in_its_area_with_its_hole() {
        let image = picture();
        let areas = [Area { left: 24, top: 30, width: 30, height: 30 }, Area { left: 0, top: 0, width: 9, height: 9 }];
        let segments = PlainGround.segments(&[SegmentAsk { image: &image, areas: &areas }]).remove(0).unwrap();
        let n_white = segments[0].mask.pixels().filter(|pixel| pixel.0[0] == 255).count() as f64;
        let expected = std::f64::consts::PI * (20.0 * 20.0 - 6.0 * 6.0);
        assert!((n_white / expected - 1.0).abs() < 0.06, "{n_white} {expected}");
        assert_eq!(segments[0].mask.get_pixel(40, 50).0, [0], "the hole shows the ground");
        assert!(segments[1].score == 0.0 && segments[1].mask.pixels().all(|pixel| pixel.0[0] == 0));
    }

    #[test]
    fn a_plane_is_fitted() {
        let points = (0..50).map(|i| {
            let (x, y) = (f64::from(i % 7), f64::from(i / 7));
            (x, y, 3.0 + 2.0 * x - y)
        });
        let plane = fitted(points);
        assert!(plane.iter().zip([3.0, 2.0, -1.0]).all(|(a, b)| (a - b).abs() < 1e-4), "{plane:?}");
    }
}

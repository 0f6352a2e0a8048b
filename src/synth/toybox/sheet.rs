//! Collages of toys with known truth: a sheet of plain ground with one toy in several poses, sometimes a stranger or two among
//! them, sometimes the same pose twice.

use anyhow::Result;
use image::{GrayImage, Luma, Rgb, RgbImage};
use rayon::prelude::*;
use tiny_skia::{Pixmap, Transform};

use super::paint::{Canvas, Colour};
use super::{EVAL_SUBJECTS, Kind, Subject, toy};
use crate::rng::Rng;
use crate::synth::embedded::kind_of;
use crate::synth::stage::{Answers, Collage, CollageAsk, CollagePainter, Truth};

/// Goes up when the sheets change.
pub const VERSION: u32 = 1;

/// Pixels a side.
const SIDE: u32 = 384;
/// Things stand in a grid of so many columns and rows, each somewhere in its cell.
const CELLS: u32 = 3;
const CELL: u32 = SIDE / CELLS;
/// Pixels between a thing and the edge of its cell.
const GAP: u32 = 4;
/// Poses of the toy: these, or one more.
const POSES: usize = 5;
/// Of there being a copy of a pose; one that counts as a pose.
const COPY: f64 = 0.25;
/// Of there being strangers: one or two other toys, half of them of the same kind.
const STRANGERS: f64 = 0.4;

/// Draws sheets of toys.
pub struct ToySheets;

impl CollagePainter for ToySheets {
    fn collages(&mut self, asks: &[CollageAsk]) -> Answers<Collage> {
        let collage = |ask: &CollageAsk| -> Result<Collage> {
            Ok(sheet(kind_of(ask.object)?, &mut Rng::new(ask.seed, "toybox sheet", 0)))
        };
        asks.par_iter().map(collage).collect()
    }
}

/// A toy in a pose, in the middle of a cell.
struct Posed {
    pixmap: Pixmap,
    subject: u64,
    /// First and last column, first and last row that it reaches.
    extent: [u32; 4],
}

fn sheet(kind: Kind, rng: &mut Rng) -> Collage {
    let subject = random_subject(kind, rng);
    let n_poses = POSES + rng.below(2);
    let has_copy = rng.chance(COPY);
    let mut strangers: Vec<Subject> = vec![];
    if rng.chance(STRANGERS) {
        for _ in 0..1 + rng.below(2) {
            let kind = if rng.chance(0.5) { kind } else { *rng.pick(&Kind::ALL) };
            strangers.push(random_subject(kind, rng));
        }
    }
    let ground = ground_colour(std::iter::once(&subject).chain(&strangers), rng);

    let mut things: Vec<Posed> = (0..n_poses).map(|_| posed(&subject, rng)).collect();
    if has_copy {
        let first = &things[0];
        let copy = Posed { pixmap: first.pixmap.clone(), subject: first.subject, extent: first.extent };
        things.push(copy);
    }
    things.extend(strangers.iter().map(|stranger| posed(stranger, rng)));
    rng.shuffle(&mut things);
    let mut cells: Vec<u32> = (0..CELLS * CELLS).collect();
    rng.shuffle(&mut cells);

    let mut image = lit_ground(ground, rng);
    let mut labels = GrayImage::new(SIDE, SIDE);
    let mut subjects = vec![];
    for (thing, cell) in things.iter().zip(cells) {
        subjects.push(thing.subject);
        let corner = ((cell % CELLS) * CELL, (cell / CELLS) * CELL);
        put(&mut image, &mut labels, thing, corner, subjects.len() as u8, rng);
    }
    // The noise of a camera, over everything.
    for value in image.iter_mut() {
        *value = (f64::from(*value) + rng.between(-3.0, 3.0)).round().clamp(0.0, 255.0) as u8;
    }
    Collage { image, truth: Some(Truth { labels, subjects }) }
}

/// A toy of the kind that is not kept for evaluation.
fn random_subject(kind: Kind, rng: &mut Rng) -> Subject {
    let n_kinds = Kind::ALL.len() as u64;
    loop {
        // Kinds go round by seed.
        let seed = (rng.next_u64() >> 8) * n_kinds + kind as u64;
        if !EVAL_SUBJECTS.contains(&seed) {
            return Subject::from_seed(seed);
        }
    }
}

/// Of a few plain colours the one that is farthest from all colours of the toys.
fn ground_colour<'a>(subjects: impl Iterator<Item = &'a Subject>, rng: &mut Rng) -> [f64; 3] {
    let mut taken: Vec<Colour> = vec![Colour::new(255, 255, 255), Colour::new(24, 22, 30)];
    for subject in subjects {
        let body = subject.body;
        // The outline, the light and the shade are the body's colour, changed.
        taken.extend([body, body.shade(-0.55), body.shade(0.35), body.shade(-0.18), subject.second, subject.accent]);
        taken.push(subject.accent.shade(-0.45));
    }
    let far = |colour: &[f64; 3]| {
        let squares = |other: &Colour| {
            let other = [other.red, other.green, other.blue].map(f64::from);
            colour.iter().zip(other).map(|(a, b)| (a - b).powi(2)).sum::<f64>()
        };
        taken.iter().map(squares).fold(f64::INFINITY, f64::min)
    };
    let mut colours: Vec<[f64; 3]> = (0..24)
        .map(|_| {
            let tone = rng.between(90.0, 215.0);
            [0, 1, 2].map(|_| tone + rng.between(-32.0, 32.0))
        })
        .collect();
    colours.sort_by(|a, b| far(b).total_cmp(&far(a)));
    colours[0]
}

/// Plain ground under light from one side.
fn lit_ground(colour: [f64; 3], rng: &mut Rng) -> RgbImage {
    let (by_x, by_y) = (rng.between(-9.0, 9.0), rng.between(-9.0, 9.0));
    RgbImage::from_fn(SIDE, SIDE, |x, y| {
        let place = |value: u32| f64::from(value) / f64::from(SIDE) - 0.5;
        let light = by_x * place(x) + by_y * place(y);
        Rgb(colour.map(|value| (value + light).round().clamp(0.0, 255.0) as u8))
    })
}

fn posed(subject: &Subject, rng: &mut Rng) -> Posed {
    let side = CELL as f32;
    let degrees = rng.between(-26.0, 26.0) as f32;
    let mirror = if rng.chance(0.5) { -1.0 } else { 1.0 };
    let mut scale = rng.between(0.31, 0.42) as f32 * side;
    loop {
        let frame = Transform::from_translate(side / 2.0, side / 2.0)
            .pre_scale(scale, scale)
            .pre_concat(Transform::from_rotate(degrees))
            .pre_scale(mirror, 1.0);
        let mut canvas = Canvas::new(CELL, frame);
        toy::paint(&mut canvas, subject);
        let extent = extent(&canvas.pixmap);
        let [left, right, top, bottom] = extent;
        // Inside its cell with room on all sides, whatever the kind's proportions are.
        if left > 0
            && top > 0
            && right + 1 < CELL
            && bottom + 1 < CELL
            && (right - left).max(bottom - top) < CELL - 2 * GAP
        {
            return Posed { pixmap: canvas.pixmap, subject: subject.seed, extent };
        }
        scale *= 0.93;
    }
}

fn extent(pixmap: &Pixmap) -> [u32; 4] {
    let mut found = [u32::MAX, 0, u32::MAX, 0];
    for (at, _) in pixmap.pixels().iter().enumerate().filter(|(_, pixel)| pixel.alpha() > 0) {
        let (x, y) = (at as u32 % pixmap.width(), at as u32 / pixmap.width());
        found = [found[0].min(x), found[1].max(x), found[2].min(y), found[3].max(y)];
    }
    found
}

/// Somewhere in the cell at `corner`.
fn put(image: &mut RgbImage, labels: &mut GrayImage, thing: &Posed, corner: (u32, u32), label: u8, rng: &mut Rng) {
    let [left, right, top, bottom] = thing.extent;
    let mut start = |first: u32, last: u32| GAP + rng.below((CELL - 2 * GAP - (last - first)) as usize) as u32;
    let (to_x, to_y) = (corner.0 + start(left, right), corner.1 + start(top, bottom));
    for y in top..=bottom {
        for x in left..=right {
            let pixel = thing.pixmap.pixels()[(y * thing.pixmap.width() + x) as usize];
            let (to_x, to_y) = (to_x + x - left, to_y + y - top);
            let alpha = u32::from(pixel.alpha());
            if alpha > 127 {
                labels.put_pixel(to_x, to_y, Luma([label]));
            }
            // The pixmap's colours are premultiplied.
            let behind = image.get_pixel(to_x, to_y).0.map(|value| (u32::from(value) * (255 - alpha) + 127) / 255);
            let thing = [pixel.red(), pixel.green(), pixel.blue()].map(u32::from);
            image.put_pixel(to_x, to_y, Rgb([0, 1, 2].map(|c| (thing[c] + behind[c]).min(255) as u8)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn sheets(n: u64) -> Vec<Collage> {
        (0..n).map(|seed| sheet(Kind::ALL[seed as usize % 12], &mut Rng::new(seed, "sheet test", 0))).collect()
    }

    #[test]
    fn things_are_whole_and_apart() {
        for Collage { truth, .. } in sheets(24) {
            let Truth { labels, subjects } = truth.unwrap();
            for label in 1..=subjects.len() as u8 {
                let count = labels.pixels().filter(|pixel| pixel.0[0] == label).count();
                assert!(count > 1200, "{count} pixels");
            }
            for (x, y, pixel) in labels.enumerate_pixels().filter(|(_, _, pixel)| pixel.0[0] > 0) {
                assert!(x >= GAP && y >= GAP && x + GAP < SIDE && y + GAP < SIDE);
                let mut others = (0..7).flat_map(|j| (0..7).map(move |i| (x + i - 3, y + j - 3)));
                assert!(others.all(|(x, y)| [0, pixel.0[0]].contains(&labels.get_pixel(x, y).0[0])));
            }
        }
    }

    #[test]
    fn strangers_and_copies_come_as_often_as_they_should() {
        let sheets = sheets(120);
        let subjects = |sheet: &Collage| sheet.truth.as_ref().unwrap().subjects.clone();
        let n_mixed =
            sheets.iter().filter(|sheet| subjects(sheet).into_iter().collect::<BTreeSet<_>>().len() > 1).count();
        assert!((30..=66).contains(&n_mixed), "{n_mixed}");
        assert!(sheets.iter().all(|sheet| (POSES..=POSES + 4).contains(&subjects(sheet).len())));
        assert_eq!(sheet(Kind::Mug, &mut Rng::new(5, "x", 0)).image, sheet(Kind::Mug, &mut Rng::new(5, "x", 0)).image);
    }
}

//! The square that training sees of a picture: the middle one, or at random a smaller one that keeps the subject, and its
//! mirror image.

use image::{GrayImage, RgbImage, imageops};

use super::shrink::resized_region;
use crate::rng::Rng;

/// How training pictures vary.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut {
    /// Least side of a random square, as a share of the largest square's; 1: always the largest, in the middle.
    pub crop: f64,
    /// Every second picture is mirrored. Off unless asked for: writing and other things that have a side suffer.
    pub flip: bool,
}

impl Default for Cut {
    fn default() -> Self {
        Self { crop: 1.0, flip: false }
    }
}

/// A part of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Left edge.
    pub x: u32,
    /// Upper edge.
    pub y: u32,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
}

impl Region {
    /// All of a picture.
    pub fn all(image: &RgbImage) -> Self {
        Self { x: 0, y: 0, width: image.width(), height: image.height() }
    }

    /// The largest square in the middle.
    pub fn middle_square(self) -> Self {
        let side = self.width.min(self.height);
        let (x, y) = (self.x + (self.width - side) / 2, self.y + (self.height - side) / 2);
        Self { x, y, width: side, height: side }
    }
}

impl Cut {
    /// Whether pictures vary at all.
    pub fn is_plain(&self) -> bool {
        self.crop >= 1.0 && !self.flip
    }

    /// Tells these settings from all others.
    pub fn name(&self) -> String {
        format!("crop {} flip {}", self.crop, self.flip)
    }

    /// A square of `region`, `side` pixels a side: the middle one, or with `rng` one drawn from it. `subject` (where it is
    /// known) stays in it as far as it can.
    pub fn square(
        &self,
        image: &RgbImage,
        region: Region,
        subject: Option<Region>,
        rng: Option<&mut Rng>,
        side: u32,
    ) -> RgbImage {
        let Some(rng) = rng.filter(|_| !self.is_plain()) else {
            return resized_region(image, region.middle_square(), side);
        };
        let mut square = resized_region(image, self.drawn(region, subject, rng), side);
        if self.flip && rng.chance(0.5) {
            imageops::flip_horizontal_in_place(&mut square);
        }
        square
    }

    fn drawn(&self, region: Region, subject: Option<Region>, rng: &mut Rng) -> Region {
        if self.crop >= 1.0 {
            return region.middle_square();
        }
        let largest = region.width.min(region.height);
        let drawn = (f64::from(largest) * rng.between(self.crop, 1.0)).round() as u32;
        let needed = subject.map_or(1, |subject| subject.width.max(subject.height));
        let side = drawn.max(needed).clamp(1, largest);
        let mut place = |start: u32, length: u32, subject: Option<(u32, u32)>| {
            let (mut first, mut last) = (start, start + length - side);
            if let Some((from, to)) = subject {
                let (inner_first, inner_last) = (to.saturating_sub(side).max(first), from.min(last));
                // A subject longer than the square is met in its middle.
                (first, last) = match inner_first <= inner_last {
                    true => (inner_first, inner_last),
                    false => {
                        let middle = ((from + to) / 2).saturating_sub(side / 2).clamp(first, last);
                        (middle, middle)
                    }
                };
            }
            first + rng.below((last - first + 1) as usize) as u32
        };
        let x = place(region.x, region.width, subject.map(|s| (s.x, s.x + s.width)));
        let y = place(region.y, region.height, subject.map(|s| (s.y, s.y + s.height)));
        Region { x, y, width: side, height: side }
    }
}

/// A copy of a region.
pub fn part(image: &RgbImage, region: Region) -> RgbImage {
    let (row, width) = (3 * image.width() as usize, 3 * region.width as usize);
    let rows = image.as_raw().chunks_exact(row).skip(region.y as usize).take(region.height as usize);
    let mut pixels = Vec::with_capacity(width * region.height as usize);
    rows.for_each(|row| pixels.extend_from_slice(&row[3 * region.x as usize..][..width]));
    RgbImage::from_raw(region.width, region.height, pixels).expect("rows × columns")
}

/// The smallest region that holds everything that a mask marks; None: it marks nothing.
pub fn marked(mask: &GrayImage) -> Option<Region> {
    let mut bounds: Option<(u32, u32, u32, u32)> = None;
    for (x, y, _) in mask.enumerate_pixels().filter(|(_, _, value)| value.0[0] > 127) {
        let (left, top, right, bottom) = bounds.unwrap_or((x, y, x, y));
        bounds = Some((left.min(x), top.min(y), right.max(x), bottom.max(y)));
    }
    bounds.map(|(x, y, right, bottom)| Region { x, y, width: right + 1 - x, height: bottom + 1 - y })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUT: Cut = Cut { crop: 0.5, flip: false };

    fn region(x: u32, y: u32, width: u32, height: u32) -> Region {
        Region { x, y, width, height }
    }

    fn drawn(cut: Cut, region: Region, subject: Option<Region>) -> Vec<Region> {
        (0..400).map(|draw| cut.drawn(region, subject, &mut Rng::new(1, "cut test", draw))).collect()
    }

    #[test]
    fn cuts_lie_in_their_region_and_reach_all_of_it() {
        let all = region(10, 100, 60, 40);
        let cuts = drawn(CUT, all, None);
        assert!(cuts.iter().all(|cut| cut.width == cut.height && (20..=40).contains(&cut.width)));
        assert!(
            cuts.iter().all(|cut| cut.x >= 10 && cut.x + cut.width <= 70 && cut.y >= 100 && cut.y + cut.height <= 140)
        );
        assert!([10, 49].iter().all(|edge| cuts.iter().any(|cut| cut.x.abs_diff(*edge) < 3)));
        assert!(cuts.iter().any(|cut| cut.width < 23) && cuts.iter().any(|cut| cut.width > 37));
    }

    #[test]
    fn the_subject_stays_in_the_cut() {
        let subject = region(12, 103, 30, 8);
        for cut in drawn(CUT, region(10, 100, 60, 40), Some(subject)) {
            assert!(cut.width >= 30 && cut.x <= 12 && cut.x + cut.width >= 42, "{cut:?}");
            assert!(cut.y <= 103 && cut.y + cut.height >= 111, "{cut:?}");
        }
        // One longer than any square is met in its middle.
        for cut in drawn(CUT, region(0, 0, 90, 30), Some(region(0, 0, 90, 10))) {
            assert_eq!((cut.x, cut.width), (30, 30));
        }
    }

    #[test]
    fn without_a_draw_the_middle_is_taken_whatever_the_cut_is() {
        let image = RgbImage::from_fn(8, 4, |x, y| image::Rgb([x as u8, y as u8, 0]));
        let square = CUT.square(&image, Region::all(&image), None, None, 4);
        assert_eq!((square.dimensions(), square.get_pixel(0, 3).0), ((4, 4), [2, 3, 0]));
        let plain = Cut::default().square(&image, Region::all(&image), None, Some(&mut Rng::new(0, "cut", 0)), 4);
        assert_eq!(plain, square);
    }

    #[test]
    fn every_second_picture_is_mirrored_where_asked_for() {
        let image = RgbImage::from_fn(4, 4, |x, _| image::Rgb([x as u8; 3]));
        let is_mirrored = |flip, draw| {
            let cut = Cut { crop: 1.0, flip };
            let square = cut.square(&image, Region::all(&image), None, Some(&mut Rng::new(0, "cut", draw)), 4);
            square.get_pixel(0, 0).0[0] == 3
        };
        assert!((70..130).contains(&(0..200).filter(|&draw| is_mirrored(true, draw)).count()));
        assert!((0..200).all(|draw| !is_mirrored(false, draw)));
    }

    #[test]
    fn a_mask_tells_where_the_subject_is() {
        let mask = GrayImage::from_fn(9, 9, |x, y| image::Luma([if (2..5).contains(&x) && y == 7 { 255 } else { 9 }]));
        assert_eq!(marked(&mask), Some(region(2, 7, 3, 1)));
        assert_eq!(marked(&GrayImage::new(4, 4)), None);
    }
}

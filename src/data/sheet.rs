//! Pictures side by side.

use anyhow::{Result, ensure};
use image::{Rgb, RgbImage, imageops};

/// Pixels between the pictures of a group, and three times as many between groups.
const GAP: u32 = 2;
const WHITE: Rgb<u8> = Rgb([255; 3]);

/// A contact sheet: each group of pictures (a reference and what was made of it) in a row of its own, `groups_a_line` such
/// rows beside one another. All pictures have the size of the first, all groups as many pictures as the first.
pub fn sheet(groups: &[Vec<&RgbImage>], groups_a_line: usize) -> Result<RgbImage> {
    let Some(first) = groups.first().and_then(|group| group.first()) else {
        return Ok(RgbImage::new(0, 0));
    };
    let (width, height) = first.dimensions();
    let a_group = groups[0].len();
    for (index, group) in groups.iter().enumerate() {
        ensure!(group.len() == a_group, "sheet: group {index} has {} pictures, the first {a_group}", group.len());
        for image in group {
            let (w, h) = image.dimensions();
            ensure!(
                (w, h) == (width, height),
                "sheet: group {index} has a picture of {w}x{h}, the first is {width}x{height}"
            );
        }
    }
    let columns = groups_a_line.clamp(1, groups.len());
    let group_width = a_group as u32 * (width + GAP) + 2 * GAP;
    let total_width = columns as u32 * group_width - 3 * GAP;
    let total_height = groups.len().div_ceil(columns) as u32 * (height + GAP) - GAP;
    let mut sheet = RgbImage::from_pixel(total_width, total_height, WHITE);
    for (index, group) in groups.iter().enumerate() {
        let (left, top) = ((index % columns) as u32 * group_width, (index / columns) as u32 * (height + GAP));
        for (place, image) in group.iter().enumerate() {
            imageops::replace(&mut sheet, *image, (left + place as u32 * (width + GAP)) as i64, top as i64);
        }
    }
    Ok(sheet)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(value: u8) -> RgbImage {
        RgbImage::from_pixel(4, 3, Rgb([value; 3]))
    }

    #[test]
    fn groups_follow_one_another() {
        let images: Vec<RgbImage> = (0..6).map(flat).collect();
        let groups: Vec<Vec<&RgbImage>> = images.chunks(2).map(|pair| pair.iter().collect()).collect();
        let sheet = sheet(&groups, 2).unwrap();
        // Two groups of 4 + 2 + 4, 6 between them; two lines of 3, 2 between them.
        assert_eq!(sheet.dimensions(), (26, 8));
        for (index, at) in [(0, 0), (6, 0), (16, 0), (22, 0), (0, 5), (6, 5)].into_iter().enumerate() {
            assert_eq!(sheet.get_pixel(at.0, at.1).0, [index as u8; 3], "picture {index}");
            assert_eq!(sheet.get_pixel(at.0 + 3, at.1 + 2).0, [index as u8; 3], "picture {index}");
        }
        assert_eq!(*sheet.get_pixel(4, 0), WHITE);
        assert_eq!(*sheet.get_pixel(25, 7), WHITE);
    }

    #[test]
    fn fails_when_sizes_differ() {
        let (a, b) = (flat(0), RgbImage::new(5, 3));
        let message = sheet(&[vec![&a, &b]], 1).unwrap_err().to_string();
        assert!(message.contains("5x3"), "{message}");
    }
}

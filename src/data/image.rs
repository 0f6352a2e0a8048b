//! A picture given by the user, made a square that the network takes; sizes and squares of pictures in general.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail};
use image::imageops::{self, FilterType};
use image::{GenericImageView, ImageBuffer, Pixel, RgbImage};

use super::decode::{MAX_BYTES, Notice, decode};
use crate::whole_file::write_whole;

/// How a picture that is no square becomes one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fit {
    /// The largest square in the middle.
    #[default]
    Crop,
    /// The smallest square around it, each border in the mean colour of the edge that it continues.
    Pad,
}

/// A reference with less than this a side shows nothing to learn from.
const MIN_SIDE: u32 = 16;

/// Reads a reference picture: upright 8-bit RGB, square, not yet resized; with everything that was changed on the way
/// (to be shown after the file's name).
pub fn load_reference(path: &Path, fit: Fit) -> Result<(RgbImage, Vec<Notice>)> {
    read_square(path, fit).with_context(|| path.display().to_string())
}

fn read_square(path: &Path, fit: Fit) -> Result<(RgbImage, Vec<Notice>)> {
    if path.is_dir() {
        bail!("is a folder; give one picture");
    }
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => bail!("no such file; check the path"),
        other => other.context("cannot be read")?,
    };
    let decoded = decode(&bytes)?;
    let (width, height) = decoded.image.dimensions();
    if width.min(height) < MIN_SIDE {
        bail!("{width}×{height} pixels are too few; give a picture of at least {MIN_SIDE}×{MIN_SIDE}");
    }
    let mut notices = decoded.notices;
    if width == height {
        return Ok((decoded.image, notices));
    }
    Ok(match fit {
        Fit::Crop => {
            notices.push(Notice::Cropped(width, height));
            (middle_square(&decoded.image), notices)
        }
        Fit::Pad => {
            // A panorama's square is as high as it is long, and nearly all of it border.
            if 3 * u64::from(width.max(height)).pow(2) > MAX_BYTES {
                bail!(
                    "{width}×{height} pixels are too long a strip to pad to a square; cut it shorter, or use --fit crop"
                );
            }
            notices.push(Notice::Padded(width, height));
            (padded_square(&decoded.image), notices)
        }
    })
}

/// The largest square in the middle of a picture.
pub fn middle_square<P: Pixel + 'static>(image: &ImageBuffer<P, Vec<P::Subpixel>>) -> ImageBuffer<P, Vec<P::Subpixel>> {
    let (width, height) = image.dimensions();
    let side = width.min(height);
    imageops::crop_imm(image, (width - side) / 2, (height - side) / 2, side, side).to_image()
}

/// The smallest square around a picture; see [`Fit::Pad`].
fn padded_square(image: &RgbImage) -> RgbImage {
    let (width, height) = image.dimensions();
    let side = width.max(height);
    let (left, top) = ((side - width) / 2, (side - height) / 2);
    let (first, last) = if width < height {
        (mean_colour(image, 0, 0, 1, height), mean_colour(image, width - 1, 0, 1, height))
    } else {
        (mean_colour(image, 0, 0, width, 1), mean_colour(image, 0, height - 1, width, 1))
    };
    let mut square = RgbImage::from_fn(side, side, |x, y| if x < left || y < top { first } else { last });
    imageops::replace(&mut square, image, left.into(), top.into());
    square
}

fn mean_colour(image: &RgbImage, x: u32, y: u32, width: u32, height: u32) -> image::Rgb<u8> {
    let mut sums = [0u64; 3];
    for (_, _, pixel) in GenericImageView::pixels(&*imageops::crop_imm(image, x, y, width, height)) {
        sums.iter_mut().zip(pixel.0).for_each(|(sum, value)| *sum += u64::from(value));
    }
    let count = u64::from(width) * u64::from(height);
    image::Rgb(sums.map(|sum| ((sum + count / 2) / count) as u8))
}

/// A square picture with `side` pixels a side: Lanczos when it shrinks, Catmull-Rom (which rings less) when it grows,
/// untouched when it has that size.
pub fn resized<P: Pixel<Subpixel = u8> + 'static>(
    image: &ImageBuffer<P, Vec<u8>>,
    side: u32,
) -> ImageBuffer<P, Vec<u8>> {
    let filter = match image.width().cmp(&side) {
        std::cmp::Ordering::Equal => return image.clone(),
        std::cmp::Ordering::Greater => FilterType::Lanczos3,
        std::cmp::Ordering::Less => FilterType::CatmullRom,
    };
    imageops::resize(image, side, side, filter)
}

/// Writes a picture as PNG, whole or not at all.
pub fn write_png(path: &Path, picture: &RgbImage) -> Result<()> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, image::ImageFormat::Png).with_context(|| path.display().to_string())?;
    write_whole(path, bytes.get_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Red, green and blue thirds along the longer side.
    fn thirds(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let third = if width > height { x * 3 / width } else { y * 3 / height };
            image::Rgb([[200, 0, 0], [0, 200, 0], [0, 0, 200]][third as usize])
        })
    }

    fn saved(image: &RgbImage) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("picture.png");
        image.save(&path).unwrap();
        (folder, path)
    }

    #[test]
    fn a_square_comes_as_it_is() {
        let picture = thirds(30, 30);
        let (_folder, path) = saved(&picture);
        for fit in [Fit::Crop, Fit::Pad] {
            assert_eq!(load_reference(&path, fit).unwrap(), (picture.clone(), vec![]));
        }
    }

    #[test]
    fn crop_takes_the_middle_and_names_the_other_way() {
        for (width, height) in [(90, 30), (30, 90)] {
            let (_folder, path) = saved(&thirds(width, height));
            let (square, notices) = load_reference(&path, Fit::Crop).unwrap();
            assert_eq!(square.dimensions(), (30, 30));
            assert!(square.pixels().all(|pixel| pixel.0 == [0, 200, 0]));
            assert_eq!(notices, vec![Notice::Cropped(width, height)]);
            assert!(notices[0].to_string().contains("--fit pad"));
        }
    }

    #[test]
    fn pad_keeps_all_and_continues_the_edges() {
        let picture = RgbImage::from_fn(20, 40, |x, _| image::Rgb([if x < 10 { 250 } else { 10 }; 3]));
        let (_folder, path) = saved(&picture);
        let (square, notices) = load_reference(&path, Fit::Pad).unwrap();
        assert_eq!((square.dimensions(), notices), ((40, 40), vec![Notice::Padded(20, 40)]));
        assert!((0..20).all(|x| square.get_pixel(x, 7).0 == [250; 3]));
        assert!((20..40).all(|x| square.get_pixel(x, 7).0 == [10; 3]));
        let wide = imageops::rotate90(&picture);
        let (_folder, path) = saved(&wide);
        assert_eq!(load_reference(&path, Fit::Pad).unwrap().0, imageops::rotate90(&square));
    }

    #[test]
    fn a_strip_whose_square_no_memory_would_hold_is_refused() {
        // 20000×20000 pixels would take 1.2 GB.
        for (width, height) in [(20_000, 16), (16, 20_000)] {
            let (_folder, path) = saved(&thirds(width, height));
            let message = format!("{:#}", load_reference(&path, Fit::Pad).unwrap_err());
            assert!(message.contains("too long a strip") && message.contains("--fit crop"), "{message}");
            assert_eq!(load_reference(&path, Fit::Crop).unwrap().0.dimensions(), (16, 16));
        }
    }

    #[test]
    fn errors_name_file_cause_and_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let message = |path: &Path| format!("{:#}", load_reference(path, Fit::Crop).unwrap_err());
        assert!(message(&folder.path().join("none.png")).ends_with("none.png: no such file; check the path"));
        assert!(message(folder.path()).contains("is a folder; give one picture"));
        let (_kept, tiny) = saved(&thirds(40, 15));
        assert!(message(&tiny).contains("picture.png: 40×15 pixels are too few; give"));
        let text = folder.path().join("text.png");
        std::fs::write(&text, "hello").unwrap();
        assert!(message(&text).contains("text.png: is not a picture"));
    }

    #[test]
    fn resizing_keeps_flat_colour_and_means() {
        let picture = thirds(96, 96);
        assert_eq!(resized(&picture, 96), picture);
        for side in [24, 200] {
            let other = resized(&picture, side);
            assert_eq!(other.dimensions(), (side, side));
            assert_eq!(other.get_pixel(side / 2, side / 2).0, [0, 200, 0]);
        }
        // Every second pixel white: taking one pixel of each pair would give black or white instead of grey.
        let fine = RgbImage::from_fn(64, 64, |x, _| image::Rgb([if x % 2 == 0 { 255 } else { 0 }; 3]));
        assert!(resized(&fine, 16).pixels().all(|pixel| pixel.0[0].abs_diff(127) < 12));
    }
}

//! The kinds of picture files that people have, as references: right, or refused in words. (`src/data/decode.rs` tests what is
//! broken, cut off or printed in inks.)

use std::path::PathBuf;

use image::codecs::{jpeg::JpegEncoder, png::PngEncoder, webp::WebPEncoder};
use image::metadata::Orientation;
use image::{DynamicImage, ExtendedColorType, GrayImage, ImageEncoder, Luma, Rgb, RgbImage};
use jedi::data::{Fit, Notice, load_reference};
use tempfile::TempDir;

/// Four flat quarters, 32×24 pixels: from left to right, then down.
const QUARTERS: [[u8; 3]; 4] = [[200, 30, 30], [30, 200, 30], [30, 30, 200], [240, 240, 240]];
const CENTRES: [(u32, u32); 4] = [(8, 6), (24, 6), (8, 18), (24, 18)];

fn quarters() -> RgbImage {
    RgbImage::from_fn(32, 24, |x, y| Rgb(QUARTERS[usize::from(x >= 16) + 2 * usize::from(y >= 12)]))
}

/// A file of these bytes; its name says nothing.
struct Picture(PathBuf, #[allow(dead_code)] TempDir);

impl Picture {
    fn new(bytes: &[u8]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("picture");
        std::fs::write(&path, bytes).expect("a file");
        Self(path, folder)
    }

    /// All of it on a square of 32×32, whose rows 4 to 27 it fills.
    fn read(&self) -> (RgbImage, Vec<Notice>) {
        let (square, notices) = load_reference(&self.0, Fit::Pad).expect("a picture");
        assert_eq!(square.dimensions(), (32, 32));
        (square, notices.into_iter().filter(|notice| !matches!(notice, Notice::Padded(..))).collect())
    }

    fn assert_shows(&self, colours: [[u8; 3]; 4], tolerance: u8, what: &str) {
        let (square, _) = self.read();
        for ((x, y), colour) in CENTRES.into_iter().zip(colours) {
            let found = square.get_pixel(x, y + 4).0;
            let is_close = found.iter().zip(colour).all(|(a, b)| a.abs_diff(b) <= tolerance);
            assert!(is_close, "{what}: {found:?} at {x}, {y}, not {colour:?}");
        }
    }
}

/// A little-endian TIFF header with one entry: tag 0x0112 (orientation), type short, count 1.
fn exif(orientation: u8) -> Vec<u8> {
    [b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0", &[orientation, 0, 0, 0, 0, 0, 0, 0][..]].concat()
}

/// The file's stored pixels, and what turns them upright.
fn written<'a, E: ImageEncoder>(
    encoder: impl FnOnce(&'a mut Vec<u8>) -> E,
    file: &'a mut Vec<u8>,
    picture: &DynamicImage,
    orientation: u8,
) {
    let mut encoder = encoder(file);
    encoder.set_exif_metadata(exif(orientation)).expect("a format that has it");
    let (width, height) = (picture.width(), picture.height());
    encoder.write_image(picture.as_bytes(), width, height, ExtendedColorType::Rgb8).expect("a picture");
}

#[test]
fn a_photograph_is_upright_however_the_camera_was_held() {
    // What undoes each orientation: the two quarter turns undo each other, the others undo themselves.
    for (orientation, undoes) in [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 8), (7, 7), (8, 6)] {
        let mut stored = DynamicImage::ImageRgb8(quarters());
        stored.apply_orientation(Orientation::from_exif(undoes).expect("one of the eight"));
        let (mut jpeg, mut png, mut webp) = (vec![], vec![], vec![]);
        written(|file| JpegEncoder::new_with_quality(file, 98), &mut jpeg, &stored, orientation);
        written(PngEncoder::new, &mut png, &stored, orientation);
        written(WebPEncoder::new_lossless, &mut webp, &stored, orientation);
        for (format, file, tolerance) in [("jpeg", jpeg, 8), ("png", png, 0), ("webp", webp, 0)] {
            let what = format!("{format} with orientation {orientation}");
            Picture::new(&file).assert_shows(QUARTERS, tolerance, &what);
        }
    }
}

/// A PNG with these palette indices, 32×24, at `depth` bits.
fn indexed(depth: png::BitDepth, rows: &[u8], palette: &[u8], alpha: Option<Vec<u8>>) -> Vec<u8> {
    let mut file = vec![];
    let mut encoder = png::Encoder::new(&mut file, 32, 24);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_depth(depth);
    encoder.set_palette(palette.to_vec());
    if let Some(alpha) = alpha {
        encoder.set_trns(alpha);
    }
    encoder.write_header().expect("a header").write_image_data(rows).expect("its pixels");
    file
}

#[test]
fn a_palette_gives_its_colours_at_any_depth_and_its_transparency_white() {
    let palette = QUARTERS.concat();
    let index = |x: u32, y: u32| u8::from(x >= 16) + 2 * u8::from(y >= 12);
    for (depth, bits) in [(png::BitDepth::Two, 2), (png::BitDepth::Four, 4), (png::BitDepth::Eight, 8)] {
        let rows: Vec<u8> = (0..24)
            .flat_map(|y| {
                (0..32).step_by(8 / bits).map(move |x| {
                    (0..8 / bits as u32)
                        .fold(0u8, |byte, i| byte.checked_shl(bits as u32).unwrap_or(0) | index(x + i, y))
                })
            })
            .collect();
        Picture::new(&indexed(depth, &rows, &palette, None)).assert_shows(QUARTERS, 0, &format!("{bits} bits"));
        let glass = Picture::new(&indexed(depth, &rows, &palette, Some(vec![255, 0])));
        let [red, _, blue, white] = QUARTERS;
        glass.assert_shows([red, [255; 3], blue, white], 0, &format!("{bits} bits, transparent"));
        assert_eq!(glass.read().1, [Notice::Transparent]);
    }
}

#[test]
fn grey_pictures_are_grey_in_all_their_kinds() {
    const GREYS: [u8; 4] = [10, 90, 170, 250];
    let grey = GrayImage::from_fn(32, 24, |x, y| Luma([GREYS[usize::from(x >= 16) + 2 * usize::from(y >= 12)]]));
    let deep = image::ImageBuffer::from_fn(32, 24, |x, y| Luma([u16::from(grey.get_pixel(x, y).0[0]) * 257]));
    let glass = image::ImageBuffer::from_fn(32, 24, |x, y| image::LumaA([grey.get_pixel(x, y).0[0], 255]));
    let greys = GREYS.map(|grey| [grey; 3]);
    for (what, picture, notices) in [
        ("8 bits", DynamicImage::ImageLuma8(grey.clone()), vec![]),
        ("16 bits", DynamicImage::ImageLuma16(deep), vec![Notice::DeepColours]),
        ("opaque", DynamicImage::ImageLumaA8(glass), vec![]),
    ] {
        let mut file = std::io::Cursor::new(vec![]);
        picture.write_to(&mut file, image::ImageFormat::Png).expect("a picture");
        let file = Picture::new(file.get_ref());
        file.assert_shows(greys, 0, what);
        assert_eq!(file.read().1, notices, "{what}");
    }
    // One bit a pixel: the right half is white.
    let mut file = vec![];
    let mut encoder = png::Encoder::new(&mut file, 32, 24);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::One);
    let rows = [0, 0, 0xff, 0xff].repeat(24);
    encoder.write_header().expect("a header").write_image_data(&rows).expect("its pixels");
    Picture::new(&file).assert_shows([[0; 3], [255; 3], [0; 3], [255; 3]], 0, "one bit");
}

#[test]
fn a_picture_of_8192_pixels_a_side_is_taken_and_one_of_a_gigabyte_refused() {
    let huge = GrayImage::from_fn(8192, 8192, |x, _| Luma([if x < 4096 { 20 } else { 220 }]));
    let mut file = vec![];
    JpegEncoder::new_with_quality(&mut file, 80)
        .write_image(huge.as_raw(), 8192, 8192, ExtendedColorType::L8)
        .expect("a picture");
    let (picture, notices) = load_reference(&Picture::new(&file).0, Fit::Crop).expect("a picture");
    assert_eq!((picture.dimensions(), notices), ((8192, 8192), vec![]));
    assert!(picture.get_pixel(9, 4000).0[0].abs_diff(20) < 4 && picture.get_pixel(8180, 9).0[0].abs_diff(220) < 4);
    // None of its pixels is there: nothing is read before the size is looked at.
    let mut bomb = vec![];
    let encoder = png::Encoder::new(&mut bomb, 60_000, 60_000);
    encoder.write_header().and_then(|mut file| file.write_chunk(png::chunk::IDAT, &[])).expect("a header");
    let error = format!("{:#}", load_reference(&Picture::new(&bomb).0, Fit::Crop).expect_err("too large"));
    assert!(error.contains("60000×60000 pixels are too many to hold in memory"), "{error}");
}

//! Kinds of picture files that photographs and drawings come in, whatever the names of the files: each is read right, or
//! refused. `decode` has the tests of what it changes or refuses with a word of its own.

use std::io::Cursor;

use image::codecs::{jpeg::JpegEncoder, png::PngEncoder, webp::WebPEncoder};
use image::{ImageEncoder, RgbImage};

use super::decode::{Decoded, Notice, decode};

fn close(pixel: &image::Rgb<u8>, expected: [u8; 3], tolerance: u8) -> bool {
    pixel.0.iter().zip(expected).all(|(a, b)| a.abs_diff(b) <= tolerance)
}

/// The order of the shown quarters (top left, top right, bottom left, bottom right) for each value of EXIF's tag
/// 0x0112: what EXIF 2.32, table 6, says of the first row and the first column. Other values turn nothing.
const ORIENTATIONS: [[usize; 4]; 10] = [
    [0, 1, 2, 3],
    [0, 1, 2, 3],
    [1, 0, 3, 2],
    [3, 2, 1, 0],
    [2, 3, 0, 1],
    [0, 2, 1, 3],
    [2, 0, 3, 1],
    [3, 1, 2, 0],
    [1, 3, 0, 2],
    [0, 1, 2, 3],
];

/// A TIFF header in either byte order with one entry: tag 0x0112 (orientation), type short, count 1.
fn exif(orientation: u8, is_big_endian: bool) -> Vec<u8> {
    match is_big_endian {
        true => [b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0", &[orientation, 0, 0, 0, 0, 0, 0][..]].concat(),
        false => [b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0", &[orientation, 0, 0, 0, 0, 0, 0, 0][..]].concat(),
    }
}

fn with_exif(mut encoder: impl ImageEncoder, picture: &RgbImage, exif: Vec<u8>) {
    encoder.set_exif_metadata(exif).unwrap();
    let (width, height) = picture.dimensions();
    encoder.write_image(picture, width, height, image::ExtendedColorType::Rgb8).unwrap();
}

#[test]
fn every_exif_orientation_is_applied_in_every_format_that_has_it() {
    const COLOURS: [[u8; 3]; 4] = [[200, 30, 30], [30, 200, 30], [30, 30, 200], [240, 240, 240]];
    let quarter = |x: u32, y: u32| usize::from(x >= 16) + 2 * usize::from(y >= 8);
    let picture = RgbImage::from_fn(32, 16, |x, y| image::Rgb(COLOURS[quarter(x, y)]));
    for (orientation, quarters) in ORIENTATIONS.iter().enumerate() {
        for is_big_endian in [false, true] {
            let exif = exif(orientation as u8, is_big_endian);
            let (mut jpeg, mut png, mut webp) = (vec![], vec![], vec![]);
            with_exif(JpegEncoder::new_with_quality(&mut jpeg, 98), &picture, exif.clone());
            with_exif(PngEncoder::new(&mut png), &picture, exif.clone());
            with_exif(WebPEncoder::new_lossless(&mut webp), &picture, exif);
            for (name, file, tolerance) in [("jpeg", jpeg, 8), ("png", png, 0), ("webp", webp, 0)] {
                let shown = decode(&file).unwrap().image;
                let (width, height) = shown.dimensions();
                let is_on_its_side = (5..=8).contains(&orientation);
                assert_eq!((width, height), if is_on_its_side { (16, 32) } else { (32, 16) }, "{name} {orientation}");
                let middles = [(1, 1), (3, 1), (1, 3), (3, 3)].map(|(x, y)| (x * width / 4, y * height / 4));
                for ((x, y), of) in middles.into_iter().zip(quarters) {
                    let is_right = close(shown.get_pixel(x, y), COLOURS[*of], tolerance);
                    assert!(is_right, "{name} {orientation}: {x}, {y}");
                }
            }
        }
    }
}

#[test]
fn damaged_exif_turns_nothing_and_refuses_nothing() {
    let picture = RgbImage::from_fn(32, 16, |x, y| image::Rgb([(x * 7) as u8, (y * 5) as u8, (x * y) as u8]));
    for exif in [b"".to_vec(), b"garbage".to_vec(), exif(6, false)[..9].to_vec()] {
        let mut png = vec![];
        with_exif(PngEncoder::new(&mut png), &picture, exif);
        assert_eq!(decode(&png).unwrap().image, picture);
    }
}

/// A PNG of two pixels; `rows` as the format packs them.
fn two_pixels(colour: png::ColorType, depth: png::BitDepth, tables: [&[u8]; 2], row: &[u8]) -> Decoded {
    let mut bytes = vec![];
    let mut encoder = png::Encoder::new(&mut bytes, 2, 1);
    encoder.set_color(colour);
    encoder.set_depth(depth);
    let [palette, transparency] = tables.map(<[u8]>::to_vec);
    if !palette.is_empty() {
        encoder.set_palette(palette);
    }
    if !transparency.is_empty() {
        encoder.set_trns(transparency);
    }
    encoder.write_header().unwrap().write_image_data(row).unwrap();
    decode(&bytes).unwrap()
}

#[test]
fn every_kind_of_png_shows_its_colours() {
    use png::{BitDepth as Bits, ColorType as Kind};
    const PALETTE: &[u8] = &[1, 2, 3, 40, 50, 60];
    let (clear, deep) = (vec![Notice::Transparent], vec![Notice::DeepColours]);
    for (kind, bits, tables, row, colours, notices) in [
        (Kind::Grayscale, Bits::One, [&[][..]; 2], &[0b0100_0000][..], [[0; 3], [255; 3]], &vec![]),
        (Kind::Grayscale, Bits::Four, [&[][..]; 2], &[0x0a], [[0; 3], [170; 3]], &vec![]),
        (Kind::Grayscale, Bits::Eight, [&[][..]; 2], &[10, 170], [[10; 3], [170; 3]], &vec![]),
        (Kind::Grayscale, Bits::Sixteen, [&[][..]; 2], &[0, 0, 0x64, 0x64], [[0; 3], [100; 3]], &deep),
        (Kind::GrayscaleAlpha, Bits::Eight, [&[][..]; 2], &[9, 255, 0, 51], [[9; 3], [204; 3]], &clear),
        // A channel of opacity in which nothing is see-through.
        (Kind::GrayscaleAlpha, Bits::Eight, [&[][..]; 2], &[9, 255, 7, 255], [[9; 3], [7; 3]], &vec![]),
        (Kind::Indexed, Bits::Two, [PALETTE, &[]], &[0b0100_0000], [[40, 50, 60], [1, 2, 3]], &vec![]),
        (Kind::Indexed, Bits::Two, [PALETTE, &[0]], &[0b0100_0000], [[40, 50, 60], [255; 3]], &clear),
        (Kind::Indexed, Bits::Four, [PALETTE, &[]], &[0x10], [[40, 50, 60], [1, 2, 3]], &vec![]),
        (Kind::Indexed, Bits::Four, [PALETTE, &[255, 0]], &[0x10], [[255; 3], [1, 2, 3]], &clear),
        (Kind::Indexed, Bits::Eight, [PALETTE, &[]], &[0, 1], [[1, 2, 3], [40, 50, 60]], &vec![]),
        (Kind::Indexed, Bits::Eight, [PALETTE, &[255, 0]], &[0, 1], [[1, 2, 3], [255; 3]], &clear),
        // One colour that is meant to be see-through.
        (Kind::Rgb, Bits::Eight, [&[], &[0, 7, 0, 8, 0, 9]], &[7, 8, 9, 7, 8, 8], [[255; 3], [7, 8, 8]], &clear),
    ] {
        let decoded = two_pixels(kind, bits, tables, row);
        let found = [0, 1].map(|x| decoded.image.get_pixel(x, 0).0);
        assert_eq!((found, &decoded.notices), (colours, notices), "{kind:?} {bits:?}");
    }
}

#[test]
fn a_picture_of_8192_pixels_a_side_is_read_and_a_larger_one_than_memory_takes_is_refused() {
    let picture = image::GrayImage::from_fn(8192, 8192, |x, _| image::Luma([if x < 4096 { 250 } else { 5 }]));
    let mut jpeg = Cursor::new(vec![]);
    picture.write_to(&mut jpeg, image::ImageFormat::Jpeg).unwrap();
    let decoded = decode(jpeg.get_ref()).unwrap();
    assert_eq!((decoded.image.dimensions(), decoded.notices), ((8192, 8192), vec![]));
    assert!(
        close(decoded.image.get_pixel(100, 8191), [250; 3], 4) && close(decoded.image.get_pixel(8191, 0), [5; 3], 4)
    );
    // A header that promises 60000×60000 pixels, of which hardly any are there.
    let mut bomb = vec![];
    let mut encoder = png::Encoder::new(&mut bomb, 60_000, 60_000);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_chunk(png::chunk::IDAT, &[]).unwrap();
    let refusal = format!("{:#}", decode(&bomb).unwrap_err());
    assert!(refusal.contains("60000×60000 pixels are too many to hold in memory"), "{refusal}");
}

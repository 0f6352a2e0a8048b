//! The width and height of a picture from the start of its file, nothing decoded. Read `decode` for the whole picture.

use std::io::Cursor;

use anyhow::{Context, Result};
use image::ImageFormat;
use image::codecs::{gif::GifDecoder, jpeg::JpegDecoder, png::PngDecoder, webp::WebPDecoder};
use image::{ImageDecoder, metadata::Orientation};

use super::decode::{BROKEN, check_size, format_of};

/// Bytes that hold the header of all but the oddest pictures.
pub const START_BYTES: u64 = 64 * 1024;

/// Width and height of the upright picture that begins with `start`. An error may only mean that `start` is too short.
pub fn upright_size(start: &[u8]) -> Result<(u32, u32)> {
    let bytes = Cursor::new(start);
    match format_of(start)? {
        ImageFormat::Png => size(PngDecoder::new(bytes).context(BROKEN)?),
        ImageFormat::Jpeg => size(JpegDecoder::new(bytes).context(BROKEN)?),
        ImageFormat::WebP => size(WebPDecoder::new(bytes).context(BROKEN)?),
        _ => size(GifDecoder::new(bytes).context(BROKEN)?),
    }
}

fn size(mut decoder: impl ImageDecoder) -> Result<(u32, u32)> {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    check_size(&decoder)?;
    let (width, height) = decoder.dimensions();
    Ok(match decoder.orientation().context(BROKEN)? {
        Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH => (height, width),
        _ => (width, height),
    })
}

#[cfg(test)]
mod tests {
    use image::codecs::jpeg::JpegEncoder;
    use image::{ImageEncoder, RgbImage};

    use super::*;
    use crate::data::decode;
    use crate::rng::Rng;

    /// Noise: its file cannot be small.
    fn picture(width: u32, height: u32) -> RgbImage {
        let mut rng = Rng::new(1, "header test", 0);
        RgbImage::from_fn(width, height, |_, _| image::Rgb([0; 3].map(|_: u8| rng.below(256) as u8)))
    }

    #[test]
    fn the_start_of_a_file_tells_the_size_that_decoding_gives() {
        for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Gif] {
            let mut bytes = Cursor::new(vec![]);
            picture(300, 450).write_to(&mut bytes, format).unwrap();
            let start = &bytes.get_ref()[..START_BYTES as usize];
            assert_eq!(upright_size(start).unwrap(), (300, 450), "{format:?}");
        }
        for fixture in ["lossy.webp", "animated.webp", "cmyk.jpg"] {
            let bytes = std::fs::read(format!("{}/tests/fixtures/{fixture}", env!("CARGO_MANIFEST_DIR"))).unwrap();
            assert_eq!(upright_size(&bytes).unwrap(), decode(&bytes).unwrap().image.dimensions(), "{fixture}");
        }
    }

    #[test]
    fn a_picture_on_its_side_is_measured_upright() {
        // A little-endian TIFF header with one entry: tag 0x0112 (orientation), type short, count 1, value 6.
        let exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0".to_vec();
        let mut file = vec![];
        let mut encoder = JpegEncoder::new_with_quality(&mut file, 95);
        encoder.set_exif_metadata(exif).unwrap();
        encoder.write_image(&picture(32, 16), 32, 16, image::ExtendedColorType::Rgb8).unwrap();
        assert_eq!(upright_size(&file).unwrap(), (16, 32));
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        assert!(upright_size(b"<html>").is_err() && upright_size(b"").is_err());
        assert!(upright_size(b"\x89PNG\r\n\x1a\n\0\0").is_err());
    }
}

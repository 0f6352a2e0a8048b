//! The bytes of a picture file to 8-bit RGB, upright, or a clear refusal: never half a picture. Embedded colour profiles
//! are not applied (as in Stable Diffusion's own training data), so wide-gamut photographs come out slightly pale.

use std::fmt;
use std::io::Cursor;

use anyhow::{Context, Result, bail};
use image::codecs::{gif::GifDecoder, jpeg::JpegDecoder, png::PngDecoder, webp::WebPDecoder};
use image::{AnimationDecoder, DynamicImage, ImageDecoder, ImageFormat, RgbImage};

use super::jpeg;

/// What a reader of pictures changed that the user may want to know. To be shown after the file's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// More than 8 bits a channel.
    DeepColours,
    /// Transparent parts.
    Transparent,
    /// An animation.
    FirstFrame,
    /// Printing inks.
    Inks,
    /// The middle of a picture of this width and height.
    Cropped(u32, u32),
    /// Borders around a picture of this width and height.
    Padded(u32, u32),
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Notice::DeepColours => write!(f, "more than 8 bits a channel, reduced to 8"),
            Notice::Transparent => write!(f, "transparent parts are laid on white"),
            Notice::FirstFrame => write!(f, "an animation, only its first frame is used"),
            Notice::Inks => {
                write!(f, "CMYK turned into RGB without a colour profile; if colours matter, save it as sRGB")
            }
            Notice::Cropped(width, height) => {
                let side = width.min(height);
                write!(f, "{width}×{height} cropped to the middle {side}×{side}; --fit pad keeps all of it")
            }
            Notice::Padded(width, height) => {
                let side = width.max(height);
                write!(f, "{width}×{height} padded to {side}×{side}; --fit crop takes the middle")
            }
        }
    }
}

/// A picture as its file has it, of any width and height.
#[derive(Debug)]
pub struct Decoded {
    /// Upright, opaque, 8 bits a channel.
    pub image: RgbImage,
    /// What was changed on the way.
    pub notices: Vec<Notice>,
}

/// A decoded picture may take this much memory: 250 megapixels of 8-bit RGBA.
pub(super) const MAX_BYTES: u64 = 1_000_000_000;

/// Decodes PNG, JPEG, WebP or GIF, whatever the file is called.
pub fn decode(bytes: &[u8]) -> Result<Decoded> {
    if bytes.is_empty() {
        bail!("the file is empty; copy or download it again");
    }
    let mut notices = vec![];
    let picture = match format_of(bytes)? {
        ImageFormat::Png => {
            let decoder = PngDecoder::new(Cursor::new(bytes)).context(BROKEN)?;
            if decoder.is_apng().context(BROKEN)? {
                notices.push(Notice::FirstFrame);
            }
            upright(decoder, &mut notices)?
        }
        ImageFormat::Jpeg => {
            check_jpeg(bytes, &mut notices)?;
            upright(JpegDecoder::new(Cursor::new(bytes)).context(BROKEN)?, &mut notices)?
        }
        ImageFormat::WebP => {
            let decoder = WebPDecoder::new(Cursor::new(bytes)).context(BROKEN)?;
            if decoder.has_animation() {
                notices.push(Notice::FirstFrame);
            }
            upright(decoder, &mut notices)?
        }
        _ => first_gif_frame(bytes, &mut notices)?,
    };
    Ok(Decoded { image: laid_on_white(picture, &mut notices), notices })
}

pub(super) const BROKEN: &str = "is broken or cut off; copy or download it again";

/// One of the four formats that the binary reads.
pub(super) fn format_of(bytes: &[u8]) -> Result<ImageFormat> {
    // HEIC and AVIF are boxes whose brand stands behind "ftyp".
    if bytes.get(4..8) == Some(b"ftyp") {
        bail!("is a HEIC, AVIF or video file, which jedi does not read; convert it to PNG or JPEG");
    }
    match image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP | ImageFormat::Gif)) => Ok(format),
        Ok(other) => {
            let name = other.extensions_str()[0].to_uppercase();
            bail!("is a {name} file, which jedi does not read; convert it to PNG or JPEG")
        }
        Err(_) => bail!("is not a picture that jedi reads; give a PNG, JPEG, WebP or GIF file"),
    }
}

fn check_jpeg(bytes: &[u8], notices: &mut Vec<Notice>) -> Result<()> {
    let outline = jpeg::outline(bytes);
    if !outline.complete {
        bail!("the JPEG is cut off; copy or download it again");
    }
    if outline.components == 4 {
        if !outline.adobe {
            // Without Adobe's marker nobody knows whether 255 means no ink or full ink.
            bail!("a CMYK JPEG that does not say how its inks are stored; save it as sRGB");
        }
        notices.push(Notice::Inks);
    }
    Ok(())
}

/// The first frame on its full canvas.
fn first_gif_frame(bytes: &[u8], notices: &mut Vec<Notice>) -> Result<DynamicImage> {
    let decoder = GifDecoder::new(Cursor::new(bytes)).context(BROKEN)?;
    check_size(&decoder)?;
    let mut frames = decoder.into_frames();
    let first = frames.next().context("the GIF holds no picture; save it again as PNG")?.context(BROKEN)?;
    if frames.next().is_some() {
        notices.push(Notice::FirstFrame);
    }
    Ok(DynamicImage::ImageRgba8(first.into_buffer()))
}

pub(super) fn check_size(decoder: &impl ImageDecoder) -> Result<()> {
    if decoder.total_bytes() > MAX_BYTES {
        let (width, height) = decoder.dimensions();
        bail!("{width}×{height} pixels are too many to hold in memory; make the picture smaller");
    }
    Ok(())
}

/// Decodes and turns the picture as its EXIF orientation says.
fn upright(mut decoder: impl ImageDecoder, notices: &mut Vec<Notice>) -> Result<DynamicImage> {
    check_size(&decoder)?;
    let orientation = decoder.orientation().context(BROKEN)?;
    let color = decoder.color_type();
    if color.bytes_per_pixel() > color.channel_count() {
        notices.push(Notice::DeepColours);
    }
    let mut picture = DynamicImage::from_decoder(decoder).context(BROKEN)?;
    picture.apply_orientation(orientation);
    Ok(picture)
}

fn laid_on_white(picture: DynamicImage, notices: &mut Vec<Notice>) -> RgbImage {
    if !picture.color().has_alpha() {
        return picture.into_rgb8();
    }
    let picture = picture.into_rgba8();
    if picture.pixels().any(|pixel| pixel.0[3] < 255) {
        notices.push(Notice::Transparent);
    }
    RgbImage::from_fn(picture.width(), picture.height(), |x, y| {
        let [red, green, blue, alpha] = picture.get_pixel(x, y).0.map(u32::from);
        image::Rgb([red, green, blue].map(|value| ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8))
    })
}

#[cfg(test)]
mod tests {
    use image::codecs::gif::GifEncoder;
    use image::{Frame, Rgba, RgbaImage};

    use super::*;

    const CMYK: &[u8] = include_bytes!("../../tests/fixtures/cmyk.jpg");
    const ANIMATED_WEBP: &[u8] = include_bytes!("../../tests/fixtures/animated.webp");
    const LOSSY_WEBP: &[u8] = include_bytes!("../../tests/fixtures/lossy.webp");

    fn textured(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 7) as u8, (y * 5) as u8, (x * y) as u8]))
    }

    fn encoded(picture: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(vec![]);
        picture.into().write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    fn refusal(bytes: &[u8]) -> String {
        format!("{:#}", decode(bytes).unwrap_err())
    }

    fn close(pixel: &image::Rgb<u8>, expected: [u8; 3], tolerance: u8) -> bool {
        pixel.0.iter().zip(expected).all(|(a, b)| a.abs_diff(b) <= tolerance)
    }

    #[test]
    fn plain_pictures_come_without_notices() {
        let picture = textured(40, 30);
        for format in [ImageFormat::Png, ImageFormat::WebP] {
            let decoded = decode(&encoded(picture.clone(), format)).unwrap();
            assert_eq!((decoded.image, decoded.notices), (picture.clone(), vec![]), "{format:?}");
        }
        let grey = image::GrayImage::from_fn(20, 20, |x, y| image::Luma([(x * 9 + y) as u8]));
        for format in [ImageFormat::Png, ImageFormat::Jpeg] {
            let decoded = decode(&encoded(grey.clone(), format)).unwrap();
            assert_eq!(decoded.notices, vec![]);
            assert!(decoded.image.enumerate_pixels().all(|(x, y, p)| close(p, [grey.get_pixel(x, y).0[0]; 3], 4)));
        }
    }

    #[test]
    fn what_is_not_a_picture_is_refused() {
        assert!(refusal(b"").contains("is empty"));
        assert!(refusal(b"<html>404</html>").contains("not a picture"));
        assert!(refusal(b"\0\0\0\x18ftypheic\0\0\0\0").contains("HEIC"));
        assert!(refusal(b"BM\0\0\0\0\0\0\0\0").contains("a BMP file"));
        assert!(refusal(b"II*\0\0\0\0\0\0\0").contains("a TIFF file"));
    }

    /// Wherever a file is cut, it is refused, or all pixels are there (cut inside an unimportant end).
    #[test]
    fn a_cut_off_file_never_gives_half_a_picture() {
        let picture = textured(64, 48);
        let files = [
            ("png", encoded(picture.clone(), ImageFormat::Png)),
            ("jpeg", encoded(picture.clone(), ImageFormat::Jpeg)),
            ("webp", encoded(picture.clone(), ImageFormat::WebP)),
            ("lossy webp", LOSSY_WEBP.to_vec()),
            ("gif", encoded(picture.clone(), ImageFormat::Gif)),
        ];
        for (name, file) in files {
            let whole = decode(&file).unwrap().image;
            let mut refused = 0;
            for length in (0..file.len()).rev().step_by(1 + file.len() / 150) {
                match decode(&file[..length]) {
                    Ok(cut) => assert!(cut.image == whole, "{name}, {length} of {} bytes", file.len()),
                    Err(_) => refused += 1,
                }
            }
            assert!(refused > 70, "{name}: only {refused} refused");
        }
    }

    #[test]
    fn inks_become_the_colours_that_they_print() {
        let decoded = decode(CMYK).unwrap();
        assert_eq!(decoded.notices, vec![Notice::Inks]);
        // The four flat quarters that Pillow was given when it wrote the file.
        let quarters =
            [((8, 8), [200, 30, 30]), ((24, 8), [30, 200, 30]), ((8, 24), [30, 30, 200]), ((24, 24), [240, 240, 240])];
        for ((x, y), colour) in quarters {
            assert!(close(decoded.image.get_pixel(x, y), colour, 3), "{:?}", decoded.image.get_pixel(x, y));
        }
    }

    #[test]
    fn inks_of_unknown_sense_are_refused() {
        // The Adobe marker is the 16 bytes behind the start marker.
        let bare = [&CMYK[..2], &CMYK[18..]].concat();
        assert!(refusal(&bare).contains("does not say how its inks are stored"));
    }

    #[test]
    fn sixteen_bits_are_reduced() {
        let deep = image::ImageBuffer::<image::Rgb<u16>, _>::from_pixel(20, 20, image::Rgb([65535, 257 * 100, 0]));
        let decoded = decode(&encoded(deep, ImageFormat::Png)).unwrap();
        assert_eq!((decoded.image.get_pixel(3, 3).0, decoded.notices), ([255, 100, 0], vec![Notice::DeepColours]));
    }

    #[test]
    fn transparency_is_laid_on_white() {
        let mut picture = RgbaImage::from_pixel(20, 20, Rgba([10, 20, 30, 255]));
        let opaque = decode(&encoded(picture.clone(), ImageFormat::Png)).unwrap();
        assert_eq!((opaque.image.get_pixel(0, 0).0, opaque.notices), ([10, 20, 30], vec![]));
        picture.put_pixel(0, 0, Rgba([10, 20, 30, 0]));
        picture.put_pixel(1, 0, Rgba([0, 0, 255, 51]));
        let decoded = decode(&encoded(picture, ImageFormat::Png)).unwrap();
        let pixels: Vec<_> = (0..3).map(|x| decoded.image.get_pixel(x, 0).0).collect();
        assert_eq!(pixels, [[255, 255, 255], [204, 204, 255], [10, 20, 30]]);
        assert_eq!(decoded.notices, vec![Notice::Transparent]);
    }

    #[test]
    fn animations_give_their_first_frame() {
        let frame = |value: u8| RgbaImage::from_pixel(20, 20, Rgba([value, 0, 0, 255]));
        let mut gif = vec![];
        GifEncoder::new(&mut gif).encode_frames([200, 90].map(|value| Frame::new(frame(value)))).unwrap();
        let mut apng = vec![];
        let mut encoder = png::Encoder::new(&mut apng, 20, 20);
        encoder.set_color(png::ColorType::Rgba);
        encoder.set_animated(2, 0).unwrap();
        let mut writer = encoder.write_header().unwrap();
        for value in [200, 90] {
            writer.write_image_data(frame(value).as_raw()).unwrap();
        }
        writer.finish().unwrap();
        for (name, file) in [("gif", gif), ("apng", apng), ("webp", ANIMATED_WEBP.to_vec())] {
            let decoded = decode(&file).unwrap();
            assert_eq!(decoded.notices, vec![Notice::FirstFrame], "{name}");
            assert_eq!(decoded.image.get_pixel(1, 1).0[0], 200, "{name}");
        }
        let still = decode(&encoded(textured(20, 20), ImageFormat::Gif)).unwrap();
        assert_eq!(still.notices, vec![]);
    }
}

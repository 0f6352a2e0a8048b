//! A picture as the bytes of a file, in the format of its name; and the settings that made it, read back.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use anyhow::{Context as _, Result};
use image::codecs::jpeg::JpegEncoder;
use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, ImageEncoder as _, RgbImage};
use serde_json::Value;

use crate::invalid::invalid;

/// Keyword of the PNG text chunk that holds a picture's settings.
pub const SETTINGS_KEYWORD: &str = "jedi";

/// Of 100: where artefacts cannot be seen any more.
const JPEG_QUALITY: u8 = 95;

/// A way to store a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Lossless, with the settings inside.
    Png,
    /// Lossy at quality 95; the settings are in the `.json` beside it alone.
    Jpeg,
    /// Lossless; the settings are in the `.json` beside it alone.
    WebP,
}

impl Format {
    /// By the suffix of a path; None where it is no picture's. A suffix of a format that cannot be written is refused.
    pub fn of(path: &Path) -> Result<Option<Self>> {
        let suffix = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        Ok(Some(match suffix.as_str() {
            "png" => Self::Png,
            "jpg" | "jpeg" => Self::Jpeg,
            "webp" => Self::WebP,
            "avif" | "bmp" | "gif" | "heic" | "jxl" | "tif" | "tiff" => {
                return Err(invalid(format!(
                    "--out {}: jedi writes .png, .jpg and .webp, or a folder of .png files",
                    path.display()
                )));
            }
            _ => return Ok(None),
        }))
    }

    /// The file of a picture.
    pub fn bytes(self, picture: &RgbImage, settings: &Value) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let (width, height) = picture.dimensions();
        match self {
            Self::Png => write_png(&mut bytes, picture, settings)?,
            Self::Jpeg => JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY).write_image(
                picture,
                width,
                height,
                ExtendedColorType::Rgb8,
            )?,
            Self::WebP => {
                WebPEncoder::new_lossless(&mut bytes).write_image(picture, width, height, ExtendedColorType::Rgb8)?
            }
        }
        Ok(bytes)
    }
}

fn write_png(bytes: &mut Vec<u8>, picture: &RgbImage, settings: &Value) -> Result<()> {
    let mut encoder = png::Encoder::new(bytes, picture.width(), picture.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // iTXt, not tEXt: prompts are Unicode.
    encoder.add_itxt_chunk(SETTINGS_KEYWORD.into(), settings.to_string())?;
    let mut writer = encoder.write_header()?;
    writer.write_image_data(picture.as_raw())?;
    Ok(writer.finish()?)
}

/// The settings of a picture that jedi wrote: of a `.json` itself, else inside a PNG, else in the `.json` beside it.
pub fn settings_of(path: &Path) -> Result<Value> {
    let name = path.display();
    if !path.is_file() {
        return Err(invalid(format!("{name}: no such file; check the path")));
    }
    let is_json = path.extension().is_some_and(|suffix| suffix.eq_ignore_ascii_case("json"));
    if !is_json && let Some(text) = text_of_png(path)? {
        return serde_json::from_str(&text).with_context(|| format!("{name}: the settings inside are no JSON"));
    }
    let sidecar = path.with_extension("json");
    if !sidecar.is_file() {
        return Err(invalid(format!(
            "{name}: holds no settings of jedi's and there is no {} either; give a picture that `jedi sample` wrote",
            sidecar.display()
        )));
    }
    sidecar_of(path)
}

/// The settings in the `.json` beside a picture.
pub fn sidecar_of(path: &Path) -> Result<Value> {
    let sidecar = path.with_extension("json");
    let bytes = fs::read(&sidecar).with_context(|| sidecar.display().to_string())?;
    serde_json::from_slice(&bytes).with_context(|| format!("{}: is no JSON", sidecar.display()))
}

/// The text under our keyword; None in other files and in PNGs without it.
fn text_of_png(path: &Path) -> Result<Option<String>> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    if !bytes.starts_with(b"\x89PNG") {
        return Ok(None);
    }
    let broken = || format!("{}: is broken or cut off", path.display());
    let mut reader = png::Decoder::new(Cursor::new(bytes)).read_info().with_context(broken)?;
    reader.finish().with_context(broken)?;
    let chunk = reader.info().utf8_text.iter().find(|chunk| chunk.keyword == SETTINGS_KEYWORD);
    chunk.map(|chunk| chunk.get_text().with_context(broken)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn picture() -> RgbImage {
        RgbImage::from_fn(40, 24, |x, y| image::Rgb([(x * 6) as u8, (y * 9) as u8, 77]))
    }

    #[test]
    fn settings_come_back_from_every_format() {
        let folder = tempfile::tempdir().unwrap();
        let settings = json!({"prompt": "ein Bär \"im\" Schnee", "seed": u64::MAX});
        for name in ["a.png", "b.jpg", "c.jpeg", "d.WEBP"] {
            let path = folder.path().join(name);
            let format = Format::of(&path).unwrap().unwrap();
            fs::write(&path, format.bytes(&picture(), &settings).unwrap()).unwrap();
            let found = image::ImageReader::open(&path).unwrap().with_guessed_format().unwrap().decode().unwrap();
            let pairs = found.to_rgb8().into_raw().into_iter().zip(picture().into_raw());
            let worst = pairs.map(|(a, b)| a.abs_diff(b)).max().unwrap();
            assert!(worst <= if format == Format::Jpeg { 12 } else { 0 }, "{name}: {worst}");
            if format != Format::Png {
                let refusal = settings_of(&path).unwrap_err().to_string();
                assert!(refusal.contains("holds no settings"), "{refusal}");
                fs::write(path.with_extension("json"), settings.to_string()).unwrap();
            }
            assert_eq!(settings_of(&path).unwrap(), settings, "{name}");
        }
    }

    #[test]
    fn what_holds_no_settings_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plain.png");
        assert!(settings_of(&path).unwrap_err().to_string().contains("plain.png: no such file"));
        picture().save(&path).unwrap();
        assert!(settings_of(&path).unwrap_err().to_string().contains("plain.png: holds no settings"));
        fs::write(path.with_extension("json"), "{").unwrap();
        assert!(format!("{:#}", settings_of(&path).unwrap_err()).contains("plain.json: is no JSON"));
    }

    #[test]
    fn suffixes_that_cannot_be_written_are_refused_and_folders_are_not() {
        assert!(Format::of(Path::new("cat.tiff")).is_err());
        assert_eq!(Format::of(Path::new("out.v2")).unwrap(), None);
        assert_eq!(Format::of(Path::new("out")).unwrap(), None);
    }
}

//! A picture as a network was trained to see it: resized, cropped, normalised, padded, by the checkpoint's
//! `preprocessor_config.json` (transformers' image processors).

use anyhow::{Context as _, Result, ensure};
use candle_core::{Device, Tensor};
use image::{RgbImage, imageops};
use serde::Deserialize;
use serde_json::Value;

use super::resize::{Filter, resized};
use crate::model::Files;

/// The file that says how.
pub const CONFIG: &str = "preprocessor_config.json";

/// Mean and deviation of ImageNet's colours.
const IMAGENET: [[f32; 3]; 2] = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]];
/// Of the pictures that CLIP was trained on.
const CLIP: [[f32; 3]; 2] = [[0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1]];

/// The size that a picture is brought to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Width and height, whatever its shape.
    Exact(u32, u32),
    /// The shorter side.
    Shortest(u32),
    /// The shorter side, but the longer one at most so many.
    Between(u32, u32),
    /// The longer side.
    Longest(u32),
}

impl Size {
    /// The width and height of a picture of this width and height; casts cut off and rounding is Python's, as there.
    pub fn of(self, (width, height): (u32, u32)) -> (u32, u32) {
        let (short, long) = (f64::from(width.min(height)), f64::from(width.max(height)));
        let upright = |short: u32, long: u32| if width <= height { (short, long) } else { (long, short) };
        match self {
            Self::Exact(width, height) => (width, height),
            Self::Shortest(side) => upright(side, (f64::from(side) * long / short) as u32),
            Self::Between(side, limit) => {
                let is_limited = long / short * f64::from(side) > f64::from(limit);
                let exact = if is_limited { f64::from(limit) * short / long } else { f64::from(side) };
                let side = exact.round_ties_even() as u32;
                if side == width.min(height) {
                    return (width, height);
                }
                upright(side, (exact * long / short) as u32)
            }
            Self::Longest(side) => {
                let scale = f64::from(side) / long;
                ((f64::from(width) * scale + 0.5) as u32, (f64::from(height) * scale + 0.5) as u32)
            }
        }
    }
}

/// How pictures become numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Preparation {
    /// None: as they come.
    pub size: Option<Size>,
    /// When they are resized.
    pub filter: Filter,
    /// The middle of this width and height is cut out; None: all is kept.
    pub crop: Option<(u32, u32)>,
    /// Zeros at the right and below up to this width and height; None: none.
    pub pad: Option<(u32, u32)>,
    /// Subtracted from colours in [0, 1].
    pub mean: [f32; 3],
    /// They are divided by.
    pub deviation: [f32; 3],
}

/// The families of image processors, which differ in what they do where a file says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `GroundingDinoImageProcessor`.
    GroundingDino,
    /// `CLIPImageProcessor`.
    Clip,
    /// `ViTImageProcessor` (DINO).
    Vit,
    /// `BitImageProcessor` (DINOv2).
    Dinov2,
    /// `SamImageProcessor`.
    Sam,
    /// `BlipImageProcessor` (BLIP and BLIP-2).
    Blip,
}

impl Family {
    /// As the published checkpoints were trained, for folders without a file.
    pub fn usual(self) -> Preparation {
        let [mean, deviation] = if matches!(self, Self::Clip | Self::Blip) { CLIP } else { IMAGENET };
        let (size, filter, crop, pad) = match self {
            Self::GroundingDino => (Size::Between(800, 1333), Filter::Bilinear, None, None),
            Self::Clip => (Size::Shortest(224), Filter::Bicubic, Some((224, 224)), None),
            Self::Vit => (Size::Exact(224, 224), Filter::Bilinear, None, None),
            Self::Dinov2 => (Size::Shortest(256), Filter::Bicubic, Some((224, 224)), None),
            Self::Sam => (Size::Longest(1024), Filter::Bilinear, None, Some((1024, 1024))),
            Self::Blip => (Size::Exact(384, 384), Filter::Bicubic, None, None),
        };
        Preparation { size: Some(size), filter, crop, pad, mean, deviation }
    }
}

/// The fields that are read.
#[derive(Deserialize)]
struct File {
    do_resize: Option<bool>,
    size: Option<Value>,
    max_size: Option<u32>,
    resample: Option<Filter>,
    do_center_crop: Option<bool>,
    crop_size: Option<Value>,
    do_normalize: Option<bool>,
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
    do_pad: Option<bool>,
    pad_size: Option<Value>,
}

impl Preparation {
    /// By the model's own file where it has one.
    pub fn read(files: &Files, family: Family) -> Result<Self> {
        if !files.contains(CONFIG) {
            return Ok(family.usual());
        }
        let file: File = files.json(CONFIG)?;
        Self::from_file(file, family).with_context(|| files.describe(CONFIG))
    }

    fn from_file(file: File, family: Family) -> Result<Self> {
        let mut own = family.usual();
        if let Some(size) = &file.size {
            own.size = Some(size_of(size, file.max_size, family)?);
        }
        if file.do_resize == Some(false) {
            own.size = None;
        }
        own.filter = file.resample.unwrap_or(own.filter);
        if let Some(size) = file.crop_size.as_ref().filter(|_| own.crop.is_some() || file.do_center_crop == Some(true))
        {
            own.crop = Some(rectangle(size).context("crop_size")?);
        }
        if file.do_center_crop == Some(false) {
            own.crop = None;
        }
        if let Some(size) = file.pad_size.as_ref().filter(|_| family == Family::Sam) {
            own.pad = Some(rectangle(size).context("pad_size")?);
        }
        if file.do_pad == Some(false) {
            own.pad = None;
        }
        (own.mean, own.deviation) = (file.image_mean.unwrap_or(own.mean), file.image_std.unwrap_or(own.deviation));
        if file.do_normalize == Some(false) {
            (own.mean, own.deviation) = ([0.0; 3], [1.0; 3]);
        }
        ensure!(own.deviation.iter().all(|value| *value > 0.0), "image_std must be above 0");
        Ok(own)
    }

    /// The width and height that a picture of this width and height is resized to, before crop and padding.
    pub fn resized(&self, size: (u32, u32)) -> (u32, u32) {
        self.size.map_or(size, |own| own.of(size))
    }

    /// # Shapes
    /// - → `[1, 3, h, w]`
    ///
    /// # Errors
    /// When nothing is left of the picture, or it does not fit into its padding.
    pub fn tensor(&self, image: &RgbImage, device: &Device) -> Result<Tensor> {
        let (width, height) = self.resized(image.dimensions());
        ensure!(
            width > 0 && height > 0,
            "a picture of {}×{} is too long and thin for this network; crop it",
            image.width(),
            image.height()
        );
        let mut image = resized(image, (width, height), self.filter);
        if let Some((crop_width, crop_height)) = self.crop {
            ensure!(
                crop_width <= width && crop_height <= height,
                "crop_size {crop_width}×{crop_height} is larger than the resized picture, {width}×{height}"
            );
            let (left, top) = ((width - crop_width) / 2, (height - crop_height) / 2);
            image = imageops::crop_imm(&image, left, top, crop_width, crop_height).to_image();
        }
        let (width, height) = image.dimensions();
        let (full_width, full_height) = self.pad.unwrap_or((width, height));
        ensure!(width <= full_width && height <= full_height, "pad_size is smaller than the resized picture");
        let area = full_width as usize * full_height as usize;
        let mut values = vec![0f32; 3 * area];
        for (x, y, pixel) in image.enumerate_pixels() {
            let at = (y * full_width + x) as usize;
            for (channel, &value) in pixel.0.iter().enumerate() {
                let colour = (f64::from(value) / 255.0) as f32;
                values[channel * area + at] = (colour - self.mean[channel]) / self.deviation[channel];
            }
        }
        Ok(Tensor::from_vec(values, (1, 3, full_height as usize, full_width as usize), device)?)
    }
}

/// A number, which old files have, or an object of sides.
fn size_of(value: &Value, max_size: Option<u32>, family: Family) -> Result<Size> {
    let side = |name: &str| value[name].as_u64().map(|side| side as u32);
    if let Some(number) = value.as_u64().map(|number| number as u32) {
        return Ok(match family {
            Family::GroundingDino => Size::Between(number, max_size.unwrap_or(1333)),
            Family::Clip | Family::Dinov2 => Size::Shortest(number),
            Family::Vit | Family::Blip => Size::Exact(number, number),
            Family::Sam => Size::Longest(number),
        });
    }
    match (side("shortest_edge"), side("longest_edge").or(max_size)) {
        (Some(shortest), Some(longest)) => Ok(Size::Between(shortest, longest)),
        (Some(shortest), None) => Ok(Size::Shortest(shortest)),
        (None, Some(longest)) => Ok(Size::Longest(longest)),
        (None, None) => rectangle(value).map(|(width, height)| Size::Exact(width, height)).context("size"),
    }
}

fn rectangle(value: &Value) -> Result<(u32, u32)> {
    let side = |name: &str| value.as_u64().or_else(|| value[name].as_u64());
    match (side("width"), side("height")) {
        (Some(width), Some(height)) if width > 0 && height > 0 => Ok((width as u32, height as u32)),
        _ => anyhow::bail!("{value} is neither a number nor has height and width"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, family: Family) -> Preparation {
        Preparation::from_file(serde_json::from_str(text).unwrap(), family).unwrap()
    }

    #[test]
    fn old_and_new_spellings_mean_the_same() {
        for (family, text) in [
            (Family::GroundingDino, r#"{"size": 800, "max_size": 1333}"#),
            (Family::GroundingDino, r#"{"size": {"shortest_edge": 800, "longest_edge": 1333}}"#),
            (Family::Clip, r#"{"size": 224, "crop_size": 224, "do_center_crop": true}"#),
            (Family::Clip, r#"{"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}"#),
            (Family::Vit, r#"{"size": 224, "resample": 2}"#),
            (Family::Vit, r#"{"size": {"height": 224, "width": 224}}"#),
            (Family::Sam, r#"{"size": {"longest_edge": 1024}, "pad_size": {"height": 1024, "width": 1024}}"#),
        ] {
            assert_eq!(read(text, family), family.usual(), "{text}");
        }
    }

    #[test]
    fn what_is_switched_off_is_not_done() {
        let none = read(r#"{"do_resize": false, "do_center_crop": false, "do_normalize": false}"#, Family::Clip);
        assert_eq!((none.size, none.crop, none.mean, none.deviation), (None, None, [0.0; 3], [1.0; 3]));
        assert!(
            serde_json::from_str::<File>(r#"{"resample": 1}"#).is_err_and(|e| e.to_string().contains("resample 1"))
        );
    }

    #[test]
    fn a_strip_of_which_nothing_is_left_is_refused() {
        let error = Family::Sam.usual().tensor(&RgbImage::new(5000, 1), &Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("too long and thin"), "{error}");
    }
}

//! Pictures to vectors of unit length, whose products tell how alike they are: CLIP's, DINO's or DINOv2's, by the folder.

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, Tensor};
use image::{GrayImage, Rgb, RgbImage, imageops};
use serde::Deserialize;

use super::prepare::{Family, Preparation};
use crate::device::Runtime;
use crate::invalid::invalid;
use crate::model::Files;
use crate::model::clip_image::ClipImageEncoder;
use crate::model::dino::{DinoEncoder, DinoKind};

/// Pictures that go through the network together.
const BATCH: usize = 16;

/// The network with its preparation of pictures.
pub struct ImageEmbedder {
    network: Network,
    preparation: Preparation,
    device: Device,
}

enum Network {
    Clip(ClipImageEncoder),
    Dino(DinoEncoder),
}

/// What tells the networks apart.
#[derive(Deserialize)]
struct Config {
    model_type: String,
}

impl ImageEmbedder {
    /// Reads a folder of transformers' `CLIPModel`, `CLIPVisionModelWithProjection`, `ViTModel` (DINO) or `Dinov2Model`.
    ///
    /// # Errors
    /// When the folder is of another kind (`Invalid`), or a file is missing or broken.
    pub fn load(files: &Files, runtime: &Runtime) -> Result<Self> {
        let config: Config = files.json("config.json")?;
        let (network, family) = match config.model_type.as_str() {
            "clip" | "clip_vision_model" => (Network::Clip(ClipImageEncoder::load(files, runtime)?), Family::Clip),
            "vit" | "dinov2" => {
                let network = DinoEncoder::load(files, runtime)?;
                let family = if network.kind() == DinoKind::Vit { Family::Vit } else { Family::Dinov2 };
                (Network::Dino(network), family)
            }
            other => {
                let name = files.describe("config.json");
                return Err(invalid(format!(
                    "{name}: model_type is {other:?}; give a CLIP, DINO or DINOv2 model of pictures"
                )));
            }
        };
        Ok(Self { network, preparation: Preparation::read(files, family)?, device: runtime.device.clone() })
    }

    /// A picture as the network sees it, `[1, 3, h, w]`.
    pub fn pixels(&self, picture: &RgbImage) -> Result<Tensor> {
        self.preparation.tensor(picture, &self.device)
    }

    /// A vector of unit length a picture.
    pub fn vectors(&self, pictures: &[RgbImage]) -> Result<Vec<Vec<f32>>> {
        let mut vectors = Vec::new();
        for pictures in pictures.chunks(BATCH) {
            let pixels: Vec<Tensor> = pictures.iter().map(|picture| self.pixels(picture)).collect::<Result<_>>()?;
            let mut rest = &pixels[..];
            // Where no size is set, only pictures of one size go together.
            while let Some(first) = rest.first() {
                let n_alike = rest.iter().take_while(|pixels| pixels.dims() == first.dims()).count();
                vectors.extend(self.of_pixels(&Tensor::cat(&rest[..n_alike], 0)?)?);
                rest = &rest[n_alike..];
            }
        }
        Ok(vectors)
    }

    /// # Shapes
    /// - pixels `[b, 3, h, w]`, prepared → b vectors
    fn of_pixels(&self, pixels: &Tensor) -> Result<Vec<Vec<f32>>> {
        let vectors = match &self.network {
            Network::Clip(network) => network.forward(pixels).context("CLIP")?,
            Network::Dino(network) => network.forward(pixels).context("DINO")?,
        };
        let mut vectors: Vec<Vec<f32>> = vectors.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec2()?;
        for vector in &mut vectors {
            let length = vector.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            anyhow::ensure!(
                length.is_finite() && length > 0.0,
                "the vector of a picture has no length; try --dtype f32"
            );
            vector.iter_mut().for_each(|v| *v = (f64::from(*v) / length) as f32);
        }
        Ok(vectors)
    }
}

/// A thing alone in the middle of a square: what is not in its mask, and what a square adds, is of one grey, so that crops
/// cut nothing off and grounds do not count.
pub fn on_grey_square(image: &RgbImage, mask: &GrayImage) -> RgbImage {
    const GREY: Rgb<u8> = Rgb([124, 117, 104]); // CLIP's mean colour: nothing, to the network
    let (width, height) = image.dimensions();
    let side = width.max(height);
    let mut square = RgbImage::from_pixel(side, side, GREY);
    let alone = RgbImage::from_fn(width, height, |x, y| {
        // A mask in between mixes, so that edges stay smooth.
        let share = u32::from(mask.get_pixel(x, y).0[0]);
        let mixed = |c: usize| {
            (u32::from(image.get_pixel(x, y).0[c]) * share + u32::from(GREY.0[c]) * (255 - share) + 127) / 255
        };
        Rgb([0, 1, 2].map(|c| mixed(c) as u8))
    });
    imageops::replace(&mut square, &alone, ((side - width) / 2).into(), ((side - height) / 2).into());
    square
}

/// How alike two vectors of unit length are, −1 to 1.
pub fn similarity(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thing_stands_alone_in_the_middle() {
        let image = RgbImage::from_pixel(4, 2, Rgb([200, 0, 0]));
        let mask = GrayImage::from_fn(4, 2, |x, _| image::Luma([if x < 2 { 255 } else { 0 }]));
        let square = on_grey_square(&image, &mask);
        assert_eq!(square.dimensions(), (4, 4));
        let red = |x: u32, y: u32| square.get_pixel(x, y).0 == [200, 0, 0];
        assert!(red(0, 1) && red(1, 2) && !red(2, 1) && !red(0, 0) && !red(1, 3));
        assert_eq!(square.get_pixel(3, 3), square.get_pixel(3, 1));
    }

    #[test]
    fn similarity_is_the_cosine() {
        assert!((similarity(&[0.6, 0.8], &[0.8, -0.6])).abs() < 1e-7);
        assert!((similarity(&[0.6, 0.8], &[0.6, 0.8]) - 1.0).abs() < 1e-6);
    }
}

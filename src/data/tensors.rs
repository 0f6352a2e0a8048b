//! Pictures to the network's numbers and back: 0…255 is [−1, 1].

use candle_core::{DType, Device, Result, Tensor, bail};
use image::RgbImage;

/// f32 tensor of pictures of one size.
///
/// # Shapes
/// `images`: b pictures of h × w; returns `[b, 3, h, w]` in [−1, 1].
pub fn tensor_from_images(images: &[RgbImage], device: &Device) -> Result<Tensor> {
    let Some(first) = images.first() else { bail!("no pictures to make a tensor of") };
    let (width, height) = first.dimensions();
    let area = width as usize * height as usize;
    let mut values = vec![0f32; images.len() * 3 * area];
    for (image, planes) in images.iter().zip(values.chunks_exact_mut(3 * area)) {
        if image.dimensions() != (width, height) {
            let (other_width, other_height) = image.dimensions();
            bail!("pictures of {width}×{height} and {other_width}×{other_height} do not fit in one tensor");
        }
        // Channel by channel: of this loop the compiler makes vectors, of one over pixels it does not.
        for (channel, plane) in planes.chunks_exact_mut(area).enumerate() {
            for (value, pixel) in plane.iter_mut().zip(image.as_raw().chunks_exact(3)) {
                *value = f32::from(pixel[channel]) / 127.5 - 1.0;
            }
        }
    }
    Tensor::from_vec(values, (images.len(), 3, height as usize, width as usize), device) // [b, 3, h, w]
}

/// Pictures of a tensor of any float type and device, rounded; values beyond [−1, 1] are cut, NaN and infinity refused.
///
/// # Shapes
/// `tensor`: `[b, 3, h, w]`; returns b pictures of h × w.
pub fn images_from_tensor(tensor: &Tensor) -> Result<Vec<RgbImage>> {
    let (n_images, channels, height, width) = tensor.dims4()?;
    if channels != 3 {
        bail!("a picture has 3 channels, not {channels}");
    }
    let area = height * width;
    let values = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        bail!("the picture holds {value}: the network or the decoder overflowed; try --dtype f32");
    }
    let image = |idx: usize| {
        let planes = &values[idx * 3 * area..][..3 * area];
        RgbImage::from_fn(width as u32, height as u32, |x, y| {
            let at = y as usize * width + x as usize;
            // A float cast to u8 saturates.
            image::Rgb([0, 1, 2].map(|channel| ((planes[channel * area + at] + 1.0) * 127.5).round() as u8))
        })
    };
    Ok((0..n_images).map(image).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn all_256_values_survive_the_round_trip() {
        let mut rng = Rng::new(4, "tensors test", 0);
        let images: Vec<RgbImage> = (0..3)
            .map(|_| RgbImage::from_fn(17, 16, |x, y| image::Rgb([(y * 17 + x) as u8, rng.below(256) as u8, x as u8])))
            .collect();
        let tensor = tensor_from_images(&images, &Device::Cpu).unwrap();
        assert_eq!(tensor.dims(), [3, 3, 16, 17]);
        assert_eq!(images_from_tensor(&tensor).unwrap(), images);
    }

    #[test]
    fn channels_rows_and_columns_lie_where_the_network_expects_them() {
        let mut image = RgbImage::new(3, 2);
        image.put_pixel(2, 1, image::Rgb([255, 0, 51]));
        let tensor = tensor_from_images(&[image], &Device::Cpu).unwrap();
        let pixel: Vec<f32> =
            (0..3).map(|c| tensor.get(0).unwrap().get(c).unwrap().to_vec2::<f32>().unwrap()[1][2]).collect();
        assert_eq!(pixel, [1.0, -1.0, 51.0 / 127.5 - 1.0]);
    }

    #[test]
    fn values_beyond_the_range_are_cut_and_nan_is_refused() {
        let tensor = Tensor::new(&[-3f32, 0.0, 1.4], &Device::Cpu).unwrap().reshape((1, 3, 1, 1)).unwrap();
        assert_eq!(images_from_tensor(&tensor).unwrap()[0].get_pixel(0, 0).0, [0, 128, 255]);
        let broken = (tensor * f64::NAN).unwrap();
        assert!(images_from_tensor(&broken).unwrap_err().to_string().contains("overflowed"));
    }

    #[test]
    fn sizes_must_agree() {
        let error = tensor_from_images(&[RgbImage::new(2, 2), RgbImage::new(3, 2)], &Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("2×2 and 3×2"));
    }
}

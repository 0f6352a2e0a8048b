//! Convolution, channel-last: by cuDNN (`cudnn`) where the build has it and it takes the shape, else by cuBLAS's matrix products
//! over rows of patches (`conv.cu`).
//!
//! Patches are k²/stride² times the picture, so only so many of them are there at a time: products go by bands of images or,
//! of large ones, of rows. The backward pass unfolds the input again for the weight's gradient, and folds the product of dy
//! and the weight back for the input's.

use std::ops::Range;

use candle_core::{DType, Result, Tensor};

#[cfg(feature = "cudnn")]
use super::cudnn::convolve as by_cudnn;
use super::launch::{Argument, Fresh, Launch, format_of, run};
use super::linear::{bias_gradient, few, product, with_bias};
use crate::ops::conv::Geometry;
use crate::ops::graft::{graft_storage, graft_tensor};
use crate::ops::parallel::pieces;

/// Bytes of patches that are there at a time, but for the rows around a band that the input's gradient needs too.
const PATCH_BYTES: usize = 256 << 20;

/// [`crate::ops::conv2d`], differentiable in x, weight and bias. None: no kernel for these.
pub fn conv2d([x, weight]: [&Tensor; 2], bias: Option<&Tensor>, geometry: Geometry) -> Result<Option<Tensor>> {
    in_bands([x, weight], bias, geometry, PATCH_BYTES)
}

/// The same with so many bytes of patches at a time.
pub fn in_bands(
    [x, weight]: [&Tensor; 2],
    bias: Option<&Tensor>,
    geometry: Geometry,
    patch_bytes: usize,
) -> Result<Option<Tensor>> {
    let Some(format) = format_of(x) else { return Ok(None) };
    let are_alike = [Some(weight), bias].into_iter().flatten().all(|own| own.dtype() == x.dtype());
    if !are_alike || x.elem_count() == 0 {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let call = Call { geometry, format, patch_bytes };
    let product = call.forward(&x.detach(), &weight.detach())?;
    let biased = bias.map(|bias| with_bias(&product, bias, format)).transpose()?;
    let backward = move |inputs: &[&Tensor], _: &Tensor, gradient: &Tensor| {
        let [x, weight] = [inputs[0], inputs[1]];
        let dy = gradient.detach().contiguous()?;
        let dx = x.track_op().then(|| call.input_gradient(&dy, weight)).transpose()?;
        let dw = weight.track_op().then(|| call.weight_gradient(&dy, &x.detach())).transpose()?;
        let mut gradients = vec![dx, dw];
        if let Some(bias) = inputs.get(2) {
            gradients.push(bias.track_op().then(|| bias_gradient(&dy)).transpose()?);
        }
        Ok(gradients)
    };
    match (bias, biased) {
        (Some(bias), Some(y)) => graft_storage("conv2d", &[&x, weight, bias], y.storage, y.shape, backward),
        _ => graft_tensor("conv2d", &[&x, weight], &product, backward),
    }
    .map(Some)
}

/// What of a convolution is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// From x `[b, h, w, c]` and the weight `[out, k·k·c]`: y `[b, h', w', out]`.
    Forward,
    /// From dy and the weight: dx.
    InputGradient,
    /// From dy and x: the weight's gradient, `[out, k·k·c]`.
    WeightGradient,
}

/// In builds without cuDNN it takes nothing.
#[cfg(not(feature = "cudnn"))]
fn by_cudnn(_: Pass, _: [&Tensor; 2], _: Geometry) -> Result<Option<Tensor>> {
    Ok(None)
}

struct Call {
    geometry: Geometry,
    format: &'static str,
    patch_bytes: usize,
}

/// Some images with all of their rows, or some rows of one image.
struct Band {
    images: Range<usize>,
    rows: Range<usize>,
}

impl Call {
    /// Output `[b, h', w', out]`, without bias.
    fn forward(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let Geometry { images, output: (h_out, w_out), channels: (_, out), .. } = self.geometry;
        let packed = self.packed(weight)?; // [out, k·k·c]
        if let Some(y) = by_cudnn(Pass::Forward, [x, &packed], self.geometry)? {
            return Ok(y);
        }
        let packed = packed.t()?;
        let of_band = |band: Band| product(&self.patches(x, &band)?, &packed);
        let bands = self.bands(h_out, w_out * self.geometry.patch().max(out), x.dtype());
        joined(bands.into_iter().map(of_band))?.reshape((images, h_out, w_out, out))
    }

    /// dx, from rows of patches that are folded back; each band of input rows by the output rows that touch it.
    fn input_gradient(&self, dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let Geometry { images, input: (h, w), output: (h_out, w_out), channels: (c, out), kernel, conv } =
            self.geometry;
        let packed = self.packed(weight)?; // [out, k·k·c]
        if let Some(dx) = by_cudnn(Pass::InputGradient, [dy, &packed], self.geometry)? {
            return Ok(dx);
        }
        let of_band = |band: Band| {
            let first = (band.rows.start + conv.pad[0] + 1).saturating_sub(kernel).div_ceil(conv.stride);
            let last = (band.rows.end - 1 + conv.pad[0]) / conv.stride;
            // At least one, where none touches the rows at the lower edge that a stride leaves over.
            let first = first.min(h_out - 1);
            let touching = first..(last + 1).min(h_out).max(first + 1);
            let dy = dy.narrow(0, band.images.start, band.images.len())?.narrow(1, touching.start, touching.len())?;
            let patches = product(&dy.contiguous()?.reshape(((), out))?, &packed)?; // [positions, k·k·c]
            self.folded(&patches, &band, touching)
        };
        // Of the output rows an input row has the share that it has in the whole picture.
        let width = (w_out * self.geometry.patch()).max(w * c).max(w_out * out);
        let bands = self.bands(h, width * h_out.div_ceil(h), dy.dtype());
        joined(bands.into_iter().map(of_band))?.reshape((images, h, w, c))
    }

    fn weight_gradient(&self, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
        let Geometry { channels: (c, out), kernel, .. } = self.geometry;
        let packed = match by_cudnn(Pass::WeightGradient, [dy, x], self.geometry)? {
            Some(packed) => packed,
            None => self.packed_weight_gradient(dy, x)?,
        };
        let mut dw = Fresh::new(x.device(), (out, c, kernel, kernel), x.dtype())?;
        self.turn("unpack", &packed, &mut dw)?;
        Ok(dw.tensor())
    }

    /// dw `[out, k·k·c]`, summed over bands in f32.
    fn packed_weight_gradient(&self, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
        let Geometry { output: (h_out, w_out), channels: (_, out), .. } = self.geometry;
        let bands = self.bands(h_out, w_out * self.geometry.patch().max(out), x.dtype());
        let is_one = bands.len() == 1;
        let mut sum: Option<Tensor> = None;
        for band in bands {
            let dy = dy.narrow(0, band.images.start, band.images.len())?.narrow(1, band.rows.start, band.rows.len())?;
            let dy = dy.reshape(((), out))?; // [positions, out]
            let own = product(&dy.t()?, &self.patches(x, &band)?)?; // [out, k·k·c]
            let own = if is_one { own } else { own.to_dtype(DType::F32)? };
            sum = Some(match sum {
                Some(sum) => (sum + own)?,
                None => own,
            });
        }
        sum.expect("a picture has positions").to_dtype(x.dtype())
    }

    /// Bands of pictures `h` high for which, at `width` values a row, the bound holds; at least of one row.
    fn bands(&self, h: usize, width: usize, dtype: DType) -> Vec<Band> {
        let rows = (self.patch_bytes / (width * dtype.size_in_bytes())).max(1);
        let (images, count) = (rows / h, self.geometry.images);
        if images > 0 {
            return pieces(0..count, images).map(|images| Band { images, rows: 0..h }).collect();
        }
        let of_image = |image: usize| pieces(0..h, rows).map(move |rows| Band { images: image..image + 1, rows });
        (0..count).flat_map(of_image).collect()
    }

    /// Rows of patches of a band of output rows, `[positions, k·k·c]`.
    fn patches(&self, x: &Tensor, band: &Band) -> Result<Tensor> {
        let Geometry { input: (h, w), output: (_, w_out), channels: (c, _), kernel, conv, .. } = self.geometry;
        let x = x.narrow(0, band.images.start, band.images.len())?;
        let (few, format) = few(self.format, &[&x], c);
        let positions = band.images.len() * band.rows.len() * w_out;
        let mut patches = Fresh::new(x.device(), (positions, self.geometry.patch()), x.dtype())?;
        let n = positions * self.geometry.patch() / few;
        let [top, _, left, _] = conv.pad;
        let numbers = [n, h, w, c / few, w_out, band.rows.start, band.rows.len(), kernel, conv.stride, top, left];
        let tensors = [Argument::Read(&x), Argument::Fill(&mut patches)];
        let arguments = tensors.into_iter().chain(numbers.map(Argument::Int));
        run(x.device(), &launch("unfold", &format, n), &mut arguments.collect::<Vec<_>>())?;
        Ok(patches.tensor())
    }

    /// A band of the input's gradient `[pixels, c]` from the patches of the output rows `touching`.
    fn folded(&self, patches: &Tensor, band: &Band, touching: Range<usize>) -> Result<Tensor> {
        let Geometry { input: (_, w), output: (h_out, w_out), channels: (c, _), kernel, conv, .. } = self.geometry;
        let (few, format) = few(self.format, &[patches], c);
        let pixels = band.images.len() * band.rows.len() * w;
        let mut dx = Fresh::new(patches.device(), (pixels, c), patches.dtype())?;
        let n = pixels * c / few;
        let [top, _, left, _] = conv.pad;
        let places = [n, band.rows.start, band.rows.len(), w, c / few, touching.start, touching.len(), h_out, w_out];
        let numbers = places.into_iter().chain([kernel, conv.stride, top, left]);
        let tensors = [Argument::Read(patches), Argument::Fill(&mut dx)];
        let arguments = tensors.into_iter().chain(numbers.map(Argument::Int));
        run(patches.device(), &launch("fold", &format, n), &mut arguments.collect::<Vec<_>>())?;
        Ok(dx.tensor())
    }

    /// The weight `[out, c, k, k]` as `[out, k·k·c]`, rows in the order of a patch.
    fn packed(&self, weight: &Tensor) -> Result<Tensor> {
        let weight = weight.contiguous()?;
        let shape = (self.geometry.channels.1, self.geometry.patch());
        let mut packed = Fresh::new(weight.device(), shape, weight.dtype())?;
        self.turn("pack", &weight, &mut packed)?;
        Ok(packed.tensor())
    }

    fn turn(&self, pass: &str, from: &Tensor, to: &mut Fresh) -> Result<()> {
        let (c, out) = self.geometry.channels;
        let numbers = [out * c, c, self.geometry.kernel * self.geometry.kernel].map(Argument::Int);
        let arguments = [Argument::Read(from), Argument::Fill(to)].into_iter().chain(numbers);
        run(from.device(), &launch(pass, self.format, out * c), &mut arguments.collect::<Vec<_>>())
    }
}

fn launch(pass: &str, format: &str, n: usize) -> Launch {
    Launch::of_values("conv", format!("conv_{pass}_{format}"), n)
}

/// Rows of bands, one below the other.
fn joined(bands: impl Iterator<Item = Result<Tensor>>) -> Result<Tensor> {
    let bands = bands.collect::<Result<Vec<_>>>()?;
    Tensor::cat(&bands, 0)
}

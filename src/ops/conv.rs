//! Two-dimensional convolution, channel-last: for many weights at few positions (`winograd::few_tiles`, `conv_wide`), on the
//! tile unit (`tiles::conv`) or by Winograd (`winograd`) where these suit, else here as matrix products over tiles of unfolded
//! rows (im2col).
//!
//! A tile of output positions is unfolded into `[positions, k·k·c]` in a buffer that stays in the cache and multiplied
//! with the weight repacked as `[k·k·c, out]`; no unfolded picture is ever kept. The input's gradient at stride 1 is
//! the same convolution of the flipped weight; at other strides tiles are folded back (col2im).

use candle_core::{Result, Tensor, bail};

use super::any_batch::pictures_to_choose_by;
use super::buffer::unwritten;
use super::graft::{for_float, graft, on_cpu, tensor, with_values};
use super::linear::{column_sums, linear_packed, sum_of};
use super::packed::Packed;
use super::parallel;
use super::product::{Matrix, Start, matmul};
use super::real::Real;
use super::winograd::{self, Pass, few_tiles};
use super::{conv_wide, cuda, tiles};

/// Stride and zero padding of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conv2d {
    /// Pixels from one output to the next.
    pub stride: usize,
    /// Zeros at the top, bottom, left and right.
    pub pad: [usize; 4],
}

impl Conv2d {
    /// Stride 1 and the padding that keeps the size for an odd kernel.
    pub fn same(kernel: usize) -> Self {
        Self { stride: 1, pad: [kernel / 2; 4] }
    }
}

/// Cross-correlation, as PyTorch's `conv2d`.
///
/// # Shapes
/// - x `[b, h, w, c]`, weight `[out, c, k, k]`, bias `[out]` → `[b, h', w', out]`
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, conv: Conv2d) -> Result<Tensor> {
    conv2d_packed(x, weight, bias, conv, None)
}

/// The same with the weight packed once.
pub fn conv2d_packed(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    conv: Conv2d,
    packed: Option<&Packed>,
) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let (out, c_weight, k, k_w) = weight.dims4()?;
    let [top, bottom, left, right] = conv.pad;
    if c_weight != c || k != k_w || h + top + bottom < k || w + left + right < k {
        bail!("conv2d: weight {:?} does not fit a batch {:?} with {conv:?}", weight.dims(), x.dims());
    }
    if k == 1 && conv == Conv2d::same(1) {
        return linear_packed(x, weight, bias, packed);
    }
    let geometry = Geometry {
        images: b,
        input: (h, w),
        output: ((h + top + bottom - k) / conv.stride + 1, (w + left + right - k) / conv.stride + 1),
        channels: (c, out),
        kernel: k,
        conv,
    };
    if !on_cpu(x) {
        return match cuda::conv2d([x, weight], bias, geometry)? {
            Some(y) => Ok(y),
            None => on_device(x, weight, bias, conv),
        };
    }
    let x = x.contiguous()?;
    let keep = packed.map(|packed| (packed, weight));
    let shape = (b, geometry.output.0, geometry.output.1, out);
    for_float!(x, T => {
        let values = with_values::<T, _>(&x, |x| with_values::<T, _>(weight, |w| match bias {
            Some(bias) => with_values::<T, _>(bias, |bias| forward(x, w, Some(bias), geometry, keep)),
            None => Ok(forward(x, w, None, geometry, keep)),
        }))???;
        let backward = move |inputs: &[&Tensor], _: &Tensor, gradient: &Tensor| backward::<T>(inputs, gradient, geometry);
        match bias {
            Some(bias) => graft("conv2d", &[&x, weight, bias], (values, shape), backward),
            None => graft("conv2d", &[&x, weight], (values, shape), backward),
        }
    })
}

/// Everything that a kernel must know of a convolution.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    pub images: usize,
    /// Height, width.
    pub input: (usize, usize),
    pub output: (usize, usize),
    /// In, out.
    pub channels: (usize, usize),
    pub kernel: usize,
    pub conv: Conv2d,
}

impl Geometry {
    /// Width of an unfolded row, k·k·c.
    pub fn patch(self) -> usize {
        self.kernel * self.kernel * self.channels.0
    }

    /// Output positions over the whole batch.
    pub fn positions(self) -> usize {
        self.images * self.output.0 * self.output.1
    }

    /// The same for the choice of a kernel.
    pub fn to_choose_by(self) -> Self {
        Self { images: pictures_to_choose_by(self.images), ..self }
    }

    /// Whether the weight does not stay in the caches.
    pub fn is_wide(self) -> bool {
        self.channels.0 * self.channels.1 > 200_000
    }

    /// The convolution of dy with the flipped kernel that gives the input's gradient; None at other strides than 1.
    pub fn flipped(self) -> Option<Self> {
        let k = self.kernel;
        let [top, _, left, _] = self.conv.pad;
        (self.conv.stride == 1 && top < k && left < k).then(|| Self {
            images: self.images,
            input: self.output,
            output: self.input,
            channels: (self.channels.1, self.channels.0),
            kernel: k,
            // The bottom and right padding follow from the sizes.
            conv: Conv2d { stride: 1, pad: [k - 1 - top, 0, k - 1 - left, 0] },
        })
    }

    /// Positions in a tile: about 512 kB of unfolded f32 rows, for the second-level cache.
    fn tile(self) -> usize {
        (131_072 / self.patch()).clamp(32, 512)
    }

    /// Calls `f(tap, input pixel)` for the taps of output position `position` that fall inside the picture.
    #[inline(always)]
    pub fn for_taps(self, position: usize, mut f: impl FnMut(usize, Option<usize>)) {
        let (h_out, w_out) = self.output;
        let (h, w) = self.input;
        let (image, rest) = (position / (h_out * w_out), position % (h_out * w_out));
        let top = (rest / w_out * self.conv.stride) as isize - self.conv.pad[0] as isize;
        let left = (rest % w_out * self.conv.stride) as isize - self.conv.pad[2] as isize;
        for tap in 0..self.kernel * self.kernel {
            let y = top + (tap / self.kernel) as isize;
            let x = left + (tap % self.kernel) as isize;
            let inside = y >= 0 && x >= 0 && (y as usize) < h && (x as usize) < w;
            f(tap, inside.then(|| (image * h + y as usize) * w + x as usize));
        }
    }
}

/// Calls `f(index in [out, c, k·k], index in [k·k·c, out])` for every weight, in blocks of input channels whose rows on the
/// far side stay in the first-level cache.
fn for_weights(geometry: Geometry, f: impl Fn(usize, usize) + Sync + Send) {
    const BLOCK: usize = 16;
    let (c, out) = geometry.channels;
    let taps = geometry.kernel * geometry.kernel;
    parallel::map(c.div_ceil(BLOCK), 1, |blocks| {
        for block in blocks {
            let channels = block * BLOCK..c.min((block + 1) * BLOCK);
            for o in 0..out {
                for ci in channels.clone() {
                    for tap in 0..taps {
                        f((o * c + ci) * taps + tap, (tap * c + ci) * out + o);
                    }
                }
            }
        }
    });
}

/// The weight `[out, c, k, k]` as `[k·k·c, out]`, rows in the order of an unfolded patch.
fn packed<T: Real>(weight: &[T], geometry: Geometry) -> Vec<T> {
    let mut pack = unwritten(weight.len());
    let pack_at = parallel::Disjoint::new(&mut pack);
    // SAFETY: `for_weights` gives every index on each side once.
    for_weights(geometry, |from, to| unsafe { *pack_at.at(to) = weight[from] });
    pack
}

/// The weight flipped in both directions with its channels exchanged, `[k·k·out, c]`: the packed weight of the
/// convolution that gives the input's gradient.
fn packed_flipped<T: Real>(weight: &[T], geometry: Geometry) -> Vec<T> {
    let (c, out) = geometry.channels;
    let taps = geometry.kernel * geometry.kernel;
    let mut pack = unwritten(weight.len());
    let pack_at = parallel::Disjoint::new(&mut pack);
    parallel::map(out, 8, |outputs| {
        for o in outputs {
            let weight = &weight[o * c * taps..][..c * taps];
            for tap in 0..taps {
                for ci in 0..c {
                    // SAFETY: each output channel, and so each element, belongs to one thread.
                    unsafe { *pack_at.at(((taps - 1 - tap) * out + o) * c + ci) = weight[ci * taps + tap] }
                }
            }
        }
    });
    pack
}

/// Fills `tile` with the unfolded rows of the positions from `first` on.
fn unfold<T: Real>(x: &[T], geometry: Geometry, first: usize, tile: &mut [T]) {
    let c = geometry.channels.0;
    for (row, patch) in tile.chunks_exact_mut(geometry.patch()).enumerate() {
        geometry.for_taps(first + row, |tap, pixel| {
            let target = &mut patch[tap * c..][..c];
            match pixel {
                Some(pixel) => target.copy_from_slice(&x[pixel * c..][..c]),
                None => target.fill(T::ZERO),
            }
        });
    }
}

fn forward<T: Real>(
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    geometry: Geometry,
    keep: Option<(&Packed, &Tensor)>,
) -> Vec<T> {
    if few_tiles::suits::<T>(geometry) {
        return few_tiles::multiply(x, weight, bias, geometry, Pass::Forward);
    }
    if conv_wide::suits(geometry) {
        return conv_wide::forward(x, weight, bias, geometry);
    }
    if let Some(y) = tiles::conv::forward(x, weight, bias, geometry) {
        return y;
    }
    if winograd::suits(geometry) {
        return winograd::forward(x, weight, bias, geometry, keep);
    }
    direct(x, &packed(weight, geometry), bias, geometry)
}

fn direct<T: Real>(x: &[T], pack: &[T], bias: Option<&[T]>, geometry: Geometry) -> Vec<T> {
    let (patch, out) = (geometry.patch(), geometry.channels.1);
    let mut y = unwritten(geometry.positions() * out);
    let tile_rows = geometry.tile();
    parallel::for_rows(&mut y, out, 32, |range, y| {
        let mut tile = unwritten(tile_rows * patch);
        for (step, y) in y.chunks_mut(tile_rows * out).enumerate() {
            let rows = y.len() / out;
            let tile = &mut tile[..rows * patch];
            unfold(x, geometry, range.start + step * tile_rows, tile);
            let (a, b) = (Matrix::rows(tile, patch), Matrix::rows(pack, out));
            // SAFETY: tile is rows·patch, pack patch·out, y rows·out, each a slice of its own.
            unsafe { matmul((rows, out, patch), a, b, (Matrix::rows_mut(y, out), Start::row(bias))) }
        }
    });
    y
}

fn backward<T: Real>(inputs: &[&Tensor], gradient: &Tensor, geometry: Geometry) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (inputs[0], inputs[1]);
    with_values::<T, _>(gradient, |dy| {
        let dx = if x.track_op() {
            Some(tensor(with_values::<T, _>(weight, |w| input_gradient(dy, w, geometry))?, x.shape()))
        } else {
            None
        };
        let dw = if weight.track_op() {
            Some(tensor(with_values::<T, _>(x, |x| weight_gradient(dy, x, geometry))?, weight.shape()))
        } else {
            None
        };
        let mut gradients = vec![dx, dw];
        if let Some(bias) = inputs.get(2) {
            gradients.push(bias.track_op().then(|| tensor(column_sums(dy, geometry.channels.1), bias.shape())));
        }
        Ok(gradients)
    })?
}

fn input_gradient<T: Real>(dy: &[T], weight: &[T], geometry: Geometry) -> Vec<T> {
    let flipped = geometry.flipped();
    if let Some(flipped) = flipped.filter(|flipped| few_tiles::suits::<T>(*flipped)) {
        return few_tiles::multiply(dy, weight, None, flipped, Pass::InputGradient);
    }
    if conv_wide::suits(geometry) {
        return conv_wide::input_gradient(dy, weight, geometry);
    }
    if let Some(dx) = flipped.and_then(|flipped| tiles::conv::input_gradient(dy, weight, flipped)) {
        return dx;
    }
    if let Some(flipped) = flipped.filter(|flipped| winograd::suits(*flipped)) {
        return winograd::input_gradient(dy, weight, flipped);
    }
    match flipped {
        Some(flipped) => direct(dy, &packed_flipped(weight, geometry), None, flipped),
        None => folded(dy, weight, geometry),
    }
}

/// The gradient of the input by unfolded rows that are folded back.
fn folded<T: Real>(dy: &[T], weight: &[T], geometry: Geometry) -> Vec<T> {
    let (c, out) = geometry.channels;
    let pack = packed(weight, geometry);
    let patch = geometry.patch();
    let (pixels_in, pixels_out) = (geometry.input.0 * geometry.input.1, geometry.output.0 * geometry.output.1);
    let mut dx = vec![T::ZERO; geometry.images * pixels_in * c];
    parallel::for_rows(&mut dx, pixels_in * c, 1, |images, dx| {
        let first_pixel = images.start * pixels_in;
        let tile_rows = geometry.tile();
        let mut tile = unwritten(tile_rows * patch);
        let mut first = images.start * pixels_out;
        let last = images.end * pixels_out;
        while first < last {
            let rows = tile_rows.min(last - first);
            let (a, b) = (Matrix::rows(&dy[first * out..], out), Matrix::rows(&pack, out).transposed());
            let target = (Matrix::rows_mut(&mut tile, patch), Start::Zero);
            // SAFETY: dy has rows·out values from `first` on, pack patch·out, tile at least rows·patch.
            unsafe { matmul((rows, patch, out), a, b, target) }
            for (row, patch) in tile.chunks_exact(patch).take(rows).enumerate() {
                geometry.for_taps(first + row, |tap, pixel| {
                    let Some(pixel) = pixel else { return };
                    let target = &mut dx[(pixel - first_pixel) * c..][..c];
                    target.iter_mut().zip(&patch[tap * c..][..c]).for_each(|(sum, v)| *sum += *v);
                });
            }
            first += rows;
        }
    });
    dx
}

fn weight_gradient<T: Real>(dy: &[T], x: &[T], geometry: Geometry) -> Vec<T> {
    if few_tiles::suits_weight_gradient::<T>(geometry) {
        return few_tiles::weight_gradient(dy, x, geometry);
    }
    if conv_wide::suits(geometry) {
        return conv_wide::weight_gradient(dy, x, geometry);
    }
    if let Some(dw) = tiles::conv::weight_gradient(dy, x, geometry) {
        return dw;
    }
    if winograd::suits(geometry) {
        return winograd::weight_gradient(dy, x, geometry);
    }
    let (patch, out) = (geometry.patch(), geometry.channels.1);
    let tile_rows = geometry.tile();
    let partial = parallel::map(geometry.positions(), 32, |range| {
        let mut sum = vec![T::ZERO; patch * out]; // [k·k·c, out]
        let mut tile = unwritten(tile_rows * patch);
        let mut first = range.start;
        while first < range.end {
            let rows = tile_rows.min(range.end - first);
            unfold(x, geometry, first, &mut tile[..rows * patch]);
            let (a, b) = (Matrix::rows(&tile, patch).transposed(), Matrix::rows(&dy[first * out..], out));
            let target = (Matrix::rows_mut(&mut sum, out), Start::Held);
            // SAFETY: tile holds rows·patch values, dy rows·out from `first` on, sum patch·out.
            unsafe { matmul((patch, out, rows), a, b, target) }
            first += rows;
        }
        sum
    });
    let sum = sum_of(partial);
    let mut dw = unwritten(sum.len());
    let dw_at = parallel::Disjoint::new(&mut dw);
    // SAFETY: `for_weights` gives every index on each side once.
    for_weights(geometry, |to, from| unsafe { *dw_at.at(to) = sum[from] });
    dw
}

/// Candle's convolution, which is channel-first and pads both sides alike. Its backward takes the number of rows and
/// columns that a stride leaves over from the height alone, so here they are cut off before.
fn on_device(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, conv: Conv2d) -> Result<Tensor> {
    let [top, bottom, left, right] = conv.pad;
    let k = weight.dim(2)?;
    let x = super::to_channels_first(x)?;
    let y = if conv.stride == 1 && conv.pad == [top; 4] {
        x.conv2d(weight, top, 1, 1, 1)?
    } else {
        let x = x.pad_with_zeros(2, top, bottom)?.pad_with_zeros(3, left, right)?;
        let (_, _, h, w) = x.dims4()?;
        let used = |size: usize| (size - k) / conv.stride * conv.stride + k;
        x.narrow(2, 0, used(h))?.narrow(3, 0, used(w))?.contiguous()?.conv2d(weight, 0, conv.stride, 1, 1)?
    };
    let y = super::to_channels_last(&y)?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

//! Convolutions at stride 1 on the tile unit, without unfolding.
//!
//! In a padded picture laid out flat, pixel after pixel, row after row, the pixels that a tap of the kernel wants for 16
//! consecutive outputs are consecutive too: a tile is loaded where it lies, the tap's reach further on. The positions
//! between one row's last output and the next row's first give outputs that are thrown away.

mod convolve;
mod correlate;

use candle_core::DType;

use self::convolve::{Kernel, convolve};
use self::correlate::correlate;
use super::memory::{from_single, single};
use super::unit::available;
use super::{SIDE, for_planes};
use crate::ops::conv::Geometry;
use crate::ops::precision::{Precision, matmul_precision};
use crate::ops::real::Real;
use crate::ops::winograd;

/// Tiles of one pair of columns of the right factor that are multiplied at a time: they stay in the second-level cache.
const PANEL: usize = 512;

/// Whether the tile unit is there and the channels fill its tiles. In full precision Winograd's fewer products, themselves on
/// the unit, are faster still; in lower precision its sums would lose what precision is left.
fn suits<T: Real>(geometry: Geometry) -> bool {
    let (c, out) = geometry.channels;
    let is_single = T::DTYPE == DType::F32 && geometry.conv.stride == 1;
    let large = c.min(out) >= 4 && geometry.to_choose_by().positions() >= SIDE;
    let by_winograd = matmul_precision() == Precision::Highest && winograd::suits(geometry);
    is_single && large && !by_winograd && available()
}

/// None where this does not suit.
///
/// # Shapes
/// - x `[images, h, w, c]`, weight `[out, c, k, k]` → `[images, h', w', out]`
pub fn forward<T: Real>(x: &[T], weight: &[T], bias: Option<&[T]>, geometry: Geometry) -> Option<Vec<T>> {
    let convolve = || {
        let kernel = Kernel::forward(single(weight), geometry);
        let (x, bias, flat) = (single(x), bias.map(single), Flat::of(geometry));
        from_single(for_planes!(matmul_precision(), convolve(x, kernel, bias, flat)))
    };
    suits::<T>(geometry).then(convolve)
}

/// The gradient of the input; `flipped` is the geometry of the convolution from dy back to x, the weight stays as it is.
pub fn input_gradient<T: Real>(dy: &[T], weight: &[T], flipped: Geometry) -> Option<Vec<T>> {
    let convolve = || {
        let kernel = Kernel::backward(single(weight), flipped);
        let (dy, flat) = (single(dy), Flat::of(flipped));
        from_single(for_planes!(matmul_precision(), convolve(dy, kernel, None, flat)))
    };
    suits::<T>(flipped).then(convolve)
}

/// # Shapes
/// - dy `[images, h', w', out]`, x `[images, h, w, c]` → `[out, c, k, k]`
pub fn weight_gradient<T: Real>(dy: &[T], x: &[T], geometry: Geometry) -> Option<Vec<T>> {
    let correlate = || {
        let (dy, x, flat) = (single(dy), single(x), Flat::of(geometry));
        from_single(for_planes!(matmul_precision(), correlate(dy, x, flat)))
    };
    suits::<T>(geometry).then(correlate)
}

/// The padded pictures laid out flat.
#[derive(Clone, Copy)]
struct Flat {
    geometry: Geometry,
    /// Pixels from one row to the next.
    pitch: usize,
    /// Pixels of a padded picture.
    pixels: usize,
    /// Positions from a picture's first output to behind its last.
    used: usize,
}

impl Flat {
    fn of(geometry: Geometry) -> Self {
        let (h, w) = geometry.output;
        // What the kernel reaches from the outputs, whatever padding that takes.
        let (rows, pitch) = (h + geometry.kernel - 1, w + geometry.kernel - 1);
        Self { geometry, pitch, pixels: rows * pitch, used: (h - 1) * pitch + w }
    }

    /// How much further on the pixels for a tap lie.
    fn reach(self, tap: usize) -> usize {
        tap / self.geometry.kernel * self.pitch + tap % self.geometry.kernel
    }

    fn taps(self) -> usize {
        self.geometry.kernel * self.geometry.kernel
    }

    /// The pixel of x that lies at each position of its picture, where there is one; `len` positions.
    fn pixels(self, len: usize) -> Vec<Option<usize>> {
        let [top, _, left, _] = self.geometry.conv.pad;
        self.inside((top, left), self.geometry.input, len)
    }

    /// The output at each position of its picture, where there is one; `len` positions.
    fn outputs(self, len: usize) -> Vec<Option<usize>> {
        self.inside((0, 0), self.geometry.output, len)
    }

    fn inside(self, (top, left): (usize, usize), (h, w): (usize, usize), len: usize) -> Vec<Option<usize>> {
        let place = |position: usize| {
            let (row, column) = (position / self.pitch, position % self.pitch);
            let (row, column) = (row.checked_sub(top)?, column.checked_sub(left)?);
            (row < h && column < w).then(|| row * w + column)
        };
        (0..len).map(place).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::conv::Conv2d;
    use crate::rng::Rng;

    /// y, dx and dw, each as f64.
    fn by_definition(x: &[f32], w: &[f32], bias: &[f32], dy: &[f32], geometry: Geometry) -> [Vec<f64>; 3] {
        let (c, out) = geometry.channels;
        let taps = geometry.kernel * geometry.kernel;
        let bias = bias.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
        let mut result = [bias.repeat(geometry.positions()), vec![0.0; x.len()], vec![0.0; w.len()]];
        for position in 0..geometry.positions() {
            geometry.for_taps(position, |tap, pixel| {
                let Some(pixel) = pixel else { return };
                for o in 0..out {
                    for channel in 0..c {
                        let (at_x, at_w, at_y) =
                            (pixel * c + channel, (o * c + channel) * taps + tap, position * out + o);
                        result[0][at_y] += f64::from(x[at_x]) * f64::from(w[at_w]);
                        result[1][at_x] += f64::from(dy[at_y]) * f64::from(w[at_w]);
                        result[2][at_w] += f64::from(dy[at_y]) * f64::from(x[at_x]);
                    }
                }
            });
        }
        result
    }

    #[test]
    fn convolutions_and_their_gradients_follow_the_definition() {
        if !available() {
            return; // Every other test runs the portable products.
        }
        // Images, height, width, channels in and out, kernel, padding.
        let cases = [
            (1, 8, 8, 32, 32, 3, [1; 4]),
            (3, 5, 9, 40, 17, 3, [1; 4]),
            (2, 7, 4, 9, 70, 3, [0, 2, 1, 1]),
            (5, 16, 16, 33, 8, 3, [1; 4]),
            (1, 12, 11, 16, 24, 5, [2; 4]),
            (2, 6, 6, 20, 20, 3, [0; 4]),
        ];
        for (images, h, w, c, out, kernel, pad) in cases {
            let output = (h + pad[0] + pad[1] + 1 - kernel, w + pad[2] + pad[3] + 1 - kernel);
            let conv = Conv2d { stride: 1, pad };
            let geometry = Geometry { images, input: (h, w), output, channels: (c, out), kernel, conv };
            let mut rng = Rng::new(5, "convolution on tiles", (h * w * c) as u64);
            let mut draw = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
            let (x, weight, bias) = (draw(images * h * w * c), draw(out * c * kernel * kernel), draw(out));
            let dy = draw(geometry.positions() * out);
            let expected = by_definition(&x, &weight, &bias, &dy, geometry);
            let back = geometry.flipped().unwrap();
            let (forth, turned) = (Kernel::forward(&weight, geometry), Kernel::backward(&weight, back));
            let (flat, flipped) = (Flat::of(geometry), Flat::of(back));
            let check = |found: [Vec<f32>; 3], bound: f64| {
                for (name, (found, expected)) in ["y", "dx", "dw"].into_iter().zip(found.iter().zip(&expected)) {
                    let largest = expected.iter().fold(0f64, |max, v| max.max(v.abs()));
                    let error = found.iter().zip(expected).fold(0f64, |max, (a, b)| max.max((f64::from(*a) - b).abs()));
                    assert!(error < bound * largest, "{name} of {images}x{h}x{w}x{c} to {out}: {:e}", error / largest);
                }
            };
            macro_rules! all {
                ($planes:literal) => {
                    [
                        convolve::<$planes>(&x, forth, Some(&bias), flat),
                        convolve::<$planes>(&dy, turned, None, flipped),
                        correlate::<$planes>(&dy, &x, flat),
                    ]
                };
            }
            check(all!(3), 1e-6);
            check(all!(2), 1e-4);
            check(all!(1), 2e-2);
        }
    }
}

//! Winograd's convolution for many weights at few tiles (the lowest levels of a U-Net), where the transformed weight, 16/9 of
//! the weight itself, would be written to memory and read again for a handful of rows each. Here it never leaves the caches:
//! some output channels' weights at some input channels are transformed, multiplied by and forgotten.

use std::ops::{Range, RangeInclusive};

use super::pictures::{gradient_tiles, input_tiles, output_tiles, stride};
use super::weight::{Pass, at_points, at_taps};
use super::{PACKED, POINTS, TAPS, tiles};
use crate::ops::buffer::{Aligned, unwritten};
use crate::ops::conv::Geometry;
use crate::ops::lanes::{LANES, Lanes};
use crate::ops::parallel::{self, Disjoint};
use crate::ops::product::{Matrix, Start, WIDEST, lane_product, takes_panels};
use crate::ops::real::{Real, vectorised};
use crate::ops::transpose::transpose;

/// Input channels at a time: with [`WIDTH`] output channels a piece of the transformed weight stays in the second-level cache.
const DEPTH: usize = 128;
/// Output channels at a time.
const WIDTH: usize = WIDEST * LANES;

/// Whether it beats both the products of [`super`] and those of unfolded rows.
pub fn suits<T: Real>(geometry: Geometry) -> bool {
    are_few_for_many_weights::<T>(geometry, 32..=256) && geometry.channels.1.is_multiple_of(LANES)
}

/// The same for the weight's gradient.
pub fn suits_weight_gradient<T: Real>(geometry: Geometry) -> bool {
    are_few_for_many_weights::<T>(geometry, 32..=192) && geometry.channels.0.is_multiple_of(LANES)
}

fn are_few_for_many_weights<T: Real>(geometry: Geometry, few: RangeInclusive<usize>) -> bool {
    let (c, out) = geometry.channels;
    let is_winograds = geometry.kernel == 3 && geometry.conv.stride == 1;
    let is_few = few.contains(&tiles(geometry.to_choose_by()));
    // `lane_product` is at its best where panels are.
    is_winograds && is_few && POINTS * c * out > PACKED && takes_panels::<T>()
}

/// As [`super::forward`] and [`super::input_gradient`], for output channels that are a multiple of [`LANES`].
pub fn multiply<T: Real>(x: &[T], weight: &[T], bias: Option<&[T]>, geometry: Geometry, pass: Pass) -> Vec<T> {
    let ((c, out), n) = (geometry.channels, tiles(geometry));
    let mut y = unwritten(geometry.positions() * out);
    let y_at = Disjoint::new(&mut y);
    for_channels(out, |columns| {
        let width = columns.len();
        let mut v = unwritten(POINTS * stride(n, DEPTH));
        let mut m = Aligned::unwritten(POINTS * stride(n, width));
        let mut u = Aligned::unwritten(POINTS * DEPTH * WIDTH);
        for places in parallel::pieces(0..c, DEPTH) {
            let depth = places.len();
            input_tiles(&mut v, x, places.clone(), (0, n), geometry);
            let start = if places.start == 0 { Start::Zero } else { Start::Held };
            for piece in parallel::pieces(columns.clone(), WIDTH) {
                transform(&mut u, weight, (places.clone(), piece.clone()), (c, out), pass);
                for point in 0..POINTS {
                    let a = Matrix::rows(&v[point * stride(n, depth)..], depth);
                    let b = Matrix::rows(&u[point * depth * piece.len()..], piece.len());
                    let target = Matrix::rows_mut(&mut m[point * stride(n, width)..], width);
                    let target = (target.at_mut(0, piece.start - columns.start), start);
                    // SAFETY: at each point v holds n·depth, u depth·piece and m n·width values.
                    unsafe { lane_product((n, piece.len(), depth), a, b, target) }
                }
            }
        }
        output_tiles(&y_at, &m, bias, columns, (0, n), geometry);
    });
    y
}

/// As [`super::weight_gradient`], for input channels that are a multiple of [`LANES`].
pub fn weight_gradient<T: Real>(dy: &[T], x: &[T], geometry: Geometry) -> Vec<T> {
    /// Output and input channels at a time: their part of the gradient at all points stays in the second-level cache.
    const ROWS: usize = 64;
    const COLUMNS: usize = 192;
    let ((c, out), n) = (geometry.channels, tiles(geometry));
    let mut dw = unwritten(TAPS * c * out);
    parallel::for_rows(&mut dw, TAPS * c, ROWS, |outputs, dw| {
        let mut z = unwritten(POINTS * stride(n, outputs.len()));
        let mut v = Aligned::unwritten(POINTS * stride(n, COLUMNS));
        let mut du = Aligned::unwritten(POINTS * ROWS * COLUMNS);
        gradient_tiles(&mut z, dy, outputs.clone(), (0, n), geometry);
        for columns in parallel::pieces(0..c, COLUMNS) {
            input_tiles(&mut v, x, columns.clone(), (0, n), geometry);
            let width = columns.len();
            for rows in parallel::pieces(0..outputs.len(), ROWS) {
                for point in 0..POINTS {
                    let a = Matrix::rows(&z[point * stride(n, outputs.len())..], outputs.len()).transposed();
                    let b = Matrix::rows(&v[point * stride(n, width)..], width);
                    let target = Matrix::rows_mut(&mut du[point * rows.len() * width..], width);
                    // SAFETY: at each point z holds n·outputs, v n·width and du rows·width values.
                    unsafe { lane_product((rows.len(), width, n), a.at(rows.start, 0), b, (target, Start::Zero)) }
                }
                gather(dw, &du, (rows, columns.clone()), c);
            }
        }
    });
    dw
}

/// Calls `f` for the output channels of each thread, whole registers of them.
fn for_channels(channels: usize, f: impl Fn(Range<usize>) + Sync + Send) {
    parallel::map(channels / LANES, 2, |registers| f(registers.start * LANES..registers.end * LANES));
}

/// Begins to fetch the taps of sixteen channels, which are far from those before.
#[inline(always)]
fn prefetch<T>(taps: *const T) {
    #[cfg(not(target_arch = "x86_64"))]
    let _ = taps;
    #[cfg(target_arch = "x86_64")]
    for line in 0..TAPS {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which reads nothing where nothing is.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(taps.wrapping_add(line * LANES).cast()) };
    }
}

vectorised! {
    /// G·g·Gᵀ of these (input, output) channels of the pass, `[16, inputs, outputs]`.
    fn transform[T: Real](
        u: &mut [T], weight: &[T], part: (Range<usize>, Range<usize>), channels: (usize, usize), pass: Pass,
    ) {
        let (inputs, outputs) = part;
        let mut taps = [T::ZERO; LANES * TAPS * LANES];
        for output in outputs.clone().step_by(LANES) {
            for first in inputs.clone().step_by(LANES) {
                let some = LANES.min(inputs.end - first);
                // Some inputs' taps at sixteen outputs, `[inputs, 9, 16]`.
                match pass {
                    Pass::Forward => {
                        let from = &weight[(output * channels.0 + first) * TAPS..];
                        let last = ((LANES - 1) * channels.0 + some) * TAPS;
                        // SAFETY: sixteen rows of the weight have these inputs' taps in one piece, the last of them as far
                        // as this.
                        let from = (from[..last].as_ptr(), channels.0 * TAPS);
                        (0..LANES).for_each(|row| prefetch(from.0.wrapping_add(row * from.1 + LANES * TAPS)));
                        unsafe { transpose((LANES, some * TAPS), from, (taps.as_mut_ptr(), LANES), T::ONE) };
                    }
                    Pass::InputGradient => {
                        for (i, taps) in taps.chunks_exact_mut(TAPS * LANES).take(some).enumerate() {
                            let from = &weight[((first + i) * channels.1 + output) * TAPS..][..LANES * TAPS];
                            prefetch(from.as_ptr().wrapping_add(LANES * channels.1 * TAPS));
                            // SAFETY: both have sixteen times nine values.
                            unsafe { transpose((LANES, TAPS), (from.as_ptr(), TAPS), (taps.as_mut_ptr(), LANES), T::ONE) };
                        }
                    }
                }
                for (i, taps) in taps.chunks_exact(TAPS * LANES).take(some).enumerate() {
                    let g = |row: usize, column: usize| Lanes::load(taps, pass.tap(row, column) * LANES);
                    at_points(g, |point, value| {
                        let row = (point * inputs.len() + first - inputs.start + i) * outputs.len();
                        value.store(&mut u[row + output - outputs.start..][..LANES]);
                    });
                }
            }
        }
    }
}

vectorised! {
    /// Gᵀ·du·G into these (output, input) channels of dw `[outputs, c, 3, 3]`; du is `[16, outputs, inputs]`.
    fn gather[T: Real](dw: &mut [T], du: &[T], part: (Range<usize>, Range<usize>), c: usize) {
        let (outputs, inputs) = part;
        let mut taps = [T::ZERO; TAPS * LANES];
        for output in outputs.clone() {
            for channel in inputs.clone().step_by(LANES) {
                let at_point = |point: usize| {
                    let row = (point * outputs.len() + output - outputs.start) * inputs.len();
                    Lanes::load(&du[row + channel - inputs.start..][..LANES], 0)
                };
                at_taps(at_point, |tap, value| value.store(&mut taps[tap * LANES..][..LANES]));
                let to = &mut dw[(output * c + channel) * TAPS..][..LANES * TAPS];
                // SAFETY: both have nine times sixteen values.
                unsafe { transpose((TAPS, LANES), (taps.as_ptr(), LANES), (to.as_mut_ptr(), TAPS), T::ONE) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::conv::Conv2d;
    use crate::ops::winograd;

    /// More channels than are taken at a time and a rest of them, pictures of odd sizes, more tiles than rows of a product.
    #[test]
    fn gives_what_winograds_products_give() {
        let values = |count: usize, seed: usize| -> Vec<f64> {
            (0..count).map(|i| ((i + seed) * 7919 % 1009) as f64 / 504.5 - 1.0).collect()
        };
        let agree = |found: Vec<f64>, expected: Vec<f64>, name: &str| {
            let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(found.len() == expected.len() && worst < 1e-11, "{name}: {worst:e}");
        };
        for (images, input, channels) in [(3, (5, 7), (208, 80)), (1, (9, 4), (32, 128))] {
            let geometry = Geometry { images, input, output: input, channels, kernel: 3, conv: Conv2d::same(3) };
            let flipped = geometry.flipped().unwrap();
            let (c, out) = channels;
            let (x, dy) = (values(geometry.positions() * c, 1), values(geometry.positions() * out, 2));
            let (weight, bias) = (values(9 * c * out, 3), values(out, 4));
            let y = multiply(&x, &weight, Some(&bias), geometry, Pass::Forward);
            agree(y, winograd::forward(&x, &weight, Some(&bias), geometry, None), "forward");
            let dx = multiply(&dy, &weight, None, flipped, Pass::InputGradient);
            agree(dx, winograd::input_gradient(&dy, &weight, flipped), "input gradient");
            agree(weight_gradient(&dy, &x, geometry), winograd::weight_gradient(&dy, &x, geometry), "weight gradient");
        }
        let odd =
            Geometry { images: 1, input: (6, 6), output: (6, 6), channels: (21, 16), kernel: 3, conv: Conv2d::same(3) };
        let (x, weight) = (values(36 * 21, 5), values(9 * 21 * 16, 6));
        let y = multiply(&x, &weight, None, odd, Pass::Forward);
        agree(y, winograd::forward(&x, &weight, None, odd, None), "any number of input channels");
    }
}

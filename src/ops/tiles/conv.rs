//! Convolutions at stride 1 on the tile unit, without unfolding.
//!
//! In a padded picture laid out flat, pixel after pixel, row after row, the pixels that a tap of the kernel wants for 16
//! consecutive outputs are consecutive too: a tile of the left factor is loaded where it lies, `offset(tap)` further on. The
//! positions between one row's last output and the next row's first give outputs that are thrown away.

use std::arch::x86_64::*;
use std::ops::Range;

use candle_core::DType;

use super::pack::{Factor, Side, Sum, split, split_one, transposed};
use super::unit::{Left, Registers, available};
use super::{EMPTY, SIDE, Tile, for_planes};
use crate::ops::buffer::unwritten;
use crate::ops::conv::Geometry;
use crate::ops::parallel::{self, Disjoint};
use crate::ops::precision::{Precision, matmul_precision};
use crate::ops::real::Real;

/// Tiles of one pair of columns of the right factor that are multiplied at a time: they stay in the second-level cache.
const PANEL: usize = 512;
/// Rows of output tiles that a thread keeps while it goes through the panels.
const CHUNK: usize = 16;

/// Whether the tile unit is there and the channels fill its tiles.
fn suits<T: Real>(geometry: Geometry) -> bool {
    let (c, out) = geometry.channels;
    let large = c.min(out) >= 8 && geometry.positions() >= SIDE;
    T::DTYPE == DType::F32 && geometry.conv.stride == 1 && large && !std::env::var("CT").is_ok() && available()
}

/// None where this does not suit.
///
/// # Shapes
/// - x `[images, h, w, c]`, weight `[out, c, k, k]` → `[images, h', w', out]`
pub fn forward<T: Real>(x: &[T], weight: &[T], bias: Option<&[T]>, geometry: Geometry) -> Option<Vec<T>> {
    let taps = geometry.kernel * geometry.kernel;
    let convolve = || {
        let kernel = Kernel {
            weight: single(weight),
            along: taps,
            across: taps * geometry.channels.0,
            is_flipped: false,
        };
        let (x, bias, flat) = (single(x), bias.map(single), Flat::of(geometry));
        from_single(for_planes!(matmul_precision(), convolve(x, kernel, bias, flat)))
    };
    suits::<T>(geometry).then(convolve)
}

/// The gradient of the input; `flipped` is the geometry of the convolution from dy back to x, the weight stays as it is.
pub fn input_gradient<T: Real>(dy: &[T], weight: &[T], flipped: Geometry) -> Option<Vec<T>> {
    let taps = flipped.kernel * flipped.kernel;
    let convolve = || {
        let kernel = Kernel {
            weight: single(weight),
            along: taps * flipped.channels.1,
            across: taps,
            is_flipped: true,
        };
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

/// The values of a `T` that is f32.
fn single<T: Real>(values: &[T]) -> &[f32] {
    assert_eq!(T::DTYPE, DType::F32);
    // SAFETY: `Real` is f32 or f64, told apart above.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
}

/// The way back.
fn from_single<T: Real>(values: Vec<f32>) -> Vec<T> {
    assert_eq!(T::DTYPE, DType::F32);
    let mut values = std::mem::ManuallyDrop::new(values);
    // SAFETY: `T` is f32, and nobody else owns the memory.
    unsafe { Vec::from_raw_parts(values.as_mut_ptr().cast(), values.len(), values.capacity()) }
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

    /// The pixel of x that lies at `position` of its picture.
    fn pixel(self, position: usize) -> Option<usize> {
        let (h, w) = self.geometry.input;
        let [top, _, left, _] = self.geometry.conv.pad;
        let row = (position / self.pitch).wrapping_sub(top);
        let column = (position % self.pitch).wrapping_sub(left);
        (row < h && column < w).then(|| row * w + column)
    }

    /// The output at `position` of its picture.
    fn output(self, position: usize) -> Option<usize> {
        let (row, column) = (position / self.pitch, position % self.pitch);
        let (h, w) = self.geometry.output;
        (row < h && column < w).then(|| row * w + column)
    }
}

/// A weight as a right factor: strides along and across the sum.
#[derive(Clone, Copy)]
struct Kernel<'a> {
    weight: &'a [f32],
    along: usize,
    across: usize,
    /// Turned round in both directions.
    is_flipped: bool,
}

/// Memory of whole 64-byte lines that is written before it is read.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

#[allow(clippy::uninit_vec)]
fn unwritten_lines<T: Copy>(len: usize) -> Vec<T> {
    let mut lines = Vec::with_capacity(len);
    // SAFETY: the capacity is `len`; lines and tiles are plain integers, written before they are read.
    unsafe { lines.set_len(len) };
    lines
}

/// The bf16 values of lines.
fn values_of(lines: &mut [Line]) -> &mut [u16] {
    let len = lines.len() * 32;
    // SAFETY: a line is 32 of them.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), len) }
}

/// The pictures in bf16 planes, `[plane][picture][pixel][block of channels]`, a line each.
fn packed_pixels<const PLANES: usize>(x: &[f32], flat: Flat, sum: Sum) -> Vec<Line> {
    let Geometry { images, input: (h, w), channels: (c, _), .. } = flat.geometry;
    let plane = (images * flat.pixels + SIDE) * sum.blocks; // tiles at the end reach up to 15 pixels further
    let mut lines = unwritten_lines::<Line>(PLANES * plane);
    for plane in lines.chunks_exact_mut(plane) {
        plane[images * flat.pixels * sum.blocks..].fill(Line([0; 16]));
    }
    let lines_at = Disjoint::new(&mut lines);
    let rows = flat.pixels / flat.pitch;
    parallel::map(images * rows, 4, |rows_of_all| {
        for row in rows_of_all {
            let (image, row) = (row / rows, row % rows);
            for position in row * flat.pitch..(row + 1) * flat.pitch {
                let to = (image * flat.pixels + position) * sum.blocks;
                let pixel = flat.pixel(position).map(|pixel| &x[(image * h * w + pixel) * c..][..c]);
                // SAFETY: the unit is there, and with it AVX-512; these lines of every plane are this thread's.
                unsafe { pack_pixel::<PLANES>(pixel, sum, (lines_at.at(to), plane)) };
            }
        }
    });
    lines
}

/// One pixel's channels into its lines of every plane.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn pack_pixel<const PLANES: usize>(pixel: Option<&[f32]>, sum: Sum, (to, plane_stride): (*mut Line, usize)) {
    for block in 0..sum.blocks {
        let half = |place: usize| match pixel {
            // SAFETY: the mask ends at the pixel's channels.
            Some(pixel) => unsafe {
                let places = sum.pairs.min(pixel.len().saturating_sub(place));
                _mm512_maskz_loadu_ps(((1u32 << places) - 1) as u16, pixel.as_ptr().wrapping_add(place))
            },
            None => _mm512_setzero_ps(),
        };
        let first = block * 2 * sum.pairs;
        split::<PLANES>(half(first), half(first + sum.pairs), |plane, pairs| {
            // SAFETY: the caller's lines.
            unsafe { _mm512_store_si512(to.add(plane * plane_stride + block).cast(), pairs) };
        });
    }
}

/// The weight as tiles, `[column of tiles][tap][block][plane]`.
fn packed_kernel<const PLANES: usize>(kernel: Kernel, flat: Flat, sum: Sum) -> Vec<Tile> {
    let out = flat.geometry.channels.1;
    let own = flat.taps() * sum.blocks * PLANES;
    let mut tiles = unwritten_lines::<Tile>(out.div_ceil(SIDE) * own);
    let tiles_at = Disjoint::new(&mut tiles);
    parallel::map(out.div_ceil(SIDE), 1, |columns| {
        for column in columns {
            for tap in 0..flat.taps() {
                let from = if kernel.is_flipped { flat.taps() - 1 - tap } else { tap };
                let start = &raw const kernel.weight[from];
                let factor =
                    Factor { start, across: kernel.across, along: kernel.along, count: out, side: Side::Right };
                let tiles = sum.blocks * PLANES;
                // SAFETY: the factor is the weight; these tiles are this thread's.
                unsafe {
                    let to = std::slice::from_raw_parts_mut(tiles_at.at(column * own + tap * tiles), tiles);
                    factor.pack::<PLANES>(sum, 1.0, (column..column + 1, 0..sum.blocks), to);
                }
            }
        }
    });
    tiles
}

/// The convolution of x with the kernel.
fn convolve<const PLANES: usize>(x: &[f32], kernel: Kernel, bias: Option<&[f32]>, flat: Flat) -> Vec<f32> {
    let Geometry { images, channels: (c, out), .. } = flat.geometry;
    let sum = Sum::of(c);
    let pixels = packed_pixels::<PLANES>(x, flat, sum);
    let tiles = packed_kernel::<PLANES>(kernel, flat, sum);
    let mut y = unwritten(flat.geometry.positions() * out);
    let y_at = Disjoint::new(&mut y);
    let line = size_of::<Line>();
    let offsets: Vec<usize> = (0..flat.taps())
        .flat_map(|tap| (0..sum.blocks).map(move |block| (flat.reach(tap) * sum.blocks + block) * line))
        .collect();
    let work = Convolution {
        flat,
        offsets,
        rows_each: flat.used.div_ceil(SIDE),
        left: (pixels.as_ptr().cast(), sum.blocks * line, (images * flat.pixels + SIDE) * sum.blocks * line),
        right: tiles.as_ptr(),
        bias,
        y: y_at,
    };
    let (rows, columns) = (images * work.rows_each, out.div_ceil(2 * SIDE));
    // SAFETY (both): the unit is there; the parts are disjoint.
    if rows >= 16 * parallel::parts(usize::MAX, 1) {
        parallel::map(rows.div_ceil(2), 1, |pairs| unsafe {
            work.part::<PLANES>(pairs.start * 2..rows.min(pairs.end * 2), 0..columns, sum);
        });
    } else {
        parallel::map(columns, 1, |columns| unsafe { work.part::<PLANES>(0..rows, columns, sum) });
    }
    y
}

struct Convolution<'a> {
    flat: Flat,
    /// Of the steps of a sum, taps times blocks of channels, in bytes.
    offsets: Vec<usize>,
    /// Rows of tiles a picture.
    rows_each: usize,
    /// The packed pixels: start, and bytes from pixel to pixel and from plane to plane.
    left: (*const u8, usize, usize),
    right: *const Tile,
    bias: Option<&'a [f32]>,
    y: Disjoint<f32>,
}

// SAFETY: the pointers are to what the threads only read.
unsafe impl Sync for Convolution<'_> {}

impl Convolution<'_> {
    /// These rows of output tiles, and pairs of columns of them.
    unsafe fn part<const PLANES: usize>(&self, rows: Range<usize>, columns: Range<usize>, sum: Sum) {
        let steps = self.offsets.len();
        let n_panels = (steps * PLANES * 2).div_ceil(PANEL);
        let wide = self.flat.geometry.channels.1.div_ceil(SIDE);
        let mut outputs = [EMPTY; 2 * CHUNK];
        // SAFETY: the unit is there.
        let registers = unsafe { Registers::new(sum.pairs) };
        for first in rows.clone().step_by(CHUNK) {
            let last = rows.end.min(first + CHUNK);
            for column in columns.clone() {
                let width = 2.min(wide - 2 * column);
                for panel in 0..n_panels {
                    let panel_steps = parallel::range(steps, n_panels, panel);
                    let tiles = |column: usize| self.right.wrapping_add((column * steps + panel_steps.start) * PLANES);
                    let right = [tiles(2 * column), tiles(2 * column + 1)];
                    for row in (first..last).step_by(2) {
                        let height = 2.min(last - row);
                        let own = &mut outputs[2 * (row - first)..][..2 * height];
                        let mut places = [(std::ptr::null_mut(), 0); 4];
                        for (place, tile) in places.iter_mut().zip(own.iter_mut()) {
                            *place = (tile.0.as_mut_ptr().cast(), 64);
                        }
                        let (start, row_stride, plane_stride) = self.left;
                        let starts = [row, row + 1].map(|row| start.wrapping_add(self.position(row) * row_stride));
                        let left = Left { starts, row_stride, plane_stride };
                        let (offsets, out) = (&self.offsets[panel_steps.clone()], (places, panel > 0));
                        // SAFETY: rows of the packed pixels reach 15 pixels beyond the last picture.
                        unsafe { registers.multiply_some::<PLANES>((height, width), offsets, (left, right), out) };
                        if panel + 1 == n_panels {
                            for (i, tile) in own.iter().enumerate().filter(|(i, _)| i % 2 < width) {
                                // SAFETY: these outputs are this thread's.
                                unsafe { self.store(tile, row + i / 2, (2 * column + i % 2) * SIDE) };
                            }
                        }
                    }
                }
            }
        }
    }

    /// The first pixel of a row of tiles, counted over all pictures.
    fn position(&self, row: usize) -> usize {
        row / self.rows_each * self.flat.pixels + row % self.rows_each * SIDE
    }

    /// The outputs of a tile that are any, with the bias.
    #[target_feature(enable = "avx512f")]
    unsafe fn store(&self, tile: &Tile, row: usize, channel: usize) {
        let out = self.flat.geometry.channels.1;
        let mask = ((1u32 << SIDE.min(out - channel)) - 1) as u16;
        // SAFETY: the mask ends at the last channel.
        let bias = match self.bias {
            Some(bias) => unsafe { _mm512_maskz_loadu_ps(mask, bias.as_ptr().add(channel)) },
            None => _mm512_setzero_ps(),
        };
        let (image, first) = (row / self.rows_each, row % self.rows_each * SIDE);
        let (h, w) = self.flat.geometry.output;
        for (i, values) in tile.0.chunks_exact(SIDE).enumerate() {
            if let Some(output) = self.flat.output(first + i) {
                // SAFETY: the tile has 16 values a row; the output's pixel has `out` from this address less `channel` on.
                unsafe {
                    let sum = _mm512_add_ps(_mm512_load_ps(values.as_ptr().cast()), bias);
                    _mm512_mask_storeu_ps(self.y.at((image * h * w + output) * out + channel), mask, sum);
                }
            }
        }
    }
}

/// The pictures with their positions along the sum, `[plane][picture][channel][position]` in bf16; 0 wherever there is no
/// pixel, since what they are multiplied with is 0 there too but must not be 0 times anything else.
fn packed_channels<const PLANES: usize>(x: &[f32], flat: Flat, width: usize) -> Vec<Line> {
    let Geometry { images, input: (h, w), channels: (c, _), .. } = flat.geometry;
    let columns = c.div_ceil(SIDE);
    let line_values = size_of::<Line>() / 2;
    let own = SIDE * width / line_values; // lines of 16 channels
    let plane = images * columns * SIDE * width; // in values
    let mut lines = unwritten_lines::<Line>(PLANES * images * columns * own);
    let at = Disjoint::new(values_of(&mut lines));
    parallel::map(images * columns, 1, |parts| {
        for part in parts {
            let (image, channel) = (part / columns, part % columns * SIDE);
            let mask = ((1u32 << SIDE.min(c - channel)) - 1) as u16;
            for first in (0..width).step_by(SIDE) {
                let pixel = |i: usize| {
                    let pixel = if first + i < flat.pixels { flat.pixel(first + i) } else { None };
                    pixel.map(|pixel| &raw const x[(image * h * w + pixel) * c + channel])
                };
                // SAFETY: the unit is there, and with it AVX-512; the mask ends at the pixel's channels; these positions
                // of these channels are this thread's in every plane.
                unsafe { pack_channels::<PLANES>(pixel, mask, (at.at(part * SIDE * width + first), width, plane)) };
            }
        }
    });
    lines
}

/// 16 pixels of 16 channels, turned.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn pack_channels<const PLANES: usize>(
    pixel: impl Fn(usize) -> Option<*const f32>,
    mask: u16,
    (to, width, plane_stride): (*mut u16, usize, usize),
) {
    let mut pixels = [_mm512_setzero_ps(); SIDE];
    for (i, values) in pixels.iter_mut().enumerate() {
        if let Some(from) = pixel(i) {
            // SAFETY: the caller's contract.
            *values = unsafe { _mm512_maskz_loadu_ps(mask, from) };
        }
    }
    for (channel, values) in transposed(pixels).into_iter().enumerate() {
        split_one::<PLANES>(values, |plane, values| {
            // SAFETY: as above.
            unsafe { _mm256_storeu_si256(to.add(plane * plane_stride + channel * width).cast(), values) };
        });
    }
}

/// The gradient of the outputs as tiles, `[column of tiles][picture][block][plane]`, neighbours along the sum side by side.
fn packed_gradient<const PLANES: usize>(dy: &[f32], flat: Flat, blocks: usize) -> Vec<Tile> {
    let Geometry { images, output: (h, w), channels: (_, out), .. } = flat.geometry;
    let columns = out.div_ceil(SIDE);
    let own = images * blocks * PLANES;
    let mut tiles = unwritten_lines::<Tile>(columns * own);
    let tiles_at = Disjoint::new(&mut tiles);
    parallel::map(images * blocks, 1, |parts| {
        for part in parts {
            let (image, first) = (part / blocks, part % blocks * 2 * SIDE);
            for column in 0..columns {
                let mask = ((1u32 << SIDE.min(out - column * SIDE)) - 1) as u16;
                let pixel = |i: usize| {
                    let output = flat.output(first + i);
                    output.map(|output| &raw const dy[(image * h * w + output) * out + column * SIDE])
                };
                // SAFETY: the unit is there, and with it AVX-512; the mask ends at the pixel's channels; these tiles are
                // this thread's.
                unsafe {
                    let to = std::slice::from_raw_parts_mut(tiles_at.at(column * own + part * PLANES), PLANES);
                    pack_pairs::<PLANES>(pixel, mask, to);
                }
            }
        }
    });
    tiles
}

/// 32 pixels of 16 channels, two side by side.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn pack_pairs<const PLANES: usize>(pixel: impl Fn(usize) -> Option<*const f32>, mask: u16, to: &mut [Tile]) {
    for row in 0..SIDE {
        let load = |i: usize| match pixel(i) {
            // SAFETY: the caller's contract.
            Some(from) => unsafe { _mm512_maskz_loadu_ps(mask, from) },
            None => _mm512_setzero_ps(),
        };
        split::<PLANES>(load(2 * row), load(2 * row + 1), |plane, pairs| {
            // SAFETY: a tile has 16 rows of 64 bytes.
            unsafe { _mm512_store_si512(to[plane].0.as_mut_ptr().add(row * SIDE).cast(), pairs) };
        });
    }
}

/// The gradient of the weight: for each tap, the sum over all positions of x there times dy.
fn correlate<const PLANES: usize>(dy: &[f32], x: &[f32], flat: Flat) -> Vec<f32> {
    let Geometry { images, channels: (c, out), .. } = flat.geometry;
    let (taps, blocks) = (flat.taps(), flat.used.div_ceil(2 * SIDE));
    let (rows, columns) = (c.div_ceil(SIDE), out.div_ceil(SIDE));
    // Odd multiples of a line, so that the rows of a tile do not share a few sets of the first-level cache.
    let width = ((blocks * 2 * SIDE + flat.reach(taps - 1)).div_ceil(32) | 1) * 32;
    let channels = packed_channels::<PLANES>(x, flat, width);
    let tiles = packed_gradient::<PLANES>(dy, flat, blocks);
    let picture = rows * SIDE * width * 2; // bytes
    let offsets: Vec<usize> =
        (0..images).flat_map(|image| (0..blocks).map(move |block| image * picture + block * 64)).collect();
    let steps = offsets.len();
    let n_panels = (steps * PLANES * 2).div_ceil(PANEL);
    let (left_at, right_at) = (channels.as_ptr() as usize, tiles.as_ptr() as usize);
    let (padded_c, padded_out) = (rows * SIDE, columns * SIDE);
    let mut sums = unwritten::<f32>(taps * padded_c * padded_out); // [tap, c, out]
    let sums_at = Disjoint::new(&mut sums);
    let pairs = rows.div_ceil(2);
    parallel::map(taps * pairs, 1, |parts| {
        // SAFETY: the unit is there.
        let registers = unsafe { Registers::new(SIDE) };
        for panel in 0..n_panels {
            let panel_steps = parallel::range(steps, n_panels, panel);
            for part in parts.clone() {
                let (tap, row) = (part / pairs, part % pairs * 2);
                let start = |row: usize| (left_at as *const u8).wrapping_add((row * SIDE * width + flat.reach(tap)) * 2);
                let left = Left { starts: [start(row), start(row + 1)], row_stride: width * 2, plane_stride: images * picture };
                for column in (0..columns).step_by(2) {
                    let right = [column, column + 1]
                        .map(|c| (right_at as *const Tile).wrapping_add((c * steps + panel_steps.start) * PLANES));
                    let size = (2.min(rows - row), 2.min(columns - column));
                    let places = [0, 1, 2, 3].map(|i: usize| {
                        let (row, column) = ((row + i / 2) * SIDE, (column + i % 2) * SIDE);
                        (sums_at.at((tap * padded_c + row) * padded_out + column).cast(), padded_out * 4)
                    });
                    let steps = &offsets[panel_steps.clone()];
                    // SAFETY: the tiles lie inside the packed factors and, those in use, inside the sums of this part.
                    unsafe { registers.multiply_some::<PLANES>(size, steps, (left, right), (places, panel > 0)) };
                }
            }
        }
    });
    let mut dw = unwritten(taps * c * out);
    parallel::for_rows(&mut dw, c * taps, 1, |outputs, dw| {
        for first in outputs.clone().step_by(SIDE) {
            for channel in 0..c {
                for tap in 0..taps {
                    for o in first..outputs.end.min(first + SIDE) {
                        let to = ((o - outputs.start) * c + channel) * taps + tap;
                        dw[to] = sums[(tap * padded_c + channel) * padded_out + o];
                    }
                }
            }
        }
    });
    dw
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
                        let (at_x, at_w, at_y) = (pixel * c + channel, (o * c + channel) * taps + tap, position * out + o);
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
            let found = [
                forward(&x, &weight, Some(&bias), geometry).unwrap(),
                input_gradient(&dy, &weight, geometry.flipped().unwrap()).unwrap(),
                weight_gradient(&dy, &x, geometry).unwrap(),
            ];
            for (name, (found, expected)) in ["y", "dx", "dw"].into_iter().zip(found.iter().zip(&expected)) {
                let largest = expected.iter().fold(0f64, |max, v| max.max(v.abs()));
                let error = found.iter().zip(expected).fold(0f64, |max, (a, b)| max.max((f64::from(*a) - b).abs()));
                assert!(error < 1e-6 * largest, "{name} of {images}x{h}x{w}x{c} to {out}: {:e}", error / largest);
            }
        }
    }
}

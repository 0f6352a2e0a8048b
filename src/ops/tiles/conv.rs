//! Convolutions at stride 1 on the tile unit, without unfolding.
//!
//! In a padded picture laid out flat, pixel after pixel, row after row, the pixels that a tap of the kernel wants for 16
//! consecutive outputs are consecutive too: a tile of the left factor is loaded where it lies, `offset(tap)` further on. The
//! positions between one row's last output and the next row's first give outputs that are thrown away.

use std::arch::x86_64::*;
use std::ops::Range;

use candle_core::DType;

use super::memory::{Line, from_single, single, unwritten_lines};
use super::pack::{Factor, Side, Sum, split, split_one, transposed};
use super::unit::{Registers, Step, Tiles, available};
use super::{EMPTY, SIDE, Tile, for_planes};
use crate::ops::buffer::unwritten;
use crate::ops::conv::Geometry;
use crate::ops::parallel::{self, Disjoint};
use crate::ops::precision::{Precision, matmul_precision};
use crate::ops::real::Real;
use crate::ops::winograd;

/// Tiles of one pair of columns of the right factor that are multiplied at a time: they stay in the second-level cache.
const PANEL: usize = 512;
/// Rows of output tiles that a thread keeps while it goes through the panels.
const CHUNK: usize = 16;

/// Whether the tile unit is there and the channels fill its tiles. In full precision Winograd's fewer products, themselves on
/// the unit, are faster still; in lower precision its sums would lose what precision is left.
fn suits<T: Real>(geometry: Geometry) -> bool {
    let (c, out) = geometry.channels;
    let is_single = T::DTYPE == DType::F32 && geometry.conv.stride == 1;
    let large = c.min(out) >= 4 && geometry.positions() >= SIDE;
    let by_winograd = matmul_precision() == Precision::Highest && winograd::suits(geometry);
    is_single && large && !by_winograd && available()
}

/// None where this does not suit.
///
/// # Shapes
/// - x `[images, h, w, c]`, weight `[out, c, k, k]` → `[images, h', w', out]`
pub fn forward<T: Real>(x: &[T], weight: &[T], bias: Option<&[T]>, geometry: Geometry) -> Option<Vec<T>> {
    let taps = geometry.kernel * geometry.kernel;
    let convolve = || {
        let kernel =
            Kernel { weight: single(weight), along: taps, across: taps * geometry.channels.0, is_flipped: false };
        let (x, bias, flat) = (single(x), bias.map(single), Flat::of(geometry));
        from_single(for_planes!(matmul_precision(), convolve(x, kernel, bias, flat)))
    };
    suits::<T>(geometry).then(convolve)
}

/// The gradient of the input; `flipped` is the geometry of the convolution from dy back to x, the weight stays as it is.
pub fn input_gradient<T: Real>(dy: &[T], weight: &[T], flipped: Geometry) -> Option<Vec<T>> {
    let taps = flipped.kernel * flipped.kernel;
    let convolve = || {
        let kernel =
            Kernel { weight: single(weight), along: taps * flipped.channels.1, across: taps, is_flipped: true };
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

/// A weight as a right factor: strides along and across the sum.
#[derive(Clone, Copy)]
struct Kernel<'a> {
    weight: &'a [f32],
    along: usize,
    across: usize,
    /// Turned round in both directions.
    is_flipped: bool,
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
    let places = flat.pixels(flat.pixels);
    parallel::map(images * rows, 4, |rows_of_all| {
        for row in rows_of_all {
            let (image, row) = (row / rows, row % rows);
            for position in row * flat.pitch..(row + 1) * flat.pitch {
                let to = (image * flat.pixels + position) * sum.blocks;
                let pixel = places[position].map(|pixel| &x[(image * h * w + pixel) * c..][..c]);
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
    let steps: Vec<Step> = (0..flat.taps())
        .flat_map(|tap| (0..sum.blocks).map(move |block| (tap, block)))
        .map(|(tap, block)| {
            let right = (tap * sum.blocks + block) * PLANES * size_of::<Tile>();
            ((flat.reach(tap) * sum.blocks + block) * line, right)
        })
        .collect();
    let work = Convolution {
        flat,
        steps,
        rows_each: flat.used.div_ceil(SIDE),
        outputs: flat.outputs(flat.used.next_multiple_of(SIDE)),
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
    /// Taps times blocks of channels.
    steps: Vec<Step>,
    /// Rows of tiles a picture.
    rows_each: usize,
    /// The output at each position of a picture.
    outputs: Vec<Option<usize>>,
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
        let steps = self.steps.len();
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
                    let own = steps * PLANES;
                    let right =
                        Tiles::whole([2 * column, 2 * column + 1].map(|column| self.right.wrapping_add(column * own)));
                    for row in (first..last).step_by(2) {
                        let height = 2.min(last - row);
                        let own = &mut outputs[2 * (row - first)..][..2 * height];
                        let mut places = [(std::ptr::null_mut(), 0); 4];
                        for (place, tile) in places.iter_mut().zip(own.iter_mut()) {
                            *place = (tile.0.as_mut_ptr().cast(), 64);
                        }
                        let (start, row_stride, plane_stride) = self.left;
                        let starts = [row, row + 1].map(|row| start.wrapping_add(self.position(row) * row_stride));
                        let left = Tiles { starts, row_stride, plane_stride };
                        let (steps, out) = (&self.steps[panel_steps.clone()], (places, panel > 0));
                        // SAFETY: rows of the packed pixels reach 15 pixels beyond the last picture.
                        unsafe { registers.multiply_some::<PLANES>((height, width), steps, (left, right), out) };
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
            if let Some(output) = self.outputs[first + i] {
                // SAFETY: the tile has 16 values a row; the output's pixel has `out` from this address less `channel` on.
                unsafe {
                    let sum = _mm512_add_ps(_mm512_load_ps(values.as_ptr().cast()), bias);
                    _mm512_mask_storeu_ps(self.y.at((image * h * w + output) * out + channel), mask, sum);
                }
            }
        }
    }
}

/// The gradient of the outputs as a left factor, `[row of tiles][picture][block][plane]`: 16 channels at 32 positions.
fn packed_gradient<const PLANES: usize>(dy: &[f32], flat: Flat, blocks: usize) -> Vec<Tile> {
    let Geometry { images, output: (h, w), channels: (_, out), .. } = flat.geometry;
    let rows = out.div_ceil(SIDE);
    let own = images * blocks * PLANES;
    let mut tiles = unwritten_lines::<Tile>(rows * own);
    let tiles_at = Disjoint::new(&mut tiles);
    let places = flat.outputs(blocks * 2 * SIDE);
    parallel::map(images * blocks, 1, |parts| {
        for part in parts {
            let (image, first) = (part / blocks, part % blocks * 2 * SIDE);
            for row in 0..rows {
                let mask = ((1u32 << SIDE.min(out - row * SIDE)) - 1) as u16;
                let from = |output: usize| &raw const dy[(image * h * w + output) * out + row * SIDE];
                let pixel = |i: usize| places[first + i].map(from);
                // SAFETY: the unit is there, and with it AVX-512; the mask ends at the pixel's channels; these tiles are
                // this thread's.
                unsafe {
                    let to = std::slice::from_raw_parts_mut(tiles_at.at(row * own + part * PLANES), PLANES);
                    pack_turned::<PLANES>(pixel, mask, to);
                }
            }
        }
    });
    tiles
}

/// 32 pixels of 16 channels, turned.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn pack_turned<const PLANES: usize>(pixel: impl Fn(usize) -> Option<*const f32>, mask: u16, to: &mut [Tile]) {
    for half in 0..2 {
        let mut pixels = [_mm512_setzero_ps(); SIDE];
        for (i, values) in pixels.iter_mut().enumerate() {
            if let Some(from) = pixel(half * SIDE + i) {
                // SAFETY: the caller's contract.
                *values = unsafe { _mm512_maskz_loadu_ps(mask, from) };
            }
        }
        for (channel, values) in transposed(pixels).into_iter().enumerate() {
            split_one::<PLANES>(values, |plane, values| {
                let row = to[plane].0[channel * SIDE + half * SIDE / 2..].as_mut_ptr();
                // SAFETY: half a row of a tile is 32 bytes.
                unsafe { _mm256_store_si256(row.cast(), values) };
            });
        }
    }
}

/// The pictures as a right factor, in pairs of neighbouring positions: `[parity][plane][picture][column of tiles][pair]`, a line
/// of 16 channels each. Parity 0 has the pairs that begin at even positions, 1 those at odd ones, so that the tile for
/// any tap begins at a line. 0 wherever there is no pixel: what it is multiplied with is 0 there too, but must not be 0
/// times anything else.
fn packed_pairs<const PLANES: usize>(x: &[f32], flat: Flat, n_pairs: usize) -> Vec<Line> {
    let Geometry { images, input: (h, w), channels: (c, _), .. } = flat.geometry;
    let columns = c.div_ceil(SIDE);
    let plane = images * columns * n_pairs;
    let mut lines = unwritten_lines::<Line>(2 * PLANES * plane);
    let lines_at = Disjoint::new(&mut lines);
    let places = flat.pixels(2 * n_pairs + 1);
    parallel::map(images * columns, 1, |parts| {
        for part in parts {
            let (image, channel) = (part / columns, part % columns * SIDE);
            let mask = ((1u32 << SIDE.min(c - channel)) - 1) as u16;
            let from = |pixel: usize| &raw const x[(image * h * w + pixel) * c + channel];
            for parity in 0..2 {
                let to = lines_at.at(parity * PLANES * plane + part * n_pairs);
                let pixel = |i: usize| places[i + parity].map(from);
                // SAFETY: the unit is there, and with it AVX-512; the mask ends at the pixel's channels; these lines of
                // every plane are this thread's.
                unsafe { pack_pairs::<PLANES>(pixel, mask, n_pairs, (to, plane)) };
            }
        }
    });
    lines
}

/// Pairs of pixels of 16 channels.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn pack_pairs<const PLANES: usize>(
    pixel: impl Fn(usize) -> Option<*const f32>,
    mask: u16,
    n_pairs: usize,
    (to, plane_stride): (*mut Line, usize),
) {
    for pair in 0..n_pairs {
        let load = |i: usize| match pixel(i) {
            // SAFETY: the caller's contract.
            Some(from) => unsafe { _mm512_maskz_loadu_ps(mask, from) },
            None => _mm512_setzero_ps(),
        };
        split::<PLANES>(load(2 * pair), load(2 * pair + 1), |plane, pairs| {
            // SAFETY: the caller's lines.
            unsafe { _mm512_store_si512(to.add(plane * plane_stride + pair).cast(), pairs) };
        });
    }
}

/// The gradient of the weight: for each tap, the sum over all positions of dy times x there.
fn correlate<const PLANES: usize>(dy: &[f32], x: &[f32], flat: Flat) -> Vec<f32> {
    let Geometry { images, channels: (c, out), .. } = flat.geometry;
    let (taps, blocks) = (flat.taps(), flat.used.div_ceil(2 * SIDE));
    let (rows, columns) = (out.div_ceil(SIDE), c.div_ceil(SIDE));
    let n_pairs = blocks * SIDE + flat.reach(taps - 1) / 2;
    let gradient = packed_gradient::<PLANES>(dy, flat, blocks);
    let pixels = packed_pairs::<PLANES>(x, flat, n_pairs);
    let line = size_of::<Line>();
    let plane = images * columns * n_pairs; // lines
    let steps: Vec<Step> = (0..images)
        .flat_map(|image| (0..blocks).map(move |block| (image, block)))
        .map(|(image, block)| {
            let left = (image * blocks + block) * PLANES * size_of::<Tile>();
            (left, (image * columns * n_pairs + block * SIDE) * line)
        })
        .collect();
    let n_panels = (steps.len() * PLANES * (rows + columns)).div_ceil(2 * PANEL);
    let (left_at, right_at) = (Disjoint::reading(&gradient), Disjoint::reading(&pixels));
    let (padded_out, padded_c) = (rows * SIDE, columns * SIDE);
    let mut sums = unwritten::<f32>(taps * padded_out * padded_c); // [tap, out, c]
    let sums_at = Disjoint::new(&mut sums);
    let pairs = rows.div_ceil(2);
    parallel::map(taps * pairs, 1, |parts| {
        // SAFETY: the unit is there.
        let registers = unsafe { Registers::new(SIDE) };
        for panel in 0..n_panels {
            let steps = &steps[parallel::range(steps.len(), n_panels, panel)];
            for part in parts.clone() {
                let (tap, row) = (part / pairs, part % pairs * 2);
                let left = [row, row + 1].map(|row| left_at.at(row * images * blocks * PLANES).cast_const());
                let left = Tiles::whole(left);
                for column in (0..columns).step_by(2) {
                    let reach = flat.reach(tap);
                    let first = |column: usize| reach % 2 * PLANES * plane + column * n_pairs + reach / 2;
                    let starts = [column, column + 1].map(|c| right_at.at(first(c)).cast_const().cast());
                    let right = Tiles { starts, row_stride: line, plane_stride: plane * line };
                    let size = (2.min(rows - row), 2.min(columns - column));
                    let places = [0, 1, 2, 3].map(|i: usize| {
                        let (row, column) = ((row + i / 2) * SIDE, (column + i % 2) * SIDE);
                        (sums_at.at((tap * padded_out + row) * padded_c + column).cast(), padded_c * 4)
                    });
                    // SAFETY: the tiles lie inside the packed factors and, those in use, inside the sums of this part.
                    unsafe { registers.multiply_some::<PLANES>(size, steps, (left, right), (places, panel > 0)) };
                }
            }
        }
    });
    let mut dw = unwritten(taps * c * out);
    parallel::for_rows(&mut dw, c * taps, 1, |outputs, dw| {
        for (output, dw) in outputs.zip(dw.chunks_exact_mut(c * taps)) {
            // SAFETY: the unit is there, and with it AVX-512.
            unsafe { gather_weights(&sums[output * padded_c..], (padded_out, padded_c), taps, dw) };
        }
    });
    dw
}

/// The weights `[c, tap]` of an output from its sums `[tap, (out), c]`: turned, 16 channels of up to 16 taps at a time.
#[target_feature(enable = "avx512f")]
unsafe fn gather_weights(sums: &[f32], (padded_out, padded_c): (usize, usize), taps: usize, dw: &mut [f32]) {
    for first_tap in (0..taps).step_by(SIDE) {
        let width = SIDE.min(taps - first_tap);
        let mask = ((1u32 << width) - 1) as u16;
        for first in (0..dw.len() / taps).step_by(SIDE) {
            let mut rows = [_mm512_setzero_ps(); SIDE];
            for (tap, row) in rows.iter_mut().enumerate().take(width) {
                // SAFETY: rows of the sums are padded to whole tiles.
                *row = unsafe { _mm512_loadu_ps(&raw const sums[(first_tap + tap) * padded_out * padded_c + first]) };
            }
            let channels = dw[first * taps..].chunks_exact_mut(taps);
            for (values, dw) in transposed(rows).into_iter().zip(channels) {
                // SAFETY: a channel has `taps` weights.
                unsafe { _mm512_mask_storeu_ps(dw[first_tap..].as_mut_ptr(), mask, values) };
            }
        }
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
            let taps = kernel * kernel;
            let turned = Kernel { weight: &weight, along: taps * c, across: taps, is_flipped: true };
            let kernel = Kernel { weight: &weight, along: taps, across: taps * c, is_flipped: false };
            let flipped = Flat::of(geometry.flipped().unwrap());
            let found = [
                convolve::<3>(&x, kernel, Some(&bias), Flat::of(geometry)),
                convolve::<3>(&dy, turned, None, flipped),
                correlate::<3>(&dy, &x, Flat::of(geometry)),
            ];
            for (name, (found, expected)) in ["y", "dx", "dw"].into_iter().zip(found.iter().zip(&expected)) {
                let largest = expected.iter().fold(0f64, |max, v| max.max(v.abs()));
                let error = found.iter().zip(expected).fold(0f64, |max, (a, b)| max.max((f64::from(*a) - b).abs()));
                assert!(error < 1e-6 * largest, "{name} of {images}x{h}x{w}x{c} to {out}: {:e}", error / largest);
            }
        }
    }
}

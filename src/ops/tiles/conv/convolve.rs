//! The sum over taps and channels of pixels times weights: outputs, and the input's gradient.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::memory::{Line, unwritten_lines};
use super::super::pack::{Factor, Side, Sum, first_lanes, store_planes};
use super::super::unit::{Registers, Step, Tiles};
use super::super::{EMPTY, SIDE, Tile};
use super::{Flat, PANEL};
use crate::ops::buffer::unwritten;
use crate::ops::conv::Geometry;
use crate::ops::parallel::{self, Disjoint};

/// Rows of output tiles that a thread keeps while it goes through the panels.
const CHUNK: usize = 16;

/// A weight as a right factor: strides along and across the sum.
#[derive(Clone, Copy)]
pub struct Kernel<'a> {
    weight: &'a [f32],
    along: usize,
    across: usize,
    /// Turned round in both directions.
    is_flipped: bool,
}

impl<'a> Kernel<'a> {
    /// `[out, c, k, k]`, as the convolution uses it.
    pub fn forward(weight: &'a [f32], geometry: Geometry) -> Self {
        let taps = geometry.kernel * geometry.kernel;
        Self { weight, along: taps, across: taps * geometry.channels.0, is_flipped: false }
    }

    /// The same weight from the outputs back to the inputs; `flipped` is the geometry of that convolution.
    pub fn backward(weight: &'a [f32], flipped: Geometry) -> Self {
        let taps = flipped.kernel * flipped.kernel;
        Self { weight, along: taps * flipped.channels.1, across: taps, is_flipped: true }
    }
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
            let first = row * flat.pitch;
            for (place, position) in places[first..first + flat.pitch].iter().zip(first..) {
                let to = (image * flat.pixels + position) * sum.blocks;
                let pixel = place.map(|pixel| &x[(image * h * w + pixel) * c..][..c]);
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
                _mm512_maskz_loadu_ps(first_lanes(places), pixel.as_ptr().wrapping_add(place))
            },
            None => _mm512_setzero_ps(),
        };
        let first = block * 2 * sum.pairs;
        // SAFETY: the caller's lines.
        unsafe { store_planes::<PLANES>(half(first), half(first + sum.pairs), to.add(block), plane_stride) };
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
pub fn convolve<const PLANES: usize>(x: &[f32], kernel: Kernel, bias: Option<&[f32]>, flat: Flat) -> Vec<f32> {
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
        left: (Disjoint::reading(&pixels), sum.blocks, (images * flat.pixels + SIDE) * sum.blocks),
        right: Disjoint::reading(&tiles),
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
    /// The packed pixels, and lines from pixel to pixel and from plane to plane.
    left: (Disjoint<Line>, usize, usize),
    right: Disjoint<Tile>,
    bias: Option<&'a [f32]>,
    y: Disjoint<f32>,
}

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
                    let right = [2 * column, 2 * column + 1].map(|column| self.right.at(column * own).cast_const());
                    let right = Tiles::whole(right);
                    for row in (first..last).step_by(2) {
                        let height = 2.min(last - row);
                        let own = &mut outputs[2 * (row - first)..][..2 * height];
                        let mut places = [(std::ptr::null_mut(), 0); 4];
                        for (place, tile) in places.iter_mut().zip(own.iter_mut()) {
                            *place = (tile.0.as_mut_ptr().cast(), 64);
                        }
                        let (pixels, pixel, plane) = &self.left;
                        let starts =
                            [row, row + 1].map(|row| pixels.at(self.position(row) * pixel).cast_const().cast());
                        let line = size_of::<Line>();
                        let left = Tiles { starts, row_stride: pixel * line, plane_stride: plane * line };
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
        let mask = first_lanes(SIDE.min(out - channel));
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

//! The gradient of the weight: sums over positions.

use std::arch::x86_64::*;

use super::super::memory::{Line, unwritten_lines};
use super::super::pack::{first_lanes, split_one, store_planes, transposed};
use super::super::unit::{Registers, Step, Tiles};
use super::super::{SIDE, Tile};
use super::{Flat, PANEL};
use crate::ops::buffer::unwritten;
use crate::ops::conv::Geometry;
use crate::ops::parallel::{self, Disjoint};

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
                let mask = first_lanes(SIDE.min(out - row * SIDE));
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
            let mask = first_lanes(SIDE.min(c - channel));
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
        // SAFETY: the caller's lines.
        unsafe { store_planes::<PLANES>(load(2 * pair), load(2 * pair + 1), to.add(pair), plane_stride) };
    }
}

/// The gradient of the weight: for each tap, the sum over all positions of dy times x there.
pub fn correlate<const PLANES: usize>(dy: &[f32], x: &[f32], flat: Flat) -> Vec<f32> {
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
        let mask = first_lanes(width);
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

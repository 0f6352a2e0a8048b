//! Transforms of the tiles of pictures and of their gradients, and the way back.

#![allow(clippy::needless_range_loop)] // two indices run side by side

use std::ops::Range;

use super::grid;
use crate::ops::conv::Geometry;
use crate::ops::lanes::{LANES, Lanes};
use crate::ops::parallel::Disjoint;
use crate::ops::real::{Real, vectorised};

/// Values from one point to the next of n transformed tiles. A little more than they are, or the 16 points of a tile would
/// share a few sets of the first-level cache where n·width is a power of two.
pub fn stride(n: usize, width: usize) -> usize {
    n * width + LANES
}

/// Bᵀ·d.
#[inline(always)]
fn mix_input<T: Real>(d: [Lanes<T>; 4]) -> [Lanes<T>; 4] {
    [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]
}

/// Aᵀ·m.
#[inline(always)]
fn mix_output<T: Real>(m: [Lanes<T>; 4]) -> [Lanes<T>; 2] {
    [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
}

/// A·d.
#[inline(always)]
fn spread_gradient<T: Real>(d: [Lanes<T>; 2]) -> [Lanes<T>; 4] {
    [d[0], d[0] + d[1], d[0] - d[1], Lanes::all(T::ZERO) - d[1]]
}

/// Where a tile begins: image, and the first row and column of its output.
pub fn origin(tile: usize, geometry: Geometry) -> (usize, usize, usize) {
    let (rows, columns) = grid(geometry);
    (tile / (rows * columns), tile / columns % rows * 2, tile % columns * 2)
}

vectorised! {
    /// Bᵀ·d·B of the tiles at some input channels, `[16, n, channels]`.
    pub fn input_tiles[T: Real](
        v: &mut [T], x: &[T], channels: Range<usize>, tiles: (usize, usize), geometry: Geometry,
    ) {
        let (first, n) = tiles;
        let (all, c) = (geometry.channels.0, channels.len());
        let (h, w) = geometry.input;
        for tile in 0..n {
            let (image, row, column) = origin(first + tile, geometry);
            let (top, left) = (row as isize - geometry.conv.pad[0] as isize, column as isize - geometry.conv.pad[2] as isize);
            // A pixel outside the picture is 0.
            let mut pixels: [[&[T]; 4]; 4] = [[&[]; 4]; 4];
            for (i, pixels) in pixels.iter_mut().enumerate() {
                for (j, pixel) in pixels.iter_mut().enumerate() {
                    let (y, x_at) = (top + i as isize, left + j as isize);
                    if y >= 0 && x_at >= 0 && (y as usize) < h && (x_at as usize) < w {
                        *pixel = &x[((image * h + y as usize) * w + x_at as usize) * all..][channels.clone()];
                    }
                }
            }
            for channel in (0..c).step_by(LANES) {
                let mut tall = [[Lanes::all(T::ZERO); 4]; 4];
                for j in 0..4 {
                    let at = |i: usize| Lanes::load(pixels[i][j], channel);
                    tall[j] = mix_input([at(0), at(1), at(2), at(3)]);
                }
                for i in 0..4 {
                    let points = mix_input([tall[0][i], tall[1][i], tall[2][i], tall[3][i]]);
                    for j in 0..4 {
                        let row = (i * 4 + j) * stride(n, c) + tile * c;
                        points[j].store(&mut v[row + channel..row + c.min(channel + LANES)]);
                    }
                }
            }
        }
    }
}

vectorised! {
    /// Aᵀ·m·A + bias of the tiles into these columns of y; m is `[16, n, columns]`.
    pub fn output_tiles[T: Real](
        y: &Disjoint<T>, m: &[T], bias: Option<&[T]>, columns: Range<usize>, tiles: (usize, usize),
        geometry: Geometry,
    ) {
        let (first, n) = tiles;
        let (out, width) = (geometry.channels.1, columns.len());
        let (h, w) = geometry.output;
        let bias = bias.map_or(&[] as &[T], |bias| &bias[columns.clone()]);
        for tile in 0..n {
            let (image, row, column) = origin(first + tile, geometry);
            for channel in (0..width).step_by(LANES) {
                let mut tall = [[Lanes::all(T::ZERO); 2]; 4];
                for j in 0..4 {
                    let at = |i: usize| Lanes::load(&m[(i * 4 + j) * stride(n, width) + tile * width..][..width], channel);
                    tall[j] = mix_output([at(0), at(1), at(2), at(3)]);
                }
                let bias = Lanes::load(bias, channel);
                for i in 0..2 {
                    let pair = mix_output([tall[0][i], tall[1][i], tall[2][i], tall[3][i]]);
                    for j in 0..2 {
                        if row + i < h && column + j < w {
                            let to = ((image * h + row + i) * w + column + j) * out + columns.start + channel;
                            let some = LANES.min(width - channel);
                            // SAFETY: the pixels of this tile are this thread's; the channels end at `out`.
                            (pair[j] + bias).store(unsafe { std::slice::from_raw_parts_mut(y.at(to), some) });
                        }
                    }
                }
            }
        }
    }
}

vectorised! {
    /// A·dy·Aᵀ of the tiles at some output channels, `[16, n, columns]`.
    pub fn gradient_tiles[T: Real](
        z: &mut [T], dy: &[T], columns: Range<usize>, tiles: (usize, usize), geometry: Geometry,
    ) {
        let (first, n) = tiles;
        let (out, width) = (geometry.channels.1, columns.len());
        let (h, w) = geometry.output;
        for tile in 0..n {
            let (image, row, column) = origin(first + tile, geometry);
            let mut pixels: [[&[T]; 2]; 2] = [[&[]; 2]; 2];
            for (i, pixels) in pixels.iter_mut().enumerate() {
                for (j, pixel) in pixels.iter_mut().enumerate() {
                    if row + i < h && column + j < w {
                        *pixel = &dy[((image * h + row + i) * w + column + j) * out..][columns.clone()];
                    }
                }
            }
            for channel in (0..width).step_by(LANES) {
                let mut tall = [[Lanes::all(T::ZERO); 4]; 2];
                for j in 0..2 {
                    tall[j] = spread_gradient([Lanes::load(pixels[0][j], channel), Lanes::load(pixels[1][j], channel)]);
                }
                for i in 0..4 {
                    let points = spread_gradient([tall[0][i], tall[1][i]]);
                    for j in 0..4 {
                        let row = (i * 4 + j) * stride(n, width) + tile * width;
                        points[j].store(&mut z[row + channel..row + width.min(channel + LANES)]);
                    }
                }
            }
        }
    }
}

//! Winograd's products on the tile unit: the weight is packed once, and what is transformed goes straight into bf16 planes.
//! In full precision only: in less, its sums would lose what precision is left.
//!
//! The 16 points of a tile are taken a row of four at a time: what four points of a block of tiles need stays in the
//! second-level cache, where that of all 16 would go to and fro between it and the third.

mod transforms;

use std::ops::Range;

use candle_core::DType;

use self::transforms::{add_outputs, pack_left, pack_right, pack_tiles};
use super::memory::{from_single, single, with_scratch};
use super::pack::{Factor, Side, Sum};
use super::unit::{Registers, Step, Tiles, available};
use super::{SIDE, Tile, steps};
use crate::ops::buffer::unwritten;
use crate::ops::conv::Geometry;
use crate::ops::parallel::{self, Disjoint};
use crate::ops::precision::{Precision, matmul_precision};
use crate::ops::real::Real;
use crate::ops::winograd::{POINTS, Pass, gathered, origin, tiles, transformed};

const PLANES: usize = 3;

/// Points in a row.
const ROW: usize = 4;

/// Whether the unit is there and a row of the transformed weight's points leaves room in the second-level cache.
fn suits<T: Real>(geometry: Geometry) -> bool {
    let is_small = geometry.channels.0 * geometry.channels.1 <= 65_536;
    T::DTYPE == DType::F32 && is_small && matmul_precision() == Precision::Highest && available()
}

/// Where a tile's output begins: image, row, column.
type Origin = (usize, usize, usize);

/// Of these tiles. Divided out for each of them time and again, they would cost as much as the transforms.
fn origins(tiles: Range<usize>, geometry: Geometry) -> Vec<Origin> {
    tiles.map(|tile| origin(tile, geometry)).collect()
}

/// How many tiles of a picture are taken at a time, a multiple of `step`, for `bytes` each.
fn block(bytes: usize, step: usize) -> usize {
    const CACHE_BYTES: usize = 3 << 18;
    (CACHE_BYTES / bytes / step).max(1) * step
}

/// Calls `$f::<I>(..)` for a row of points known at run time.
macro_rules! for_row {
    ($row:expr, $f:ident($($argument:expr),*)) => {
        match $row {
            0 => $f::<0>($($argument),*),
            1 => $f::<1>($($argument),*),
            2 => $f::<2>($($argument),*),
            _ => $f::<3>($($argument),*),
        }
    };
}

/// The convolution of x, or the input's gradient; None where this does not suit.
pub fn convolve<T: Real>(x: &[T], weight: &[T], bias: Option<&[T]>, geometry: Geometry, pass: Pass) -> Option<Vec<T>> {
    suits::<T>(geometry).then(|| from_single(multiply(single(x), single(weight), bias.map(single), geometry, pass)))
}

fn multiply(x: &[f32], weight: &[f32], bias: Option<&[f32]>, geometry: Geometry, pass: Pass) -> Vec<f32> {
    let (c, out) = geometry.channels;
    let (sum, columns) = (Sum::of(c), out.div_ceil(SIDE));
    let own = sum.blocks * PLANES;
    let steps = steps::<PLANES>(sum.blocks);
    let width = columns * SIDE;
    let zeros = vec![0f32; c.max(width)];
    let bias = bias.unwrap_or(&zeros);
    with_packed_weight(weight, geometry, (pass, sum), |u| {
        let mut y = unwritten(geometry.positions() * out);
        let y_at = Disjoint::new(&mut y);
        parallel::map(tiles(geometry), SIDE, |tiles| {
            let most = block(ROW * (6 * c + 4 * width), SIDE).min(tiles.len().next_multiple_of(SIDE));
            let mut m = unwritten(ROW * most * width); // [4, most, width]
            with_scratch(ROW * most / SIDE * own, |v| {
                let v_at = Disjoint::new(v);
                for first in tiles.clone().step_by(most) {
                    let origins = origins(first..tiles.end.min(first + most), geometry);
                    let rows = origins.len().div_ceil(SIDE);
                    for i in 0..POINTS / ROW {
                        // SAFETY (all): the unit is there, and with it AVX-512; the scratch holds four points of `most`
                        // tiles, m whole tiles of as many outputs; y's positions belong to one tile each, and to one thread.
                        unsafe { for_row!(i, pack_tiles(x, &zeros, &origins, geometry, (sum, &v_at))) };
                        let registers = unsafe { Registers::new(sum.pairs) };
                        for j in 0..ROW {
                            let left = (v_at.at(j * rows * own).cast_const(), rows);
                            let right = (u[(i * ROW + j) * columns * own..].as_ptr(), columns);
                            let target = (m[j * most * width..].as_mut_ptr(), width);
                            unsafe { products(&registers, &steps, left, right, (target, false)) };
                        }
                        drop(registers);
                        let m = (&m[..], most * width, width);
                        unsafe { for_row!(i, add_outputs(&y_at, m, bias, &origins, geometry)) };
                    }
                }
            });
        });
        y
    })
}

/// Calls `f` with the transformed weight as tiles, `[point][column of tiles][block][plane]`.
fn with_packed_weight<R>(
    weight: &[f32],
    geometry: Geometry,
    (pass, sum): (Pass, Sum),
    f: impl FnOnce(&[Tile]) -> R,
) -> R {
    let (c, out) = geometry.channels;
    let channels = if pass == Pass::Forward { (c, out) } else { (out, c) };
    let u = transformed(weight, channels, pass); // [16, out, c] as the weight has them
    let (across, along) = if pass == Pass::Forward { (c, 1) } else { (1, out) };
    let (columns, own) = (out.div_ceil(SIDE), sum.blocks * PLANES);
    with_scratch(POINTS * columns * own, |packed| {
        let packed_at = Disjoint::new(packed);
        parallel::map(POINTS * columns, 4, |items| {
            for item in items {
                let (point, column) = (item / columns, item % columns);
                let start = u[point * c * out..].as_ptr();
                let factor = Factor { start, across, along, count: out, side: Side::Right };
                // SAFETY: the unit is there; the factor lies inside u; these tiles are this item's alone.
                unsafe {
                    let to = std::slice::from_raw_parts_mut(packed_at.at(item * own), own);
                    factor.pack::<PLANES>(sum, 1.0, (column..column + 1, 0..sum.blocks), to);
                }
            }
        });
        f(packed)
    })
}

/// All rows of tiles of a left factor times all columns of a right one, whose tiles for all steps lie side by side.
///
/// # Safety
/// The unit is there, the tiles are, and the output has room for whole tiles.
unsafe fn products(
    registers: &Registers,
    steps: &[Step],
    (left, rows): (*const Tile, usize),
    (right, columns): (*const Tile, usize),
    ((out, stride), add): ((*mut f32, usize), bool),
) {
    let own = steps.len() * PLANES;
    let pair = |start: *const Tile, i: usize| Tiles::whole([i, i + 1].map(|i| start.wrapping_add(i * own)));
    for column in (0..columns).step_by(2) {
        for row in (0..rows).step_by(2) {
            let size = (2.min(rows - row), 2.min(columns - column));
            let places = [0, 1, 2, 3].map(|i| {
                let at = (row + i / 2) * SIDE * stride + (column + i % 2) * SIDE;
                (out.wrapping_add(at).cast(), stride * size_of::<f32>())
            });
            // SAFETY: the caller's contract; tiles beyond `size` are not touched.
            unsafe {
                registers.multiply_some::<PLANES>(size, steps, (pair(left, row), pair(right, column)), (places, add));
            }
        }
    }
}

/// Tiles of a picture that a tile of a factor holds along the sum.
const ALONG: usize = 2 * SIDE;

/// dy `[images, h', w', out]`, x `[images, h, w, c]` → `[out, c, 3, 3]`; None where this does not suit.
pub fn weight_gradient<T: Real>(dy: &[T], x: &[T], geometry: Geometry) -> Option<Vec<T>> {
    let (c, out) = geometry.channels;
    let is_whole = c.is_multiple_of(SIDE) && out.is_multiple_of(SIDE);
    (is_whole && suits::<T>(geometry)).then(|| from_single(correlate(single(dy), single(x), geometry)))
}

fn correlate(dy: &[f32], x: &[f32], geometry: Geometry) -> Vec<f32> {
    let (c, out) = geometry.channels;
    let points = POINTS * out * c;
    // A sum of its own for each thread; none for fewer tiles of a picture than fill two of the unit's.
    let parts = parallel::parts(tiles(geometry), 2 * ALONG);
    let mut du = unwritten(parts * points); // [parts, 16, out, c]
    let du_at = Disjoint::new(&mut du);
    parallel::map(parts, 1, |range| {
        for part in range {
            let own = parallel::range(tiles(geometry), parts, part);
            // SAFETY: this part of du is this thread's.
            let du = unsafe { std::slice::from_raw_parts_mut(du_at.at(part * points), points) };
            correlate_tiles((dy, x), own, geometry, du);
        }
    });
    gathered(&du, geometry.channels)
}

fn correlate_tiles((dy, x): (&[f32], &[f32]), tiles: Range<usize>, geometry: Geometry, du: &mut [f32]) {
    let (c, out) = geometry.channels;
    let zeros = vec![0f32; c.max(out)];
    let (rows, columns) = (out / SIDE, c / SIDE);
    let most = block(ROW * 6 * (c + out), ALONG).min(tiles.len().next_multiple_of(ALONG));
    let per_point = most / ALONG * PLANES; // tiles of a row or column of tiles
    with_scratch(ROW * (rows + columns) * per_point, |scratch| {
        let (z, v) = scratch.split_at_mut(ROW * rows * per_point);
        let (z_at, v_at) = (Disjoint::new(z), Disjoint::new(v));
        for i in 0..POINTS / ROW {
            for first in tiles.clone().step_by(most) {
                let origins = origins(first..tiles.end.min(first + most), geometry);
                let blocks = origins.len().div_ceil(ALONG);
                // SAFETY (all): the unit is there, and with it AVX-512; the scratch holds four points of `most` tiles; the
                // factors are whole tiles, and so is each point of du.
                unsafe {
                    for_row!(i, pack_right(x, &zeros, &origins, geometry, &v_at));
                    for_row!(i, pack_left(dy, &zeros, &origins, geometry, &z_at));
                }
                let steps = steps::<PLANES>(blocks);
                let registers = unsafe { Registers::new(SIDE) };
                for j in 0..ROW {
                    let own = blocks * PLANES;
                    let left = (z_at.at(j * rows * own).cast_const(), rows);
                    let right = (v_at.at(j * columns * own).cast_const(), columns);
                    let target = (du[(i * ROW + j) * out * c..].as_mut_ptr(), c);
                    unsafe { products(&registers, &steps, left, right, (target, first > tiles.start)) };
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::conv::Conv2d;
    use crate::ops::winograd;
    use crate::rng::Rng;

    /// The portable way in f64 is the slow twin.
    #[test]
    fn convolutions_and_their_gradients_are_the_portable_ones() {
        if !available() {
            return; // Every other test runs the portable way.
        }
        // Images, height, width, channels in and out, padding.
        for (images, h, w, c, out, pad) in [
            (48, 8, 8, 128, 128, [1; 4]),
            (3, 9, 11, 33, 40, [1; 4]),
            (40, 4, 4, 16, 48, [1; 4]),
            (2, 21, 6, 96, 17, [0, 2, 1, 1]),
            (1, 14, 15, 48, 32, [0; 4]),
        ] {
            let output = (h + pad[0] + pad[1] - 2, w + pad[2] + pad[3] - 2);
            let conv = Conv2d { stride: 1, pad };
            let geometry = Geometry { images, input: (h, w), output, channels: (c, out), kernel: 3, conv };
            let back = geometry.flipped().unwrap();
            let mut rng = Rng::new(6, "winograd on tiles", (h * w * c) as u64);
            let mut draw = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
            let (x, weight, bias) = (draw(images * h * w * c), draw(out * c * 9), draw(out));
            let dy = draw(geometry.positions() * out);
            let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
            let (x64, w64, b64, dy64) = (wide(&x), wide(&weight), wide(&bias), wide(&dy));
            let check = |name: &str, found: Vec<f32>, expected: Vec<f64>| {
                assert_eq!(found.len(), expected.len());
                let largest = expected.iter().fold(0f64, |max, v| max.max(v.abs()));
                let error = found.iter().zip(&expected).fold(0f64, |max, (a, b)| max.max((f64::from(*a) - b).abs()));
                assert!(error < 2e-6 * largest, "{name} of {images}x{h}x{w}x{c} to {out}: {:e}", error / largest);
            };
            let y = multiply(&x, &weight, Some(&bias), geometry, Pass::Forward);
            check("y", y, winograd::forward(&x64, &w64, Some(&b64), geometry, None));
            let dx = multiply(&dy, &weight, None, back, Pass::InputGradient);
            check("dx", dx, winograd::input_gradient(&dy64, &w64, back));
            if let Some(dw) = weight_gradient(&dy, &x, geometry) {
                check("dw", dw, winograd::weight_gradient(&dy64, &x64, geometry));
            }
        }
    }
}

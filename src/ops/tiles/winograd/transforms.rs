//! What is transformed, straight into tiles of bf16 planes, and back out of sums: a row of a tile's 4×4 points at a time.

use std::arch::x86_64::*;

use super::super::memory::Line;
use super::super::pack::{Sum, first_lanes, store_planes, transposed};
use super::super::{LINES, SIDE, Tile};
use super::{ALONG, Origin, PLANES, ROW};
use crate::ops::conv::Geometry;
use crate::ops::parallel::Disjoint;

/// Lanes of channels at the points of a row.
type Row = [__m512; ROW];

/// The pixels that row I of a tile's points is made of, two rows of the picture's four; `zeros` outside the picture.
#[inline]
fn input_pixels<const I: usize>(
    x: &[f32],
    (image, row, column): Origin,
    geometry: Geometry,
    zeros: &[f32],
) -> [[*const f32; 4]; 2] {
    let (h, w) = geometry.input;
    let [top, _, left, _] = geometry.conv.pad;
    let rows = match I {
        0 => [0, 2],
        1 => [1, 2],
        2 => [2, 1],
        _ => [1, 3],
    };
    rows.map(|i| {
        std::array::from_fn(|j| {
            // Wrapped round below 0, and so beyond the height or width.
            let (row, column) = ((row + i).wrapping_sub(top), (column + j).wrapping_sub(left));
            let is_inside = row < h && column < w;
            if is_inside {
                x[((image * h + row) * w + column) * geometry.channels.0..].as_ptr()
            } else {
                zeros.as_ptr()
            }
        })
    })
}

/// Row I of Bᵀ·d·B.
///
/// # Safety
/// The machine has AVX-512, and the mask ends at the pixels' channels.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn input_points<const I: usize>(pixels: &[[*const f32; 4]; 2], channel: usize, mask: u16) -> Row {
    let mut d = [_mm512_setzero_ps(); 4];
    for (j, d) in d.iter_mut().enumerate() {
        // SAFETY: the caller's contract.
        let (a, b) = unsafe {
            (
                _mm512_maskz_loadu_ps(mask, pixels[0][j].wrapping_add(channel)),
                _mm512_maskz_loadu_ps(mask, pixels[1][j].wrapping_add(channel)),
            )
        };
        *d = if I == 1 { _mm512_add_ps(a, b) } else { _mm512_sub_ps(a, b) };
    }
    [_mm512_sub_ps(d[0], d[2]), _mm512_add_ps(d[1], d[2]), _mm512_sub_ps(d[2], d[1]), _mm512_sub_ps(d[1], d[3])]
}

/// Row I of the points of these tiles of the input, as a left factor `[point][row of tiles][block][plane]`.
///
/// # Safety
/// The machine has AVX-512, and these tiles are the caller's to write.
#[target_feature(enable = "avx512f,avx512bw")]
pub unsafe fn pack_tiles<const I: usize>(
    x: &[f32],
    zeros: &[f32],
    origins: &[Origin],
    geometry: Geometry,
    (sum, to): (Sum, &Disjoint<Tile>),
) {
    let rows = origins.len().div_ceil(SIDE);
    for (tile, &origin) in origins.iter().enumerate() {
        let pixels = input_pixels::<I>(x, origin, geometry, zeros);
        for block in 0..sum.blocks {
            let first = block * 2 * sum.pairs;
            let [a, b] =
                [first, first + sum.pairs].map(|at| (at, first_lanes(sum.pairs.min(sum.k.saturating_sub(at)))));
            // SAFETY: the masks end at the pixels' channels; the caller's tiles.
            unsafe {
                let (low, high) = (input_points::<I>(&pixels, a.0, a.1), input_points::<I>(&pixels, b.0, b.1));
                for point in 0..ROW {
                    let tile_at = to.at(((point * rows + tile / SIDE) * sum.blocks + block) * PLANES);
                    let line = tile_at.cast::<Line>().add(tile % SIDE);
                    store_planes::<PLANES>(low[point], high[point], line, LINES);
                }
            }
        }
    }
}

/// Adds what row I of the points, `[4, .., width]` in m, gives to the outputs of these tiles: Aᵀ·m·A, the bias once.
///
/// # Safety
/// The machine has AVX-512, m has whole tiles, and these tiles' outputs are the caller's to write.
#[target_feature(enable = "avx512f")]
pub unsafe fn add_outputs<const I: usize>(
    y: &Disjoint<f32>,
    (m, point, width): (&[f32], usize, usize),
    bias: &[f32],
    origins: &[Origin],
    geometry: Geometry,
) {
    let out = geometry.channels.1;
    let (h, w) = geometry.output;
    for (tile, &(image, row, column)) in origins.iter().enumerate() {
        let pixel = |i: usize, j: usize| y.at(((image * h + row + i) * w + column + j) * out);
        let (has_lower, has_right) = (row + 1 < h, column + 1 < w);
        for channel in (0..out).step_by(SIDE) {
            let mask = first_lanes(SIDE.min(out - channel));
            // SAFETY: m has whole tiles; the pixels are inside the picture, and the mask ends at their last channel.
            unsafe {
                let at = m.as_ptr().add(tile * width + channel);
                let [a, b, c, d] = [0, 1, 2, 3].map(|j| at.add(j * point)).map(|at| _mm512_loadu_ps(at));
                let r = [_mm512_add_ps(_mm512_add_ps(a, b), c), _mm512_sub_ps(_mm512_sub_ps(b, c), d)];
                let bias = _mm512_maskz_loadu_ps(mask, bias.as_ptr().add(channel));
                for (j, r) in r.into_iter().enumerate().take(if has_right { 2 } else { 1 }) {
                    if I < 3 {
                        let to = pixel(0, j).add(channel);
                        let held = if I == 0 { bias } else { _mm512_maskz_loadu_ps(mask, to) };
                        _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(held, r));
                    }
                    if I > 0 && has_lower {
                        let to = pixel(1, j).add(channel);
                        let held = if I == 1 { bias } else { _mm512_maskz_loadu_ps(mask, to) };
                        let sum = if I == 1 { _mm512_add_ps(held, r) } else { _mm512_sub_ps(held, r) };
                        _mm512_mask_storeu_ps(to, mask, sum);
                    }
                }
            }
        }
    }
}

/// Row I of the points of these tiles of the input as a right factor along the tiles, `[point][column of tiles][block][plane]`
/// with channels across; 0 beyond the last tile.
///
/// # Safety
/// The machine has AVX-512, channels fill whole tiles, and these tiles are the caller's to write.
#[target_feature(enable = "avx512f,avx512bw")]
pub unsafe fn pack_right<const I: usize>(
    x: &[f32],
    zeros: &[f32],
    origins: &[Origin],
    geometry: Geometry,
    to: &Disjoint<Tile>,
) {
    let (blocks, columns) = (origins.len().div_ceil(ALONG), geometry.channels.0 / SIDE);
    let pixels = |tile: usize| match origins.get(tile) {
        Some(&origin) => input_pixels::<I>(x, origin, geometry, zeros),
        None => [[zeros.as_ptr(); 4]; 2],
    };
    for block in 0..blocks {
        for line in 0..SIDE {
            let tile = block * ALONG + line;
            let (a, b) = (pixels(tile), pixels(tile + SIDE));
            for column in 0..columns {
                // SAFETY: channels are whole columns; the caller's tiles.
                unsafe {
                    let (low, high) =
                        (input_points::<I>(&a, column * SIDE, !0), input_points::<I>(&b, column * SIDE, !0));
                    for point in 0..ROW {
                        let tile_at = to.at(((point * columns + column) * blocks + block) * PLANES);
                        store_planes::<PLANES>(low[point], high[point], tile_at.cast::<Line>().add(line), LINES);
                    }
                }
            }
        }
    }
}

/// Row I of the points of these tiles of the output's gradient, A·dy·Aᵀ, as a left factor along the tiles, `[point][row of
/// tiles][block][plane]` with channels down; 0 beyond the last tile.
///
/// # Safety
/// The machine has AVX-512, channels fill whole tiles, and these tiles are the caller's to write.
#[target_feature(enable = "avx512f,avx512bw")]
pub unsafe fn pack_left<const I: usize>(
    dy: &[f32],
    zeros: &[f32],
    origins: &[Origin],
    geometry: Geometry,
    to: &Disjoint<Tile>,
) {
    let out = geometry.channels.1;
    let (h, w) = geometry.output;
    let (blocks, rows) = (origins.len().div_ceil(ALONG), out / SIDE);
    for block in 0..blocks {
        let mut pixels = [[zeros.as_ptr(); 4]; ALONG];
        for (pixels, (image, row, column)) in pixels.iter_mut().zip(&origins[block * ALONG..]) {
            for (i, pixel) in pixels.iter_mut().enumerate() {
                let (row, column) = (row + i / 2, column + i % 2);
                if row < h && column < w {
                    *pixel = dy[((image * h + row) * w + column) * out..].as_ptr();
                }
            }
        }
        let mut values = [[[_mm512_setzero_ps(); SIDE]; 2]; ROW];
        for row in 0..rows {
            for (i, pixels) in pixels.iter().enumerate() {
                // SAFETY: channels are whole rows.
                let points = unsafe { gradient_points::<I>(pixels, row * SIDE) };
                for (values, point) in values.iter_mut().zip(points) {
                    values[i / SIDE][i % SIDE] = point;
                }
            }
            for (point, [low, high]) in values.iter().enumerate() {
                let (low, high) = (transposed(*low), transposed(*high));
                let lines = to.at(((point * rows + row) * blocks + block) * PLANES).cast::<Line>();
                for i in 0..SIDE {
                    // SAFETY: the caller's tiles.
                    unsafe { store_planes::<PLANES>(low[i], high[i], lines.add(i), LINES) };
                }
            }
        }
    }
}

/// Row I of A·dy·Aᵀ.
///
/// # Safety
/// The machine has AVX-512, and the pixels have 16 channels from this one on.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn gradient_points<const I: usize>(pixels: &[*const f32; 4], channel: usize) -> Row {
    let mut d = [_mm512_setzero_ps(); 2];
    for (j, d) in d.iter_mut().enumerate() {
        // SAFETY: the caller's contract.
        let (a, b) = unsafe {
            (_mm512_loadu_ps(pixels[j].wrapping_add(channel)), _mm512_loadu_ps(pixels[2 + j].wrapping_add(channel)))
        };
        *d = match I {
            0 => a,
            1 => _mm512_add_ps(a, b),
            2 => _mm512_sub_ps(a, b),
            _ => _mm512_sub_ps(_mm512_setzero_ps(), b),
        };
    }
    let [a, b] = d;
    [a, _mm512_add_ps(a, b), _mm512_sub_ps(a, b), _mm512_sub_ps(_mm512_setzero_ps(), b)]
}

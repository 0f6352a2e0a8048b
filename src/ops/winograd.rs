//! 3×3 convolutions at stride 1 by Winograd's minimal filtering F(2×2, 3×3) (Lavin and Gray, 2016): 16 multiplications for
//! 4 outputs in place of 36.
//!
//! With d a 4×4 tile of the input, g a kernel and y a 2×2 tile of the output, y = Aᵀ[(G·g·Gᵀ) ⊙ (Bᵀ·d·B)]A. Summed over input
//! channels, the products ⊙ at each of the 16 points are one matrix product, `[tiles, c]·[c, out]`. The weight's gradient
//! is Gᵀ[Σ (Bᵀ·d·B)ᵀ·(A·dy·Aᵀ)]G with the same 16 products, `[c, tiles]·[tiles, out]`; the input's gradient is the forward
//! pass with the flipped weight. All transforms are sums and halves: in f32 the result stays within a few units in the
//! last place of the direct sum.

#![allow(clippy::needless_range_loop)] // two indices run side by side

use std::ops::Range;

use candle_core::Tensor;

use super::buffer::unwritten;
use super::conv::Geometry;
use super::lanes::{LANES, Lanes};
use super::packed::Packed;
use super::parallel::{self, Disjoint};
use super::product::{Matrix, Panels, Start, matmul, takes_panels};
use super::real::{Real, vectorised};
use super::tiles as unit;

/// Points of a transformed tile.
pub const POINTS: usize = 16;

/// Whether it beats the direct products: enough tiles to pay for transforming the weight, enough channels for the products
/// to outweigh the transforms.
pub fn suits(geometry: Geometry) -> bool {
    let (c, out) = geometry.channels;
    let enough = if geometry.is_wide() { 128 } else { 64 };
    geometry.kernel == 3 && geometry.conv.stride == 1 && c.min(out) >= 16 && tiles(geometry.to_choose_by()) >= enough
}

/// Rows and columns of tiles in a picture.
fn grid(geometry: Geometry) -> (usize, usize) {
    (geometry.output.0.div_ceil(2), geometry.output.1.div_ceil(2))
}

/// Tiles of the whole batch.
pub fn tiles(geometry: Geometry) -> usize {
    let (rows, columns) = grid(geometry);
    geometry.images * rows * columns
}

/// Tiles that a thread transforms at a time where the weight is packed for each block of them: enough that this pays.
const BLOCK: usize = 256;
/// The same where it is packed before: few enough that they stay in the second-level cache beside it.
const SMALL_BLOCK: usize = 64;
/// Values of the largest transformed weight that is packed before.
const PACKED: usize = 1 << 19;

/// Values from one point to the next of n transformed tiles. A little more than they are, or the 16 points of a tile would
/// share a few sets of the first-level cache where n·width is a power of two.
fn stride(n: usize, width: usize) -> usize {
    n * width + LANES
}

/// The tiles of `range` in nearly equal blocks of at most `largest`, (first, number).
fn blocks(range: Range<usize>, largest: usize) -> impl Iterator<Item = (usize, usize)> {
    let parts = range.len().div_ceil(largest);
    (0..parts).map(move |part| {
        let own = parallel::range(range.len(), parts, part);
        (range.start + own.start, own.len())
    })
}

/// How threads share out the work: ranges of output channels times ranges of tiles.
#[derive(Clone, Copy)]
struct Shares {
    columns: usize,
    tiles: usize,
}

impl Shares {
    /// By output channels where that pays, no range narrower than 64; by tiles, at least `tiles_each` of them, where there
    /// are more threads.
    fn of(geometry: Geometry, by_columns: bool, tiles_each: usize) -> Self {
        let threads = parallel::parts(usize::MAX, 1);
        let columns = if by_columns { threads.min(geometry.channels.1.div_ceil(64)) } else { 1 };
        Self { columns, tiles: (threads / columns).min(tiles(geometry).div_ceil(tiles_each)).max(1) }
    }

    /// Calls `f(number of the range of tiles, output channels, tiles)` for every share, in parallel.
    fn for_each(self, geometry: Geometry, f: impl Fn(usize, Range<usize>, Range<usize>) + Sync + Send) {
        parallel::map(self.columns * self.tiles, 1, |parts| {
            for part in parts {
                let (column_part, tile_part) = (part % self.columns, part / self.columns);
                let columns = parallel::range(geometry.channels.1, self.columns, column_part);
                f(tile_part, columns, parallel::range(tiles(geometry), self.tiles, tile_part));
            }
        });
    }
}

/// # Shapes
/// - x `[images, h, w, c]`, weight `[out, c, 3, 3]` → `[images, h', w', out]`
pub fn forward<T: Real>(
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    geometry: Geometry,
    keep: Option<(&Packed, &Tensor)>,
) -> Vec<T> {
    multiply(x, weight, bias, geometry, Pass::Forward, keep)
}

/// The gradient of the input; `flipped` is the geometry of the convolution from dy back to x, the weight stays as it is.
pub fn input_gradient<T: Real>(dy: &[T], weight: &[T], flipped: Geometry) -> Vec<T> {
    multiply(dy, weight, None, flipped, Pass::InputGradient, None)
}

/// What the weight `[out, c, 3, 3]` is multiplied for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    Forward,
    /// With the kernel turned round in both directions, from `out` channels to `c`.
    InputGradient,
}

/// The weight `[out, c, 3, 3]` at the 16 points, `[16, out, c]`.
pub fn transformed<T: Real>(weight: &[T], (c, out): (usize, usize), pass: Pass) -> Vec<T> {
    let mut u = unwritten(POINTS * out * c);
    let u_at = Disjoint::new(&mut u);
    parallel::map(out, 1, |outputs| transform_weight(&u_at, &weight[outputs.start * c * 9..], outputs, (c, out), pass));
    u
}

vectorised! {
    /// G·g·Gᵀ of these output channels, whose weights come first in `weight`.
    fn transform_weight[T: Real](
        u: &Disjoint<T>, weight: &[T], outputs: Range<usize>, channels: (usize, usize), pass: Pass,
    ) {
        let (c, out) = channels;
        let mut taps = unwritten(9 * c); // [9, c]
        for (weight, output) in weight.chunks_exact(9 * c).zip(outputs) {
            for tap in 0..9 {
                let from = if pass == Pass::InputGradient { 8 - tap } else { tap };
                for (i, value) in taps[tap * c..][..c].iter_mut().enumerate() {
                    *value = weight[i * 9 + from];
                }
            }
            for channel in (0..c).step_by(LANES) {
                let g = |i: usize, j: usize| Lanes::load(&taps[(i * 3 + j) * c..][..c], channel);
                let mut tall = [[Lanes::all(T::ZERO); 4]; 3];
                for j in 0..3 {
                    tall[j] = spread_weight([g(0, j), g(1, j), g(2, j)]);
                }
                for i in 0..4 {
                    let points = spread_weight([tall[0][i], tall[1][i], tall[2][i]]);
                    for j in 0..4 {
                        let to = ((i * 4 + j) * out + output) * c + channel;
                        let width = LANES.min(c - channel);
                        // SAFETY: these output channels of u are this thread's; to + width lies in their row.
                        points[j].store(unsafe { std::slice::from_raw_parts_mut(u.at(to), width) });
                    }
                }
            }
        }
    }
}

/// A transformed weight as a right factor at each point.
struct Factor<T> {
    u: Vec<T>,
    /// In, out, of the pass.
    channels: (usize, usize),
    pass: Pass,
}

impl<T: Real> Factor<T> {
    fn new(weight: &[T], (c, out): (usize, usize), pass: Pass) -> Self {
        let channels = if pass == Pass::Forward { (c, out) } else { (out, c) };
        Self { u: transformed(weight, channels, pass), channels: (c, out), pass } // [16, out, c] as the weight has them
    }

    /// `[c, out]` from an output channel on.
    fn at(&self, point: usize, column: usize) -> Matrix<*const T> {
        let (c, out) = self.channels;
        let u = &self.u[point * c * out..][..c * out];
        match self.pass {
            Pass::Forward => Matrix::rows(&u[column * c..], c).transposed(),
            Pass::InputGradient => Matrix::rows(&u[column..], out),
        }
    }

    fn panels(&self) -> Vec<Panels<T>> {
        let (c, out) = self.channels;
        // SAFETY: at each point u has c·out values.
        let pack = |point| unsafe { Panels::pack(self.at(point, 0), c, out) };
        parallel::map(POINTS, 1, |points| points.map(pack).collect::<Vec<_>>()).into_iter().flatten().collect()
    }
}

/// The convolution of x. Where the transformed weight does not stay in the caches, each thread takes some of its channels
/// for all tiles; else some of the tiles. A small weight is packed once for all of them.
fn multiply<T: Real>(
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    geometry: Geometry,
    pass: Pass,
    keep: Option<(&Packed, &Tensor)>,
) -> Vec<T> {
    if let Some(y) = unit::winograd::convolve(x, weight, bias, geometry, pass) {
        return y;
    }
    let (c, out) = geometry.channels;
    let is_packed = takes_panels::<T>() && POINTS * c * out <= PACKED;
    let panels = || Factor::new(weight, (c, out), pass).panels();
    let kept = keep.filter(|_| is_packed);
    let kept = kept.and_then(|(packed, weight)| packed.panels(weight, POINTS * c * out, panels));
    let factor = if is_packed { None } else { Some(Factor::new(weight, (c, out), pass)) };
    let once = if is_packed && kept.is_none() { panels() } else { Vec::new() };
    let panels = kept.unwrap_or(&once);
    let block = if is_packed { SMALL_BLOCK } else { BLOCK };
    let mut y = unwritten(geometry.positions() * out);
    let y_at = Disjoint::new(&mut y);
    Shares::of(geometry, geometry.is_wide(), 16).for_each(geometry, |_, columns, tiles| {
        let width = columns.len();
        let (mut v, mut m) = (unwritten(POINTS * stride(block, c)), unwritten(POINTS * stride(block, width)));
        for (first, n) in blocks(tiles, block) {
            input_tiles(&mut v, x, (first, n), geometry);
            for point in 0..POINTS {
                let a = Matrix::rows(&v[point * stride(n, c)..], c);
                let target = (Matrix::rows_mut(&mut m[point * stride(n, width)..], width), Start::Zero);
                // SAFETY: at each point v holds n·c, the factor c·out and m n·width values; panels have all columns, as
                // this share has where the weight is small.
                match &factor {
                    Some(factor) => unsafe { matmul((n, width, c), a, factor.at(point, columns.start), target) },
                    None => unsafe { panels[point].product(n, a, target) },
                }
            }
            output_tiles(&y_at, &m, bias, columns.clone(), (first, n), geometry);
        }
    });
    y
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

/// G·g.
#[inline(always)]
fn spread_weight<T: Real>(g: [Lanes<T>; 3]) -> [Lanes<T>; 4] {
    let half = Lanes::all(T::of(0.5));
    let (ends, middle) = ((g[0] + g[2]) * half, g[1] * half);
    [g[0], ends + middle, ends - middle, g[2]]
}

/// Gᵀ·u.
#[inline(always)]
fn mix_weight<T: Real>(u: [Lanes<T>; 4]) -> [Lanes<T>; 3] {
    let half = Lanes::all(T::of(0.5));
    let (sum, difference) = ((u[1] + u[2]) * half, (u[1] - u[2]) * half);
    [u[0] + sum, difference, sum + u[3]]
}

/// Where a tile begins: image, and the first row and column of its output.
pub fn origin(tile: usize, geometry: Geometry) -> (usize, usize, usize) {
    let (rows, columns) = grid(geometry);
    (tile / (rows * columns), tile / columns % rows * 2, tile % columns * 2)
}

vectorised! {
    /// Bᵀ·d·B of the tiles, `[16, n, c]`.
    fn input_tiles[T: Real](v: &mut [T], x: &[T], tiles: (usize, usize), geometry: Geometry) {
        let (first, n) = tiles;
        let c = geometry.channels.0;
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
                        *pixel = &x[((image * h + y as usize) * w + x_at as usize) * c..][..c];
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
    fn output_tiles[T: Real](
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

/// # Shapes
/// - dy `[images, h', w', out]`, x `[images, h, w, c]` → `[out, c, 3, 3]`
pub fn weight_gradient<T: Real>(dy: &[T], x: &[T], geometry: Geometry) -> Vec<T> {
    if let Some(dw) = unit::winograd::weight_gradient(dy, x, geometry) {
        return dw;
    }
    let (c, out) = geometry.channels;
    let shares = Shares::of(geometry, true, 64);
    let points = POINTS * out * c;
    let mut du = unwritten(shares.tiles * points); // [ranges of tiles, 16, out, c]
    let du_at = Disjoint::new(&mut du);
    shares.for_each(geometry, |part, columns, tiles| {
        let width = columns.len();
        let (mut v, mut z) = (unwritten(POINTS * stride(BLOCK, c)), unwritten(POINTS * stride(BLOCK, width)));
        let mut mode = Start::Zero;
        for (first, n) in blocks(tiles, BLOCK) {
            input_tiles(&mut v, x, (first, n), geometry);
            gradient_tiles(&mut z, dy, columns.clone(), (first, n), geometry);
            for point in 0..POINTS {
                let a = Matrix::rows(&z[point * stride(n, width)..], width).transposed();
                let b = Matrix::rows(&v[point * stride(n, c)..], c);
                let start = du_at.at(part * points + (point * out + columns.start) * c);
                let target = Matrix { start, row_stride: c, column_stride: 1 };
                // SAFETY: at each point z holds n·width and v n·c values; these rows of du are this share's alone.
                unsafe { matmul((width, c, n), a, b, (target, mode)) }
            }
            mode = Start::Held;
        }
    });
    gathered(&du, geometry.channels)
}

/// Gᵀ·du·G, du `[parts, 16, out, c]` summed over its parts.
pub fn gathered<T: Real>(du: &[T], (c, out): (usize, usize)) -> Vec<T> {
    let mut dw = unwritten(9 * c * out);
    parallel::for_rows(&mut dw, 9 * c, 1, |outputs, dw| gather_weight(dw, du, outputs, (c, out)));
    dw
}

vectorised! {
    /// A·dy·Aᵀ of the tiles at some output channels, `[16, n, columns]`.
    fn gradient_tiles[T: Real](
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

vectorised! {
    /// Gᵀ·du·G for these output channels, du summed over its parts.
    fn gather_weight[T: Real](dw: &mut [T], du: &[T], outputs: Range<usize>, channels: (usize, usize)) {
        let (c, out) = channels;
        let mut taps = unwritten(9 * c); // [9, c]
        for (dw, output) in dw.chunks_exact_mut(9 * c).zip(outputs) {
            for channel in (0..c).step_by(LANES) {
                let point = |i: usize, j: usize| {
                    let mut sum = Lanes::all(T::ZERO);
                    for part in du.chunks_exact(POINTS * c * out) {
                        sum = sum + Lanes::load(&part[((i * 4 + j) * out + output) * c..][..c], channel);
                    }
                    sum
                };
                let mut tall = [[Lanes::all(T::ZERO); 3]; 4];
                for j in 0..4 {
                    tall[j] = mix_weight([point(0, j), point(1, j), point(2, j), point(3, j)]);
                }
                for i in 0..3 {
                    let row = mix_weight([tall[0][i], tall[1][i], tall[2][i], tall[3][i]]);
                    for j in 0..3 {
                        let to = (i * 3 + j) * c + channel;
                        row[j].store(&mut taps[to..to + LANES.min(c - channel)]);
                    }
                }
            }
            for (i, dw) in dw.chunks_exact_mut(9).enumerate() {
                for (tap, value) in dw.iter_mut().enumerate() {
                    *value = taps[tap * c + i];
                }
            }
        }
    }
}

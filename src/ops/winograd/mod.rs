//! 3×3 convolutions at stride 1 by Winograd's minimal filtering F(2×2, 3×3) (Lavin and Gray, 2016): 16 multiplications for
//! 4 outputs in place of 36.
//!
//! With d a 4×4 tile of the input, g a kernel and y a 2×2 tile of the output, y = Aᵀ[(G·g·Gᵀ) ⊙ (Bᵀ·d·B)]A. Summed over input
//! channels, the products ⊙ at each of the 16 points are one matrix product, `[tiles, c]·[c, out]`. The weight's gradient
//! is Gᵀ[Σ (Bᵀ·d·B)ᵀ·(A·dy·Aᵀ)]G with the same 16 products, `[c, tiles]·[tiles, out]`; the input's gradient is the forward
//! pass with the flipped weight. All transforms are sums and halves: in f32 the result stays within a few units in the
//! last place of the direct sum.

pub mod few_tiles;
mod pictures;
mod weight;

use std::ops::Range;

use candle_core::Tensor;

pub use self::pictures::origin;
use self::pictures::{gradient_tiles, input_tiles, output_tiles, stride};
use self::weight::Factor;
pub use self::weight::{Pass, gathered, transformed};
use super::buffer::unwritten;
use super::conv::Geometry;
use super::packed::Packed;
use super::parallel::{self, Disjoint};
use super::product::{Matrix, Panels, Start, matmul, takes_panels};
use super::real::Real;
use super::tiles as unit;

/// Points of a transformed tile.
pub const POINTS: usize = 16;
/// Taps of a kernel.
const TAPS: usize = 9;

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

/// What the tiles are multiplied by at each point.
enum Right<'a, T> {
    Kept(&'a [Panels<T>]),
    Packed(Vec<Panels<T>>),
    Factor(Factor<T>),
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
    let factor = || Factor::new(weight, (c, out), pass);
    let panels = || factor().panels();
    let kept = keep.filter(|_| is_packed);
    let kept = kept.and_then(|(packed, weight)| packed.panels(weight, POINTS * c * out, panels));
    let right = match kept {
        Some(panels) => Right::Kept(panels),
        None if is_packed => Right::Packed(panels()),
        None => Right::Factor(factor()),
    };
    let block = if is_packed { SMALL_BLOCK } else { BLOCK };
    let mut y = unwritten(geometry.positions() * out);
    let y_at = Disjoint::new(&mut y);
    Shares::of(geometry, geometry.is_wide(), 16).for_each(geometry, |_, columns, tiles| {
        let width = columns.len();
        let (mut v, mut m) = (unwritten(POINTS * stride(block, c)), unwritten(POINTS * stride(block, width)));
        for (first, n) in blocks(tiles, block) {
            input_tiles(&mut v, x, 0..c, (first, n), geometry);
            for point in 0..POINTS {
                let a = Matrix::rows(&v[point * stride(n, c)..], c);
                let target = (Matrix::rows_mut(&mut m[point * stride(n, width)..], width), Start::Zero);
                // SAFETY: at each point v holds n·c, the factor c·out and m n·width values; panels have all columns, as
                // this share has where the weight is small.
                unsafe {
                    match &right {
                        Right::Kept(panels) => panels[point].product(n, a, target),
                        Right::Packed(panels) => panels[point].product(n, a, target),
                        Right::Factor(factor) => matmul((n, width, c), a, factor.at(point, columns.start), target),
                    }
                }
            }
            output_tiles(&y_at, &m, bias, columns.clone(), (first, n), geometry);
        }
    });
    y
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
            input_tiles(&mut v, x, 0..c, (first, n), geometry);
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

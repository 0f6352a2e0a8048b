//! Matrix products on the tile unit of recent x86 servers (AMX), f32 in and out.
//!
//! The unit multiplies bf16 at sixteen times the rate of f32 fused multiply-adds. An f32 value is the sum of three bf16
//! planes (8 significant bits each): a = a₀ + a₁ + a₂. Of the nine products of planes the six of
//! at least 2⁻¹⁶ of the whole give f32's own precision at more than twice its speed; three of them (the two leading
//! planes), or one, trade precision for speed ([`Precision`]). Sums are f32 in all cases.
//!
//! A tile has 16 rows of 64 bytes: 16 rows of an output in f32; 16 rows of a left factor, or 16 columns of a right one, at
//! up to 32 places along the sum, two places side by side as the unit wants them. Which two is free if both factors agree:
//! in `pack` the j-th of a block's first half and the j-th of its second, which needs no shuffle.
//!
//! Infinite inputs give NaN; values below 2⁻¹²⁶ count as 0.

pub mod attention;
pub mod conv;
mod memory;
mod pack;
mod unit;
pub mod winograd;

use std::ops::Range;

use candle_core::DType;

use self::memory::{single, with_scratch};
use self::pack::{Factor, Side, Sum};
pub use self::unit::available;
use self::unit::{Registers, Step, Tiles};
use super::precision::{Precision, matmul_precision};
use super::product::{Matrix, Start};
use super::real::Real;

/// Rows or columns of an output tile.
const SIDE: usize = 16;
/// Lines of 64 bytes in a tile.
const LINES: usize = 16;

/// One tile as it lies in memory.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Tile([u32; 256]);

const EMPTY: Tile = Tile([0; 256]);

/// Calls `$f::<PLANES>(..)` for a precision.
macro_rules! for_planes {
    ($precision:expr, $($f:ident).+($($argument:expr),*)) => {
        match $precision {
            Precision::Highest => $($f).+::<3>($($argument),*),
            Precision::High => $($f).+::<2>($($argument),*),
            Precision::Medium => $($f).+::<1>($($argument),*),
        }
    };
}
use for_planes;

/// `out [m, n] = start + scale · a [m, k] · b [k, n]`, if that is worth packing for and the output's columns lie side by side;
/// returns whether it was done.
///
/// # Safety
/// As for `product::matmul`.
pub unsafe fn matmul<T: Real>(
    sizes: (usize, usize, usize),
    scale: T,
    a: Matrix<*const T>,
    b: Matrix<*const T>,
    (out, start): (Matrix<*mut T>, Start<T>),
) -> bool {
    // SAFETY: the caller's contract.
    unsafe { matmul_in(matmul_precision(), sizes, scale, (a, b), (out, start)) }
}

unsafe fn matmul_in<T: Real>(
    precision: Precision,
    (m, n, k): (usize, usize, usize),
    scale: T,
    (a, b): (Matrix<*const T>, Matrix<*const T>),
    (out, start): (Matrix<*mut T>, Start<T>),
) -> bool {
    // Rows do not count: a picture must get the same bits alone and in a batch.
    let large = n.min(k) >= 8 && n * k >= 4096;
    if T::DTYPE != DType::F32 || out.column_stride != 1 || !large || !available() {
        return false;
    }
    let factor =
        |start: *const T, across, along, count, side| Factor { start: start.cast(), across, along, count, side };
    // Read by whole pairs of tiles.
    let padded = |row: &[T]| [single(row), &[0.0; 2 * SIDE]].concat();
    let work = Product {
        sum: Sum::of(k),
        scale: scale.to_f64() as f32,
        a: factor(a.start, a.row_stride, a.column_stride, m, Side::Left),
        b: factor(b.start, b.column_stride, b.row_stride, n, Side::Right),
        out: (out.start.cast(), out.row_stride),
        is_added: matches!(start, Start::Held),
        row: if let Start::Row(row) = start { Some(padded(row)) } else { None },
    };
    // SAFETY: the caller's contract, `T` is f32, and the unit is there.
    unsafe { for_planes!(precision, work.run()) };
    true
}

struct Product {
    sum: Sum,
    scale: f32,
    a: Factor,
    b: Factor,
    /// Start, and values from row to row.
    out: (*mut f32, usize),
    /// To what the output holds.
    is_added: bool,
    /// Added to every row, with two tiles' worth behind it.
    row: Option<Vec<f32>>,
}

/// Steps along a sum of so many blocks, whose planes lie side by side in both factors.
fn steps<const PLANES: usize>(blocks: usize) -> Vec<Step> {
    (0..blocks).map(|block| block * PLANES * size_of::<Tile>()).map(|offset| (offset, offset)).collect()
}

/// Packed rows or columns of tiles, and which they are.
type Piece<'a> = (&'a [Tile], &'a Range<usize>);

/// Tiles along the sum, in all planes, multiplied at a time. Few of them would stay in the first-level cache, but loading
/// and storing the output between costs more than the second-level cache does.
const DEPTH: usize = 96;
/// Tiles of the kept factor packed at a time: they stay in the second-level cache.
const KEPT_TILES: usize = 768;
/// Rows or columns of tiles of the other factor packed at a time.
const PASSING: usize = 8;

impl Product {
    /// The smaller factor is kept while the other passes by, so that each is packed once in most cases.
    ///
    /// # Safety
    /// The unit is there, and the factors and the output lie inside their allocations.
    unsafe fn run<const PLANES: usize>(&self) {
        let (rows, columns) = (self.a.count.div_ceil(SIDE), self.b.count.div_ceil(SIDE));
        let parts = self.sum.blocks.div_ceil(DEPTH / PLANES);
        let depth = self.sum.blocks.div_ceil(parts);
        let keeps_left = rows < columns;
        let (kept, passing) = if keeps_left { (rows, columns) } else { (columns, rows) };
        let large = (KEPT_TILES / (depth * PLANES)).clamp(2, kept.next_multiple_of(2)) & !1;
        let pieces = |count: usize, step: usize| (0..count).step_by(step).map(move |i| i..count.min(i + step));
        let steps = steps::<PLANES>(depth);
        with_scratch((large + PASSING) * depth * PLANES, |scratch| {
            let (large_tiles, small_tiles) = scratch.split_at_mut(large * depth * PLANES);
            let mut edges = [EMPTY; 4];
            // SAFETY: the unit is there; the scratch holds these many tiles.
            unsafe {
                let registers = Registers::new(self.sum.pairs);
                for keep in pieces(kept, large) {
                    for blocks in pieces(self.sum.blocks, depth) {
                        self.pack::<PLANES>(keeps_left, (keep.clone(), blocks.clone()), large_tiles);
                        for pass in pieces(passing, PASSING) {
                            self.pack::<PLANES>(!keeps_left, (pass.clone(), blocks.clone()), small_tiles);
                            let (large, small) = ((&*large_tiles, &keep), (&*small_tiles, &pass));
                            let (left, right) = if keeps_left { (large, small) } else { (small, large) };
                            let steps = &steps[..blocks.len()];
                            self.multiply::<PLANES>(&registers, steps, (left, right), blocks.start, &mut edges);
                        }
                    }
                }
            }
        });
    }

    unsafe fn pack<const PLANES: usize>(&self, is_left: bool, what: (Range<usize>, Range<usize>), to: &mut [Tile]) {
        let (factor, scale) = if is_left { (self.a, self.scale) } else { (self.b, 1.0) };
        // SAFETY: the caller's contract.
        unsafe { factor.pack::<PLANES>(self.sum, scale, what, to) };
    }

    /// These packed rows of tiles times these columns, at the blocks of the sum from `first_block` on.
    unsafe fn multiply<const PLANES: usize>(
        &self,
        registers: &Registers,
        steps: &[Step],
        ((left, rows), (right, columns)): (Piece, Piece),
        first_block: usize,
        edges: &mut [Tile; 4],
    ) {
        let own = steps.len() * PLANES;
        let pair = |tiles: &[Tile], i: usize| Tiles::whole([i, i + 1].map(|i| tiles.as_ptr().wrapping_add(i * own)));
        let add = self.is_added || first_block > 0;
        for column in columns.clone().step_by(2) {
            let right = pair(right, column - columns.start);
            let row_of_all = self.row.as_ref().map(|values| {
                let at = |i: usize| values.as_ptr().wrapping_add((column + i % 2) * SIDE).cast_mut().cast();
                [0, 1, 2, 3].map(|i| (at(i), 0))
            });
            for row in rows.clone().step_by(2) {
                let size = (2.min(rows.end - row), 2.min(columns.end - column));
                let factors = (pair(left, row - rows.start), right);
                // SAFETY: the caller's contract.
                unsafe {
                    self.with_outputs(edges, size, (row, column), add, |out| {
                        let from = if add { Some(out) } else { row_of_all };
                        registers.multiply_from::<PLANES>(size, steps, factors, out, from);
                    });
                }
            }
        }
    }

    /// Calls `f` with up to 2×2 whole tiles that stand for the output's from tile `at` on: the output itself, or at its edges
    /// a copy that is written back.
    unsafe fn with_outputs(
        &self,
        edges: &mut [Tile; 4],
        (height, width): (usize, usize),
        at: (usize, usize),
        add: bool,
        f: impl FnOnce([(*mut u8, usize); 4]),
    ) {
        let (start, stride) = self.out;
        let mut places = [(std::ptr::null_mut::<u8>(), 0); 4];
        let used = (0..4).filter(|i| i / 2 < height && i % 2 < width);
        let part = |i: usize| {
            let (row, column) = ((at.0 + i / 2) * SIDE, (at.1 + i % 2) * SIDE);
            let start = start.wrapping_add(row * stride + column);
            (start, SIDE.min(self.a.count - row), SIDE.min(self.b.count - column))
        };
        for i in used.clone() {
            let (start, rows, columns) = part(i);
            if (rows, columns) == (SIDE, SIDE) {
                places[i] = (start.cast(), stride * size_of::<f32>());
                continue;
            }
            let edge = edges[i].0.as_mut_ptr();
            for row in 0..if add { rows } else { 0 } {
                // SAFETY: these rows and columns lie inside the output and the tile.
                unsafe { std::ptr::copy_nonoverlapping(start.add(row * stride).cast(), edge.add(row * SIDE), columns) };
            }
            places[i] = (edge.cast(), 64);
        }
        f(places);
        for i in used {
            let (start, rows, columns) = part(i);
            for row in 0..if (rows, columns) == (SIDE, SIDE) { 0 } else { rows } {
                let from = edges[i].0[row * SIDE..].as_ptr();
                // SAFETY: as above.
                unsafe { std::ptr::copy_nonoverlapping(from, start.add(row * stride).cast(), columns) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// Largest error over Σ|a·b| of a product in all four layouts, from every start.
    fn largest_error((m, n, k): (usize, usize, usize), precision: Precision) -> f64 {
        let mut rng = Rng::new(7, "tiles", (m * n * k) as u64);
        let a: Vec<f32> = (0..m * k).map(|_| rng.normal() as f32).collect();
        let b: Vec<f32> = (0..k * n).map(|_| rng.normal() as f32).collect();
        let mut worst = 0f64;
        for layout in 0..4 {
            let left = if layout & 1 == 0 { Matrix::rows(&a, k) } else { Matrix::rows(&a, m).transposed() };
            let right = if layout & 2 == 0 { Matrix::rows(&b, n) } else { Matrix::rows(&b, k).transposed() };
            let row = vec![0.5f32; n];
            let start = [Start::Zero, Start::Held, Start::Row(&row), Start::Zero][layout];
            let added = if layout == 1 || layout == 2 { 0.5 } else { 0.0 };
            let mut out = vec![0.5f32; m * (n + 3)];
            let target = Matrix { start: out.as_mut_ptr(), row_stride: n + 3, column_stride: 1 };
            // SAFETY: the matrices are as large as said.
            assert!(unsafe { matmul_in(precision, (m, n, k), 0.25, (left, right), (target, start)) });
            for row in 0..m {
                for column in 0..n {
                    let at = |matrix: Matrix<*const f32>, row: usize, column: usize| {
                        // SAFETY: inside the matrix.
                        f64::from(unsafe { *matrix.start.add(row * matrix.row_stride + column * matrix.column_stride) })
                    };
                    let terms = (0..k).map(|i| at(left, row, i) * at(right, i, column) * 0.25);
                    let (sum, size) = terms.fold((0.0, 0.0), |(sum, size): (f64, f64), v| (sum + v, size + v.abs()));
                    worst = worst.max((f64::from(out[row * (n + 3) + column]) - sum - added).abs() / size);
                }
                assert_eq!(out[row * (n + 3) + n..][..3], [0.5; 3], "nothing is written beside the output");
            }
        }
        worst
    }

    #[test]
    fn products_of_all_shapes_and_layouts_are_as_exact_as_asked() {
        if !available() {
            return; // Every other test runs the portable products.
        }
        let shapes =
            [(32, 64, 64), (16, 16, 256), (17, 33, 140), (200, 40, 1000), (8, 300, 129), (131, 8, 770), (1, 450, 450)];
        for shape in shapes {
            for (precision, bound) in [(Precision::Highest, 3e-7), (Precision::High, 2e-5), (Precision::Medium, 5e-3)] {
                let error = largest_error(shape, precision);
                assert!(error < bound, "{shape:?} {precision:?}: {error:e}");
            }
        }
    }
}

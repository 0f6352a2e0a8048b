//! Matrix products on the tile unit of recent x86 servers (AMX), f32 in and out.
//!
//! The unit multiplies bf16 at sixteen times the rate of f32 fused multiply-adds. An f32 value is the sum of three bf16
//! planes to its last bit but one (8 significant bits each): a = a₀ + a₁ + a₂. Of the nine products of planes the six of
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

use std::cell::RefCell;

use candle_core::DType;

use self::pack::{Factor, Side, Sum};
pub use self::unit::available;
use self::unit::{Registers, Step, Tiles};
use super::precision::{Precision, matmul_precision};
use super::real::{Matrix, Output, Real};

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

/// `out [m, n] (+)= scale · a [m, k] · b [k, n]`, if that is worth packing for and the output's columns lie side by side;
/// returns whether it was done.
///
/// # Safety
/// As for `real::matmul`.
pub unsafe fn matmul<T: Real>(
    (m, n, k): (usize, usize, usize),
    scale: T,
    a: Matrix<*const T>,
    b: Matrix<*const T>,
    out: (Matrix<*mut T>, Output),
) -> bool {
    // SAFETY: the caller's contract.
    unsafe { matmul_in(matmul_precision(), (m, n, k), scale, (a, b), out) }
}

unsafe fn matmul_in<T: Real>(
    precision: Precision,
    (m, n, k): (usize, usize, usize),
    scale: T,
    (a, b): (Matrix<*const T>, Matrix<*const T>),
    (out, mode): (Matrix<*mut T>, Output),
) -> bool {
    // Rows do not count: a picture must get the same bits alone and in a batch.
    let large = n.min(k) >= 8 && n * k >= 4096;
    if T::DTYPE != DType::F32 || out.column_stride != 1 || !large || !available() {
        return false;
    }
    let factor =
        |start: *const T, across, along, count, side| Factor { start: start.cast(), across, along, count, side };
    let work = Product {
        sum: Sum::of(k),
        scale: scale.to_f64() as f32,
        a: factor(a.start, a.row_stride, a.column_stride, m, Side::Left),
        b: factor(b.start, b.column_stride, b.row_stride, n, Side::Right),
        out: (out.start.cast(), out.row_stride),
        mode,
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
    mode: Output,
}

/// Tiles of packed factors.
#[derive(Default)]
struct Scratch {
    a: Vec<Tile>,
    b: Vec<Tile>,
    steps: Vec<Step>,
    /// Stand for output tiles that the output's edge cuts off.
    edges: Vec<Tile>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Tiles along the sum, in all planes, multiplied at a time. Few of them would stay in the first-level cache, but loading
/// and storing the output between costs more than the second-level cache does.
const DEPTH: usize = 96;
/// Tiles of the right factor packed at a time: they stay in the second-level cache.
const RIGHT_TILES: usize = 768;
/// Rows of tiles of the left factor packed at a time.
const LEFT_ROWS: usize = 8;

impl Product {
    /// # Safety
    /// The unit is there, and the factors and the output lie inside their allocations.
    unsafe fn run<const PLANES: usize>(&self) {
        let (rows, columns) = (self.a.count.div_ceil(SIDE), self.b.count.div_ceil(SIDE));
        let parts = self.sum.blocks.div_ceil(DEPTH / PLANES);
        let depth = self.sum.blocks.div_ceil(parts);
        let wide = (RIGHT_TILES / (depth * PLANES)).clamp(2, columns.next_multiple_of(2)) & !1;
        SCRATCH.with_borrow_mut(|Scratch { a, b, steps, edges }| {
            let grow = |tiles: &mut Vec<Tile>, number: usize| tiles.resize(number.max(tiles.len()), EMPTY);
            grow(a, LEFT_ROWS * depth * PLANES);
            grow(b, wide * depth * PLANES);
            grow(edges, 4);
            steps.clear();
            steps.extend(
                (0..depth).map(|block| (block * PLANES * size_of::<Tile>(), block * PLANES * size_of::<Tile>())),
            );
            // SAFETY: the unit is there; the scratch holds these many tiles.
            unsafe {
                let registers = Registers::new(self.sum.pairs);
                for left in (0..columns).step_by(wide) {
                    let width = wide.min(columns - left);
                    for first in (0..self.sum.blocks).step_by(depth) {
                        let blocks = first..(first + depth).min(self.sum.blocks);
                        self.b.pack::<PLANES>(self.sum, 1.0, (left..left + width, blocks.clone()), b);
                        let own = blocks.len() * PLANES;
                        let add = self.mode == Output::Add || first > 0;
                        for top in (0..rows).step_by(LEFT_ROWS) {
                            let height = LEFT_ROWS.min(rows - top);
                            self.a.pack::<PLANES>(self.sum, self.scale, (top..top + height, blocks.clone()), a);
                            for column in (0..width).step_by(2) {
                                for row in (0..height).step_by(2) {
                                    let size = (2.min(height - row), 2.min(width - column));
                                    let tiles = |tiles: &[Tile], first: usize| {
                                        Tiles::whole([first, first + 1].map(|i| tiles.as_ptr().wrapping_add(i * own)))
                                    };
                                    let factors = (tiles(a, row), tiles(b, column));
                                    self.with_outputs(edges, size, (top + row, left + column), add, |out| {
                                        registers.multiply_some::<PLANES>(
                                            size,
                                            &steps[..blocks.len()],
                                            factors,
                                            (out, add),
                                        );
                                    });
                                }
                            }
                        }
                    }
                }
            }
        });
    }

    /// Calls `f` with up to 2×2 whole tiles that stand for the output's from tile `at` on: the output itself, or at its edges
    /// a copy that is written back.
    unsafe fn with_outputs(
        &self,
        edges: &mut [Tile],
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

    /// Largest error over Σ|a·b| of a product in all four layouts, with bias or without.
    fn largest_error((m, n, k): (usize, usize, usize), precision: Precision) -> f64 {
        let mut rng = Rng::new(7, "tiles", (m * n * k) as u64);
        let a: Vec<f32> = (0..m * k).map(|_| rng.normal() as f32).collect();
        let b: Vec<f32> = (0..k * n).map(|_| rng.normal() as f32).collect();
        let mut worst = 0f64;
        for layout in 0..4 {
            let left = if layout & 1 == 0 { Matrix::rows(&a, k) } else { Matrix::rows(&a, m).transposed() };
            let right = if layout & 2 == 0 { Matrix::rows(&b, n) } else { Matrix::rows(&b, k).transposed() };
            let mode = if layout == 1 { Output::Add } else { Output::Replace };
            let mut out = vec![0.5f32; m * (n + 3)];
            let target = Matrix { start: out.as_mut_ptr(), row_stride: n + 3, column_stride: 1 };
            // SAFETY: the matrices are as large as said.
            assert!(unsafe { matmul_in(precision, (m, n, k), 0.25, (left, right), (target, mode)) });
            for row in 0..m {
                for column in 0..n {
                    let at = |matrix: Matrix<*const f32>, row: usize, column: usize| {
                        // SAFETY: inside the matrix.
                        f64::from(unsafe { *matrix.start.add(row * matrix.row_stride + column * matrix.column_stride) })
                    };
                    let terms = (0..k).map(|i| at(left, row, i) * at(right, i, column) * 0.25);
                    let (sum, size) = terms.fold((0.0, 0.0), |(sum, size): (f64, f64), v| (sum + v, size + v.abs()));
                    let sum = if mode == Output::Add { sum + 0.5 } else { sum };
                    worst = worst.max((f64::from(out[row * (n + 3) + column]) - sum).abs() / size);
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

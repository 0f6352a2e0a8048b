//! Products of any size, put together from [`lane_product`]s in the caches.
//!
//! The right factor is packed into *panels*, as many columns as fill the registers, the left one is read where it lies: an
//! element of it serves a whole panel's width. Where the left factor has few rows and the right one lies by columns (a
//! layer's weight), the left one's rows become the panels and the result is turned round, so that no weight is ever packed
//! for a few rows. Either way an element of the result is a sum of sums over [`DEPTH`] places: neither sizes nor threads
//! change its bits.

use candle_core::DType;

use super::lane_product::{WIDEST, fuses, lane_product};
use super::matrix::{Matrix, Start, Target};
use crate::ops::buffer::Aligned;
use crate::ops::lanes::LANES;
use crate::ops::parallel;
use crate::ops::real::{Real, vectorised};
use crate::ops::transpose::transpose;

/// Columns of the widest panel.
const WIDTH: usize = WIDEST * LANES;
/// Places along k that are multiplied at a time: so much of a panel stays in the first-level cache.
const DEPTH: usize = 192;
/// Places packed at a time.
const PACKED: usize = 3 * DEPTH;
/// Rows at a time.
const ROWS: usize = 64;
/// Columns packed at a time.
const COLUMNS: usize = 8 * WIDTH;
/// Values of a right factor that is small beside the caches.
pub const SMALL: usize = 200_000;

/// Whether this machine has what these products are written for.
pub fn available<T: Real>() -> bool {
    T::DTYPE == DType::F32 && fuses()
}

/// Whether a product is made here rather than by the `gemm` crate, which packs as it should for large products: where the right
/// factor lies by columns, as a layer's weight does, and is small beside the caches or meets few rows.
pub fn suits<T: Real>((m, n, k): (usize, usize, usize), a: Matrix<*const T>, b: Matrix<*const T>) -> bool {
    /// For so few, packing both factors, as the crate does, shows in the time of any product.
    const FEW: usize = 256;
    available::<T>() && lie_as_in_a_layer(a, b) && (n * k <= SMALL || m <= FEW || are_few(m, n))
}

/// Whether a row of one factor and a column of the other lie in one piece each.
pub fn lie_as_in_a_layer<T>(a: Matrix<*const T>, b: Matrix<*const T>) -> bool {
    b.row_stride == 1 && a.column_stride == 1
}

/// Rows that are packed more quickly than so many columns.
fn are_few(rows: usize, columns: usize) -> bool {
    3 * rows <= columns
}

/// Some columns of a right factor.
#[derive(Clone, Copy)]
struct Panel {
    first: usize,
    /// Columns that are there.
    used: usize,
    /// What they fill, a multiple of [`LANES`].
    width: usize,
}

impl Panel {
    /// From a place on, in a factor packed at k places.
    fn of<T>(self, packed: &[T], k: usize, place: usize) -> Matrix<*const T> {
        Matrix::rows(&packed[self.first * k + place * self.width..(self.first + self.width) * k], self.width)
    }
}

/// Panels of nearly one width.
fn panels(columns: usize) -> impl Iterator<Item = Panel> {
    let vectors = columns.div_ceil(LANES);
    let count = vectors.div_ceil(WIDEST);
    (0..count).map(move |index| {
        let range = parallel::range(vectors, count, index);
        let first = range.start * LANES;
        Panel { first, used: columns.min(range.end * LANES) - first, width: range.len() * LANES }
    })
}

/// As [`super::matmul`], for outputs whose rows lie in one piece and right factors whose rows or columns do.
///
/// # Safety
/// As there.
pub unsafe fn product<T: Real>(
    (m, n, k): (usize, usize, usize),
    a: Matrix<*const T>,
    b: Matrix<*const T>,
    (out, start): Target<T>,
) {
    debug_assert!(out.column_stride == 1);
    if are_few(m, n) && lie_as_in_a_layer(a, b) {
        // SAFETY: the caller's contract.
        return unsafe { turned((m, n, k), a, b, (out, start)) };
    }
    let mut pack = Aligned::unwritten(COLUMNS.min(n.next_multiple_of(LANES)) * PACKED.min(k));
    for columns in parallel::pieces(0..n, COLUMNS) {
        for places in parallel::pieces(0..k, PACKED) {
            let (a, count) = (a.at(0, places.start), places.len());
            let start = if places.start == 0 { start.columns(columns.clone()) } else { Start::Held };
            let target = (out.at_mut(0, columns.start), start);
            // SAFETY: the caller's contract; the pack holds these columns, filled up, at so many places.
            unsafe {
                pack_panels(b.at(places.start, columns.start), count, columns.len(), &mut pack);
                by_panels((m, columns.len(), count), a, &pack, target);
            }
        }
    }
}

/// A right factor `[k, n]` packed whole, to be multiplied by more than once.
pub struct Panels<T> {
    values: Aligned<T>,
    k: usize,
    n: usize,
}

impl<T: Real> Panels<T> {
    /// # Safety
    /// b lies inside its allocation for these sizes, its rows or its columns in one piece each.
    pub unsafe fn pack(b: Matrix<*const T>, k: usize, n: usize) -> Self {
        let mut values = Aligned::unwritten(k * n.next_multiple_of(LANES));
        // SAFETY: the caller's contract.
        unsafe { pack_panels(b, k, n, &mut values) };
        Self { values, k, n }
    }

    /// `out [m, n] = start + a [m, k] · self`, with the bits of [`super::matmul`].
    ///
    /// # Safety
    /// As for [`super::matmul`]; rows of out lie in one piece.
    pub unsafe fn product(&self, m: usize, a: Matrix<*const T>, target: Target<T>) {
        // SAFETY: the caller's contract.
        unsafe { by_panels((m, self.n, self.k), a, &self.values, target) }
    }
}

/// Packs `b [k, n]`, panel after panel, a row of each after the other; what is empty behind the columns is 0.
///
/// # Safety
/// As for [`Panels::pack`].
unsafe fn pack_panels<T: Real>(b: Matrix<*const T>, k: usize, n: usize, pack: &mut [T]) {
    for Panel { first, used, width } in panels(n) {
        let panel = &mut pack[first * k..(first + width) * k];
        if used < width {
            panel.fill(T::ZERO);
        }
        let from = b.at(0, first).start;
        if b.row_stride == 1 {
            // SAFETY: the caller's contract, and the panel has k rows of `width` values.
            unsafe { transpose((used, k), (from, b.column_stride), (panel.as_mut_ptr(), width), T::ONE) };
        } else {
            debug_assert!(b.column_stride == 1);
            copy_rows((from, b.row_stride), used, (panel, width));
        }
    }
}

vectorised! {
    /// Fills the first `columns` of each row of `to` from rows so many values apart, for which the caller answers.
    fn copy_rows[T: Real](rows: (*const T, usize), columns: usize, to: (&mut [T], usize)) {
        for (row, to) in to.0.chunks_exact_mut(to.1).enumerate() {
            // SAFETY: the caller's contract.
            let from = unsafe { std::slice::from_raw_parts(rows.0.add(row * rows.1), columns) };
            let (wholes, rest) = to[..columns].as_chunks_mut::<LANES>();
            let (from_wholes, from_rest) = from.as_chunks::<LANES>();
            // By registers: a call of memcpy for each short row takes longer than the copy.
            wholes.iter_mut().zip(from_wholes).for_each(|(to, from)| *to = *from);
            rest.copy_from_slice(from_rest);
        }
    }
}

/// `out = start + a·b`, b `[k, n]` packed.
///
/// # Safety
/// As for [`Panels::product`].
unsafe fn by_panels<T: Real>(
    (m, n, k): (usize, usize, usize),
    a: Matrix<*const T>,
    packed: &[T],
    (out, start): Target<T>,
) {
    debug_assert!(out.column_stride == 1);
    for rows in parallel::pieces(0..m, ROWS) {
        for places in parallel::pieces(0..k, DEPTH) {
            let start = if places.start == 0 { start } else { Start::Held };
            let a = a.at(rows.start, places.start);
            for panel in panels(n) {
                let sizes = (rows.len(), panel.width, places.len());
                let b = panel.of(packed, k, places.start);
                let target =
                    (out.at_mut(rows.start, panel.first), start.columns(panel.first..panel.first + panel.used));
                // SAFETY: the caller's contract; the panel has these places.
                unsafe {
                    if panel.used == panel.width {
                        lane_product(sizes, a, b, target);
                    } else {
                        beside_the_edge(sizes, panel.used, (a, b), target);
                    }
                }
            }
        }
    }
}

/// A [`lane_product`] of which only the first `used` columns are the output's.
///
/// # Safety
/// As there.
unsafe fn beside_the_edge<T: Real>(
    sizes: (usize, usize, usize),
    used: usize,
    (a, panel): (Matrix<*const T>, Matrix<*const T>),
    (out, start): Target<T>,
) {
    let mut whole = [T::ZERO; ROWS * WIDTH];
    let whole = &mut whole[..sizes.0 * sizes.1];
    // SAFETY: the caller's contract.
    unsafe {
        for (row, whole) in whole.chunks_exact_mut(sizes.1).enumerate() {
            for (column, value) in whole[..used].iter_mut().enumerate() {
                *value = start.at(column, out.at_mut(row, column).start);
            }
        }
        lane_product(sizes, a, panel, (Matrix::rows_mut(whole, sizes.1), Start::Held));
        for (row, whole) in whole.chunks_exact(sizes.1).enumerate() {
            std::slice::from_raw_parts_mut(out.at_mut(row, 0).start, used).copy_from_slice(&whole[..used]);
        }
    }
}

/// The product by `bᵀ·aᵀ`, whose panels are the few rows of a.
///
/// # Safety
/// As for [`product`]; columns of b and rows of a lie in one piece.
unsafe fn turned<T: Real>(
    (m, n, k): (usize, usize, usize),
    a: Matrix<*const T>,
    b: Matrix<*const T>,
    (out, start): Target<T>,
) {
    // SAFETY: the caller's contract; `block` has m values for each of the columns.
    unsafe {
        let rows = Panels::pack(a.transposed(), k, m);
        let mut block = Aligned::unwritten(ROWS.min(n) * m);
        for columns in parallel::pieces(0..n, ROWS) {
            let block = &mut block[..columns.len() * m];
            let out = out.at_mut(0, columns.start);
            let begin = match start {
                Start::Zero => Start::Zero,
                Start::Row(row) => {
                    for (value, block) in row[columns.clone()].iter().zip(block.chunks_exact_mut(m)) {
                        block.fill(*value);
                    }
                    Start::Held
                }
                Start::Held => {
                    let held = (out.start.cast_const(), out.row_stride);
                    transpose((m, columns.len()), held, (block.as_mut_ptr(), m), T::ONE);
                    Start::Held
                }
            };
            let weight = b.transposed().at(columns.start, 0);
            rows.product(columns.len(), weight, (Matrix::rows_mut(block, m), begin));
            transpose((columns.len(), m), (block.as_ptr(), m), (out.start, out.row_stride), T::ONE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// Every layout and start, more and fewer than a block's rows, columns and places, by what a plain loop gives: bit by
    /// bit, since both fuse each multiplication with its addition.
    #[test]
    fn products_are_sums_of_sums_in_the_order_of_k() {
        if !available::<f32>() {
            return; // The `gemm` crate makes all products.
        }
        let shapes =
            [(1, 1, 1), (2, 130, 70), (7, 16, 300), (70, 50, 193), (130, 33, 400), (3, 500, 2800), (65, 400, 9)];
        for (m, n, k) in shapes {
            let mut rng = Rng::new(4, "blocks test", (m * n * k) as u64);
            let mut draw = |count: usize| -> Vec<f32> { (0..count).map(|_| rng.normal() as f32).collect() };
            let (a, b, row, held) = (draw(m * k), draw(k * n), draw(n), draw(m * (n + 3)));
            let starts = [Start::Zero, Start::Held, Start::Row(&row)];
            for (layout, start) in (0..4).flat_map(|layout| starts.map(|start| (layout, start))) {
                let left = if layout & 1 == 0 { Matrix::rows(&a, k) } else { Matrix::rows(&a, m).transposed() };
                let right = if layout & 2 == 0 { Matrix::rows(&b, n) } else { Matrix::rows(&b, k).transposed() };
                let (mut out, mut packed) = (held.clone(), held.clone());
                // SAFETY: all are as large as said.
                unsafe {
                    product((m, n, k), left, right, (Matrix::rows_mut(&mut out, n + 3), start));
                    Panels::pack(right, k, n).product(m, left, (Matrix::rows_mut(&mut packed, n + 3), start));
                }
                let mut expected = held.clone();
                for (row, column) in (0..m).flat_map(|row| (0..n).map(move |column| (row, column))) {
                    let at = &mut expected[row * (n + 3) + column];
                    // SAFETY: inside the matrices.
                    let term = |i: usize| unsafe { (*left.at(row, i).start, *right.at(i, column).start) };
                    let sum =
                        |places: std::ops::Range<usize>| places.map(term).fold(0f32, |sum, (a, b)| a.mul_add(b, sum));
                    *at = parallel::pieces(0..k, DEPTH)
                        .map(sum)
                        .fold(unsafe { start.at(column, at) }, |sum, part| sum + part);
                }
                assert!(out == expected, "{m} {n} {k}, layout {layout}");
                assert!(packed == expected, "{m} {n} {k}, layout {layout}, packed before");
            }
        }
    }
}

//! Matrix products on the tile unit of recent x86 servers (AMX), f32 in and out.
//!
//! The unit multiplies bf16 at sixteen times the rate of f32 fused multiply-adds. An f32 value is the sum of three bf16
//! planes to its last bit but one (8 significant bits each): a = a₀ + a₁ + a₂. Of the nine products of planes the six of
//! at least 2⁻¹⁶ of the whole give f32's own precision at more than twice its speed; three of them (the two leading
//! planes), or one, trade precision for speed ([`Precision`]). Sums are f32 in all cases.
//!
//! A tile has 16 rows of 64 bytes: 16 rows of an output in f32; 16 rows of a left factor, or 16 columns of a right one, at
//! up to 32 places along the sum, two places side by side as the unit wants them. Which two is free if both factors agree: here the
//! j-th of a block's first half and the j-th of its second, so that packing needs no shuffle.
//!
//! Infinite inputs give NaN; values below 2⁻¹²⁶ count as 0.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::sync::OnceLock;

use super::precision::Precision;
use super::real::{Matrix, Output};

/// Rows or columns of an output tile.
const SIDE: usize = 16;

/// One tile as it lies in memory.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Tile([u32; 256]);

const EMPTY: Tile = Tile([0; 256]);

/// Whether this machine has the unit and the system lets this process use it.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        let vectors = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        vectors && has_unit() && permitted()
    })
}

/// CPUID leaf 7: AMX-BF16 is bit 22 of EDX, AMX-TILE bit 24.
fn has_unit() -> bool {
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (1 << 22 | 1 << 24) == (1 << 22 | 1 << 24)
}

/// Linux hands out the 8 KiB of tile registers on request only (`arch_prctl`, ARCH_REQ_XCOMP_PERM, component 18).
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    // SAFETY: the call changes nothing but this process's permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1023, 18) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Whether a product is worth packing for, and lies in memory as the packing wants it: one stride of each factor is 1, and
/// the output's columns are side by side.
pub fn suits(
    (m, n, k): (usize, usize, usize),
    a: Matrix<*const f32>,
    b: Matrix<*const f32>,
    out: Matrix<*mut f32>,
) -> bool {
    let unit = |strides: (usize, usize)| strides.0 == 1 || strides.1 == 1;
    let factors = unit((a.row_stride, a.column_stride)) && unit((b.row_stride, b.column_stride));
    factors && out.column_stride == 1 && m.min(n).min(k) >= 8 && m * n * k >= 16_384 && available()
}

/// A factor: `count` rows of the left one or columns of the right one, `k` places along the sum.
#[derive(Clone, Copy)]
struct Factor {
    start: *const f32,
    /// From one row or column to the next.
    across: usize,
    /// From one place of the sum to the next.
    along: usize,
    count: usize,
    side: Left,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Left {
    Yes,
    No,
}

/// How the places along the sum are cut up: `blocks` of `pairs` pairs.
#[derive(Clone, Copy)]
struct Sum {
    k: usize,
    pairs: usize,
    blocks: usize,
}

impl Sum {
    /// Blocks as even as can be: 40 places are two blocks of 20, not 32 and 8.
    fn of(k: usize) -> Self {
        let blocks = k.div_ceil(32);
        Self { k, pairs: k.div_ceil(2 * blocks), blocks }
    }
}

/// `out [m, n] (+)= scale · a [m, k] · b [k, n]` where [`suits`].
///
/// # Safety
/// As for `real::matmul`.
pub unsafe fn matmul(
    (m, n, k): (usize, usize, usize),
    scale: f32,
    a: Matrix<*const f32>,
    b: Matrix<*const f32>,
    (out, mode): (Matrix<*mut f32>, Output),
    precision: Precision,
) {
    let a = Factor { start: a.start, across: a.row_stride, along: a.column_stride, count: m, side: Left::Yes };
    let b = Factor { start: b.start, across: b.column_stride, along: b.row_stride, count: n, side: Left::No };
    let work = Product { sum: Sum::of(k), scale, a, b, out, mode };
    // SAFETY: the caller's contract; `suits` saw that the unit is there.
    unsafe {
        match precision {
            Precision::Highest => work.run::<3>(),
            Precision::High => work.run::<2>(),
            Precision::Medium => work.run::<1>(),
        }
    }
}

struct Product {
    sum: Sum,
    scale: f32,
    a: Factor,
    b: Factor,
    out: Matrix<*mut f32>,
    mode: Output,
}

/// Tiles of packed factors.
#[derive(Default)]
struct Scratch {
    a: Vec<Tile>,
    b: Vec<Tile>,
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
        SCRATCH.with_borrow_mut(|scratch| {
            let needed = |tiles: usize| tiles * depth * PLANES;
            if scratch.a.len() < needed(LEFT_ROWS) {
                scratch.a.resize(needed(LEFT_ROWS), EMPTY);
            }
            if scratch.b.len() < needed(wide) {
                scratch.b.resize(needed(wide), EMPTY);
            }
            // SAFETY: the unit is there; the scratch holds these many tiles.
            unsafe {
                configure(self.sum.pairs);
                for left in (0..columns).step_by(wide) {
                    let width = wide.min(columns - left);
                    for first in (0..self.sum.blocks).step_by(depth) {
                        let blocks = first..(first + depth).min(self.sum.blocks);
                        self.b.pack::<PLANES>(self.sum, 1.0, left..left + width, blocks.clone(), &mut scratch.b);
                        for top in (0..rows).step_by(LEFT_ROWS) {
                            let height = LEFT_ROWS.min(rows - top);
                            self.a.pack::<PLANES>(
                                self.sum,
                                self.scale,
                                top..top + height,
                                blocks.clone(),
                                &mut scratch.a,
                            );
                            let add = self.mode == Output::Add || first > 0;
                            for column in (0..width).step_by(2) {
                                for row in (0..height).step_by(2) {
                                    let own = blocks.len() * PLANES;
                                    let (a, b) = (&scratch.a[row * own..], &scratch.b[column * own..]);
                                    let size = (2.min(height - row), 2.min(width - column));
                                    self.tiles::<PLANES>((a, b), size, own, (top + row, left + column), add);
                                }
                            }
                        }
                    }
                }
                release();
            }
        });
    }

    /// Up to 2×2 tiles of the output, the first at `at`; `own` tiles make a row of either factor.
    unsafe fn tiles<const PLANES: usize>(
        &self,
        (a, b): (&[Tile], &[Tile]),
        (height, width): (usize, usize),
        own: usize,
        at: (usize, usize),
        add: bool,
    ) {
        let mut edges = [EMPTY; 4];
        let mut places = [(std::ptr::null_mut::<u8>(), 0usize); 4];
        let size = |i: usize| {
            let (row, column) = ((at.0 + i / 2) * SIDE, (at.1 + i % 2) * SIDE);
            (row, column, SIDE.min(self.a.count.saturating_sub(row)), SIDE.min(self.b.count.saturating_sub(column)))
        };
        let used = |i: usize| i / 2 < height && i % 2 < width;
        for i in (0..4).filter(|i| used(*i)) {
            let (row, column, rows, columns) = size(i);
            let start = self.out.start.wrapping_add(row * self.out.row_stride + column);
            places[i] = if (rows, columns) == (SIDE, SIDE) {
                (start.cast(), self.out.row_stride * 4)
            } else {
                let edge = edges[i].0.as_mut_ptr();
                if add {
                    for r in 0..rows {
                        // SAFETY: row and column lie inside the output, r and columns inside the tile.
                        unsafe {
                            let from = start.add(r * self.out.row_stride).cast();
                            std::ptr::copy_nonoverlapping(from, edge.add(r * SIDE), columns);
                        }
                    }
                }
                (edge.cast(), 64)
            };
        }
        // SAFETY: a and b hold `own` tiles for each row and column of tiles; places are whole tiles.
        unsafe {
            let a = [a.as_ptr(), a.as_ptr().wrapping_add(own)];
            let b = [b.as_ptr(), b.as_ptr().wrapping_add(own)];
            match (height, width) {
                (2, 2) => multiply::<PLANES, 2, 2>(own / PLANES, a, b, places, add),
                (2, _) => multiply::<PLANES, 2, 1>(own / PLANES, a, b, places, add),
                (_, 2) => multiply::<PLANES, 1, 2>(own / PLANES, a, b, places, add),
                _ => multiply::<PLANES, 1, 1>(own / PLANES, a, b, places, add),
            }
        }
        for i in (0..4).filter(|i| used(*i)) {
            let (row, column, rows, columns) = size(i);
            if (rows, columns) == (SIDE, SIDE) {
                continue;
            }
            for r in 0..rows {
                let to = self.out.start.wrapping_add((row + r) * self.out.row_stride + column).cast();
                // SAFETY: as above.
                unsafe { std::ptr::copy_nonoverlapping(edges[i].0.as_ptr().add(r * SIDE), to, columns) };
            }
        }
    }
}

impl Factor {
    /// Rows `rows` of tiles at these blocks of the sum: `[row][block][plane]`.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn pack<const PLANES: usize>(
        self,
        sum: Sum,
        scale: f32,
        rows: std::ops::Range<usize>,
        blocks: std::ops::Range<usize>,
        to: &mut [Tile],
    ) {
        let mut to = to.chunks_exact_mut(PLANES);
        let scale = _mm512_set1_ps(scale);
        for row in rows {
            for block in blocks.clone() {
                let to = to.next().expect("the scratch has a place for every tile");
                let half = |first: usize| {
                    let places = sum.pairs.min(sum.k.saturating_sub(first));
                    // SAFETY: the caller's contract; what lies beyond `count` and `k` is not read.
                    unsafe { self.half(row * SIDE, first, places) }
                };
                let first = block * 2 * sum.pairs;
                let (low, high) = (half(first), half(first + sum.pairs));
                let used = if self.side == Left::Yes { SIDE } else { sum.pairs };
                for r in 0..used {
                    let (mut low, mut high) = (_mm512_mul_ps(low[r], scale), _mm512_mul_ps(high[r], scale));
                    for plane in to.iter_mut() {
                        let (l, h) = (rounded(low), rounded(high));
                        // The upper halves of both: l's below, h's above.
                        let pair = _mm512_or_si512(_mm512_srli_epi32::<16>(l), h);
                        // SAFETY: a tile has 16 rows of 64 bytes, and begins at a multiple of 64.
                        unsafe { _mm512_store_si512(plane.0.as_mut_ptr().add(r * SIDE).cast(), pair) };
                        low = _mm512_sub_ps(low, _mm512_castsi512_ps(l));
                        high = _mm512_sub_ps(high, _mm512_castsi512_ps(h));
                    }
                }
            }
        }
    }

    /// Half a block: the 16 rows of a tile, whose lanes are places of the sum (left factor) or columns (right factor).
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    unsafe fn half(self, first: usize, place: usize, places: usize) -> [__m512; SIDE] {
        let count = SIDE.min(self.count - first);
        let start = self.start.wrapping_add(first * self.across + place * self.along);
        let (rows, row_stride, lanes, lane_stride) = match self.side {
            Left::Yes => (count, self.across, places, self.along),
            Left::No => (places, self.along, count, self.across),
        };
        let mut vectors = [_mm512_setzero_ps(); SIDE];
        let load = |number: usize, stride: usize, width: usize, vectors: &mut [__m512; SIDE]| {
            let mask = ((1u32 << width) - 1) as u16;
            for (i, vector) in vectors.iter_mut().enumerate().take(number) {
                // SAFETY: the caller's contract; the mask leaves out what lies beyond.
                *vector = unsafe { _mm512_maskz_loadu_ps(mask, start.wrapping_add(i * stride)) };
            }
        };
        if lane_stride == 1 {
            load(rows, row_stride, lanes, &mut vectors);
            vectors
        } else {
            load(lanes, lane_stride, rows, &mut vectors);
            transposed(vectors)
        }
    }
}

/// The nearest bf16 (halves away from zero), in the upper half of each lane, the lower half 0.
#[target_feature(enable = "avx512f")]
#[inline]
fn rounded(values: __m512) -> __m512i {
    let up = _mm512_add_epi32(_mm512_castps_si512(values), _mm512_set1_epi32(0x8000));
    _mm512_and_si512(up, _mm512_set1_epi32(0xffff_0000_u32 as i32))
}

/// Rows become lanes, by quarters: pairs of lanes, then pairs of pairs, then the 4×4 of 128-bit pieces.
#[target_feature(enable = "avx512f")]
#[inline]
fn transposed(rows: [__m512; SIDE]) -> [__m512; SIDE] {
    let mut pairs = rows;
    for i in (0..SIDE).step_by(2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    let mut fours = pairs; // fours[4·q + c]: lane group g holds column 4·g + c of rows 4·q..4·q + 4
    for q in (0..SIDE).step_by(4) {
        let [a, b, c, d] = [pairs[q], pairs[q + 1], pairs[q + 2], pairs[q + 3]].map(|v| _mm512_castps_pd(v));
        fours[q] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        fours[q + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        fours[q + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        fours[q + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    let mut result = fours;
    for c in 0..4 {
        let [a, b, e, f] = [fours[c], fours[c + 4], fours[c + 8], fours[c + 12]];
        let (ab_even, ab_odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        let (ef_even, ef_odd) = (_mm512_shuffle_f32x4::<0x88>(e, f), _mm512_shuffle_f32x4::<0xdd>(e, f));
        result[c] = _mm512_shuffle_f32x4::<0x88>(ab_even, ef_even);
        result[c + 4] = _mm512_shuffle_f32x4::<0x88>(ab_odd, ef_odd);
        result[c + 8] = _mm512_shuffle_f32x4::<0xdd>(ab_even, ef_even);
        result[c + 12] = _mm512_shuffle_f32x4::<0xdd>(ab_odd, ef_odd);
    }
    result
}

/// Sets the sizes of the eight tile registers: 0–3 outputs, 4 and 5 left factors, 6 and 7 right factors.
unsafe fn configure(pairs: usize) {
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes: [u16; 16],
        rows: [u8; 16],
    }
    let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
    config.bytes[..8].fill(64);
    config.rows[..8].fill(16);
    config.bytes[4..6].fill(pairs as u16 * 4);
    config.rows[6..8].fill(pairs as u8);
    // SAFETY: the unit is there; the sizes are within palette 1's 16 rows of 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
}

/// Gives the tile registers back, so that the system need not save them.
unsafe fn release() {
    // SAFETY: the unit is there.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

macro_rules! load {
    ($register:literal, $from:expr) => {
        asm!(concat!("tileloadd ", $register, ", [{from} + {stride}]"), from = in(reg) $from, stride = in(reg) 64usize,
            options(nostack, readonly))
    };
}

macro_rules! dot {
    ($out:literal, $a:literal, $b:literal) => {
        asm!(concat!("tdpbf16ps ", $out, ", ", $a, ", ", $b), options(nostack, nomem))
    };
}

/// `blocks` products of H×W output tiles: `[block][plane]` tiles of each factor, in order of size within a block.
unsafe fn multiply<const PLANES: usize, const H: usize, const W: usize>(
    blocks: usize,
    a: [*const Tile; 2],
    b: [*const Tile; 2],
    out: [(*mut u8, usize); 4],
    add: bool,
) {
    macro_rules! output {
        ($number:literal, $register:literal) => {
            if $number / 2 < H && $number % 2 < W {
                let (at, stride) = out[$number];
                if add {
                    asm!(concat!("tileloadd ", $register, ", [{at} + {stride}]"), at = in(reg) at, stride = in(reg) stride,
                        options(nostack, readonly))
                } else {
                    asm!(concat!("tilezero ", $register), options(nostack, nomem))
                }
            }
        };
    }
    macro_rules! store {
        ($number:literal, $register:literal) => {
            if $number / 2 < H && $number % 2 < W {
                let (at, stride) = out[$number];
                asm!(concat!("tilestored [{at} + {stride}], ", $register), at = in(reg) at, stride = in(reg) stride,
                    options(nostack))
            }
        };
    }
    // SAFETY: the caller's contract: each factor has blocks·PLANES tiles for each of its rows, outputs are whole tiles.
    unsafe {
        output!(0, "tmm0");
        output!(1, "tmm1");
        output!(2, "tmm2");
        output!(3, "tmm3");
        for block in 0..blocks {
            let left = |plane: usize| {
                load!("tmm4", a[0].add(block * PLANES + plane));
                if H == 2 {
                    load!("tmm5", a[1].add(block * PLANES + plane));
                }
            };
            let right = |plane: usize| {
                load!("tmm6", b[0].add(block * PLANES + plane));
                if W == 2 {
                    load!("tmm7", b[1].add(block * PLANES + plane));
                }
            };
            let multiply = || {
                dot!("tmm0", "tmm4", "tmm6");
                if W == 2 {
                    dot!("tmm1", "tmm4", "tmm7");
                }
                if H == 2 {
                    dot!("tmm2", "tmm5", "tmm6");
                }
                if H == 2 && W == 2 {
                    dot!("tmm3", "tmm5", "tmm7");
                }
            };
            // Each change of factor loads one side only.
            left(0);
            if PLANES == 3 {
                right(2);
                multiply();
            }
            if PLANES >= 2 {
                right(1);
                multiply();
            }
            right(0);
            multiply();
            if PLANES == 3 {
                left(2);
                multiply();
            }
            if PLANES >= 2 {
                left(1);
                multiply();
            }
            if PLANES == 3 {
                right(1);
                multiply();
            }
        }
        store!(0, "tmm0");
        store!(1, "tmm1");
        store!(2, "tmm2");
        store!(3, "tmm3");
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
            assert!(suits((m, n, k), left, right, target));
            // SAFETY: the matrices are as large as said.
            unsafe { matmul((m, n, k), 0.25, left, right, (target, mode), precision) };
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
            [(32, 32, 32), (16, 16, 64), (17, 33, 40), (200, 40, 1000), (8, 300, 129), (131, 8, 77), (70, 450, 450)];
        for shape in shapes {
            for (precision, bound) in [(Precision::Highest, 3e-7), (Precision::High, 2e-5), (Precision::Medium, 5e-3)] {
                let error = largest_error(shape, precision);
                assert!(error < bound, "{shape:?} {precision:?}: {error:e}");
            }
        }
    }
}

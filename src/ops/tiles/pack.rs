//! Factors of products as tiles of bf16 planes.

use std::arch::x86_64::*;
use std::ops::Range;

use super::memory::Line;
use super::{LINES, SIDE, Tile};

/// How the places along a sum are cut up: `blocks` of `pairs` pairs.
#[derive(Clone, Copy)]
pub struct Sum {
    pub k: usize,
    pub pairs: usize,
    pub blocks: usize,
}

impl Sum {
    /// Blocks as even as can be: 40 places are two blocks of 20, not 32 and 8.
    pub fn of(k: usize) -> Self {
        let blocks = k.div_ceil(32);
        Self { k, pairs: k.div_ceil(2 * blocks), blocks }
    }

    /// Blocks of whole tiles, the last one filled up.
    pub fn in_tiles(k: usize) -> Self {
        Self { k, pairs: SIDE, blocks: k.div_ceil(2 * SIDE) }
    }
}

/// A factor: `count` rows of the left one or columns of the right one, places along the sum.
#[derive(Clone, Copy)]
pub struct Factor {
    pub start: *const f32,
    /// From one row or column to the next.
    pub across: usize,
    /// From one place of the sum to the next.
    pub along: usize,
    pub count: usize,
    pub side: Side,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Left,
    Right,
}

impl Factor {
    /// Rows `rows` of tiles at these blocks of the sum, times `scale`, as `[row][block][plane]`. Rows of a left factor's
    /// last tile beyond `count` are left as they are: they give rows of the output that nobody reads.
    ///
    /// # Safety
    /// The machine has AVX-512, and the factor lies inside its allocation.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub unsafe fn pack<const PLANES: usize>(
        self,
        sum: Sum,
        scale: f32,
        (rows, blocks): (Range<usize>, Range<usize>),
        to: &mut [Tile],
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            if scale == 1.0 {
                self.pack_all::<PLANES, false>(sum, 1.0, (rows, blocks), to);
            } else {
                self.pack_all::<PLANES, true>(sum, scale, (rows, blocks), to);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn pack_all<const PLANES: usize, const IS_SCALED: bool>(
        self,
        sum: Sum,
        scale: f32,
        (rows, blocks): (Range<usize>, Range<usize>),
        to: &mut [Tile],
    ) {
        let scale = _mm512_set1_ps(scale);
        // In the order in which they lie in memory.
        let (n_rows, n_blocks) = (rows.len(), blocks.len());
        let by_rows = self.across > self.along;
        for i in 0..n_rows * n_blocks {
            let (row, block) = if by_rows { (i / n_blocks, i % n_blocks) } else { (i % n_rows, i / n_rows) };
            let to = &mut to[(row * n_blocks + block) * PLANES..][..PLANES];
            let from = ((rows.start + row) * SIDE, (blocks.start + block) * 2 * sum.pairs);
            // SAFETY: the caller's contract.
            unsafe { self.tile::<PLANES, IS_SCALED>(sum, scale, from, to) };
        }
    }

    /// The tile of 16 rows or columns from `first` on and a block of the sum from `place` on.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    unsafe fn tile<const PLANES: usize, const IS_SCALED: bool>(
        self,
        sum: Sum,
        scale: __m512,
        (first, place): (usize, usize),
        to: &mut [Tile],
    ) {
        let count = SIDE.min(self.count - first);
        let places = [place, place + sum.pairs].map(|place| sum.pairs.min(sum.k.saturating_sub(place)));
        let start = self.start.wrapping_add(first * self.across + place * self.along);
        let starts = [start, start.wrapping_add(sum.pairs * self.along)];
        // What lies beyond `count` and `k` is masked out.
        let (rows, row_stride, lane_stride) = match self.side {
            Side::Left => ([count; 2], self.across, self.along),
            Side::Right => (places, self.along, self.across),
        };
        let masks = match self.side {
            Side::Left => places.map(first_lanes),
            Side::Right => [first_lanes(count); 2],
        };
        let n_rows = if self.side == Side::Left { count } else { sum.pairs };
        if lane_stride == 1 {
            for row in 0..n_rows {
                // A right factor's second half may have fewer places.
                let [m0, m1] = [if row < rows[0] { masks[0] } else { 0 }, if row < rows[1] { masks[1] } else { 0 }];
                // SAFETY: the caller's contract; lanes beyond are masked out; a tile has 16 rows.
                unsafe {
                    let low = _mm512_maskz_loadu_ps(m0, starts[0].wrapping_add(row * row_stride));
                    let high = _mm512_maskz_loadu_ps(m1, starts[1].wrapping_add(row * row_stride));
                    store_scaled::<PLANES, IS_SCALED>((low, high), scale, to, row);
                }
            }
            return;
        }
        let lanes = match self.side {
            Side::Left => places,
            Side::Right => [count; 2],
        };
        // SAFETY: as above.
        let (low, high) = unsafe {
            if row_stride == 1 {
                let [m0, m1] = rows.map(first_lanes);
                (columns(starts[0], (lanes[0], lane_stride), m0), columns(starts[1], (lanes[1], lane_stride), m1))
            } else {
                (
                    scattered(starts[0], (rows[0], row_stride), lane_stride, masks[0]),
                    scattered(starts[1], (rows[1], row_stride), lane_stride, masks[1]),
                )
            }
        };
        for row in 0..n_rows {
            // SAFETY: a tile has 16 rows.
            unsafe { store_scaled::<PLANES, IS_SCALED>((low[row], high[row]), scale, to, row) };
        }
    }
}

/// [`store_row`] of values times `scale`.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store_scaled<const PLANES: usize, const IS_SCALED: bool>(
    (mut low, mut high): (__m512, __m512),
    scale: __m512,
    tiles: &mut [Tile],
    row: usize,
) {
    if IS_SCALED {
        (low, high) = (_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale));
    }
    // SAFETY: the caller's contract.
    unsafe { store_row::<PLANES>(low, high, tiles, row) };
}

/// A mask of the first `lanes` of 16 lanes.
pub fn first_lanes(lanes: usize) -> u16 {
    ((1u32 << lanes) - 1) as u16
}

/// Rows of 16 lanes from memory in which lanes are `stride` apart and rows side by side.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn columns(start: *const f32, (lanes, stride): (usize, usize), rows: u16) -> [__m512; SIDE] {
    let mut vectors = [_mm512_setzero_ps(); SIDE];
    for (lane, vector) in vectors.iter_mut().enumerate().take(lanes) {
        // SAFETY: the caller's contract.
        *vector = unsafe { _mm512_maskz_loadu_ps(rows, start.wrapping_add(lane * stride)) };
    }
    transposed(vectors)
}

/// Rows of 16 lanes from memory in which neither are side by side.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn scattered(
    start: *const f32,
    (rows, row_stride): (usize, usize),
    lane_stride: usize,
    lanes: u16,
) -> [__m512; SIDE] {
    let counting = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let offsets = _mm512_mullo_epi32(counting, _mm512_set1_epi32(lane_stride as i32));
    let mut vectors = [_mm512_setzero_ps(); SIDE];
    for (row, vector) in vectors.iter_mut().enumerate().take(rows) {
        let from = start.wrapping_add(row * row_stride);
        // SAFETY: the caller's contract.
        *vector = unsafe { _mm512_mask_i32gather_ps::<4>(_mm512_setzero_ps(), lanes, offsets, from) };
    }
    vectors
}

/// Writes the bf16 planes of two vectors, the first in the lower halves of the lanes, a line each, `plane_stride` lines
/// apart.
///
/// # Safety
/// These lines are the caller's to write.
#[target_feature(enable = "avx512f")]
#[inline]
pub unsafe fn store_planes<const PLANES: usize>(mut low: __m512, mut high: __m512, to: *mut Line, plane_stride: usize) {
    for plane in 0..PLANES {
        let (l, h) = (whole::<PLANES>(low, plane), whole::<PLANES>(high, plane));
        // SAFETY: the caller's contract; a line is 64 bytes at a multiple of 64.
        unsafe { _mm512_store_si512(to.add(plane * plane_stride).cast(), upper_halves(l, h)) };
        low = _mm512_sub_ps(low, _mm512_castsi512_ps(upper(l)));
        high = _mm512_sub_ps(high, _mm512_castsi512_ps(upper(h)));
    }
}

/// [`store_planes`] into a row of a tile of every plane.
///
/// # Safety
/// There are `PLANES` tiles and the row is one of 16.
#[target_feature(enable = "avx512f")]
#[inline]
pub unsafe fn store_row<const PLANES: usize>(low: __m512, high: __m512, tiles: &mut [Tile], row: usize) {
    debug_assert!(tiles.len() >= PLANES && row < SIDE);
    // SAFETY: the caller's contract; tiles are lines side by side.
    unsafe { store_planes::<PLANES>(low, high, tiles.as_mut_ptr().cast::<Line>().add(row), LINES) };
}

/// Calls `f(plane, values)` with the bf16 planes of one vector.
#[target_feature(enable = "avx512f")]
#[inline]
pub fn split_one<const PLANES: usize>(mut values: __m512, mut f: impl FnMut(usize, __m256i)) {
    for plane in 0..PLANES {
        let bits = whole::<PLANES>(values, plane);
        f(plane, _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits)));
        values = _mm512_sub_ps(values, _mm512_castsi512_ps(upper(bits)));
    }
}

/// What is left of the values when it is a plane's turn, the plane's bf16 in the upper half of each lane. Rounded to the
/// nearest (halves away from zero) where that loses the rest; of three planes in the first alone: its rest has no more than
/// 16 significant bits and both signs, so that the second plane can be cut off, the third is all that remains, and the
/// products that are left out favour neither side.
#[target_feature(enable = "avx512f")]
#[inline]
fn whole<const PLANES: usize>(rest: __m512, plane: usize) -> __m512i {
    let bits = _mm512_castps_si512(rest);
    if PLANES == 3 && plane > 0 { bits } else { _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)) }
}

/// The upper half of each lane, the lower half 0.
#[target_feature(enable = "avx512f")]
#[inline]
fn upper(bits: __m512i) -> __m512i {
    _mm512_and_si512(bits, _mm512_set1_epi32(UPPER))
}

/// The upper halves of two vectors' lanes, the first's below the second's.
#[target_feature(enable = "avx512f")]
#[inline]
fn upper_halves(low: __m512i, high: __m512i) -> __m512i {
    // (high & UPPER) | low: of the truth table's index a is bit 2, b bit 1, c bit 0.
    const A_AND_B_OR_C: i32 = 0b1110_1010;
    _mm512_ternarylogic_epi32::<A_AND_B_OR_C>(high, _mm512_set1_epi32(UPPER), _mm512_srli_epi32::<16>(low))
}

const UPPER: i32 = 0xffff_0000_u32 as i32;

/// Rows become lanes: pairs of lanes, then pairs of pairs, then the 4×4 of 128-bit pieces.
#[target_feature(enable = "avx512f")]
#[inline]
pub fn transposed(rows: [__m512; SIDE]) -> [__m512; SIDE] {
    let mut pairs = rows;
    for i in (0..SIDE).step_by(2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    let mut fours = pairs; // fours[4·q + c]: piece g holds column 4·g + c of rows 4·q..4·q + 4
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

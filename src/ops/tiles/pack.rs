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
        let mut to = to.chunks_exact_mut(PLANES);
        let scale = _mm512_set1_ps(scale);
        for row in rows {
            for block in blocks.clone() {
                let to = to.next().expect("there is a place for every tile");
                // SAFETY: the caller's contract.
                unsafe { self.tile::<PLANES>(sum, scale, (row * SIDE, block * 2 * sum.pairs), to) };
            }
        }
    }

    /// The tile of 16 rows or columns from `first` on and a block of the sum from `place` on.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    unsafe fn tile<const PLANES: usize>(
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
        if lane_stride == 1 {
            for row in 0..if self.side == Side::Left { count } else { sum.pairs } {
                let load = |half: usize| {
                    // A right factor's second half may have fewer places.
                    let mask = if row < rows[half] { masks[half] } else { 0 };
                    // SAFETY: the caller's contract; lanes beyond are masked out.
                    unsafe { _mm512_maskz_loadu_ps(mask, starts[half].wrapping_add(row * row_stride)) }
                };
                let (low, high) = (_mm512_mul_ps(load(0), scale), _mm512_mul_ps(load(1), scale));
                // SAFETY: a tile has 16 rows.
                unsafe { store_row::<PLANES>(low, high, to, row) };
            }
            return;
        }
        let lanes = match self.side {
            Side::Left => places,
            Side::Right => [count; 2],
        };
        // SAFETY: as above.
        let halves = unsafe {
            [0, 1].map(|half| {
                if row_stride == 1 {
                    columns(starts[half], (lanes[half], lane_stride), first_lanes(rows[half]))
                } else {
                    scattered(starts[half], (rows[half], row_stride), lane_stride, masks[half])
                }
            })
        };
        let rows = halves[0].into_iter().zip(halves[1]).enumerate();
        for (row, (low, high)) in rows.take(if self.side == Side::Left { SIDE } else { sum.pairs }) {
            // SAFETY: a tile has 16 rows.
            unsafe { store_row::<PLANES>(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale), to, row) };
        }
    }
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
        let (l, h) = (rounded(low), rounded(high));
        let pairs = _mm512_or_si512(_mm512_srli_epi32::<16>(l), h);
        // SAFETY: the caller's contract; a line is 64 bytes at a multiple of 64.
        unsafe { _mm512_store_si512(to.add(plane * plane_stride).cast(), pairs) };
        low = _mm512_sub_ps(low, _mm512_castsi512_ps(l));
        high = _mm512_sub_ps(high, _mm512_castsi512_ps(h));
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
        let upper = rounded(values);
        f(plane, _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(upper)));
        values = _mm512_sub_ps(values, _mm512_castsi512_ps(upper));
    }
}

/// The nearest bf16 (halves away from zero), in the upper half of each lane, the lower half 0.
#[target_feature(enable = "avx512f")]
#[inline]
fn rounded(values: __m512) -> __m512i {
    let up = _mm512_add_epi32(_mm512_castps_si512(values), _mm512_set1_epi32(0x8000));
    _mm512_and_si512(up, _mm512_set1_epi32(0xffff_0000_u32 as i32))
}

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

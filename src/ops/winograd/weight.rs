//! The transform of a weight, as a right factor at each point, and the way back for its gradient.

#![allow(clippy::needless_range_loop)] // two indices run side by side

use std::ops::Range;

use super::{POINTS, TAPS};
use crate::ops::buffer::unwritten;
use crate::ops::lanes::{LANES, Lanes};
use crate::ops::parallel::{self, Disjoint};
use crate::ops::product::{Matrix, Panels};
use crate::ops::real::{Real, vectorised};
use crate::ops::transpose::transpose;

/// What the weight `[out, c, 3, 3]` is multiplied for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    Forward,
    /// With the kernel turned round in both directions, from `out` channels to `c`.
    InputGradient,
}

impl Pass {
    /// Which of the weight's nine taps stands at this row and column of the kernel.
    #[inline(always)]
    pub fn tap(self, row: usize, column: usize) -> usize {
        let tap = row * 3 + column;
        if self == Self::InputGradient { TAPS - 1 - tap } else { tap }
    }
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
        let mut taps = unwritten(TAPS * c); // [9, c]
        for (weight, output) in weight.chunks_exact(TAPS * c).zip(outputs) {
            // SAFETY: both have nine times c values.
            unsafe { transpose((c, TAPS), (weight.as_ptr(), TAPS), (taps.as_mut_ptr(), c), T::ONE) };
            for channel in (0..c).step_by(LANES) {
                let g = |i: usize, j: usize| Lanes::load(&taps[pass.tap(i, j) * c..][..c], channel);
                at_points(g, |point, value| {
                    let to = (point * out + output) * c + channel;
                    let width = LANES.min(c - channel);
                    // SAFETY: these output channels of u are this thread's; to + width lies in their row.
                    value.store(unsafe { std::slice::from_raw_parts_mut(u.at(to), width) });
                });
            }
        }
    }
}

/// A transformed weight as a right factor at each point.
pub struct Factor<T> {
    u: Vec<T>,
    /// In, out, of the pass.
    channels: (usize, usize),
    pass: Pass,
}

impl<T: Real> Factor<T> {
    pub fn new(weight: &[T], (c, out): (usize, usize), pass: Pass) -> Self {
        let channels = if pass == Pass::Forward { (c, out) } else { (out, c) };
        Self { u: transformed(weight, channels, pass), channels: (c, out), pass } // [16, out, c] as the weight has them
    }

    /// `[c, out]` from an output channel on.
    pub fn at(&self, point: usize, column: usize) -> Matrix<*const T> {
        let (c, out) = self.channels;
        let u = &self.u[point * c * out..][..c * out];
        match self.pass {
            Pass::Forward => Matrix::rows(&u[column * c..], c).transposed(),
            Pass::InputGradient => Matrix::rows(&u[column..], out),
        }
    }

    pub fn panels(&self) -> Vec<Panels<T>> {
        let (c, out) = self.channels;
        // SAFETY: at each point u has c·out values.
        let pack = |point| unsafe { Panels::pack(self.at(point, 0), c, out) };
        parallel::map(POINTS, 1, |points| points.map(pack).collect::<Vec<_>>()).into_iter().flatten().collect()
    }
}

/// G·g·Gᵀ of g(row, column), each of its values handed out with its point.
#[inline(always)]
pub fn at_points<T: Real>(g: impl Fn(usize, usize) -> Lanes<T>, mut hand_out: impl FnMut(usize, Lanes<T>)) {
    let mut tall = [[Lanes::all(T::ZERO); 4]; 3];
    for j in 0..3 {
        tall[j] = spread_weight([g(0, j), g(1, j), g(2, j)]);
    }
    for i in 0..4 {
        let points = spread_weight([tall[0][i], tall[1][i], tall[2][i]]);
        for j in 0..4 {
            hand_out(i * 4 + j, points[j]);
        }
    }
}

/// Gᵀ·u·G of u(point), each of its values handed out with its tap.
#[inline(always)]
pub fn at_taps<T: Real>(u: impl Fn(usize) -> Lanes<T>, mut hand_out: impl FnMut(usize, Lanes<T>)) {
    let mut tall = [[Lanes::all(T::ZERO); 3]; 4];
    for j in 0..4 {
        tall[j] = mix_weight([u(j), u(4 + j), u(8 + j), u(12 + j)]);
    }
    for i in 0..3 {
        let row = mix_weight([tall[0][i], tall[1][i], tall[2][i], tall[3][i]]);
        for j in 0..3 {
            hand_out(i * 3 + j, row[j]);
        }
    }
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

/// Gᵀ·du·G, du `[parts, 16, out, c]` summed over its parts.
pub fn gathered<T: Real>(du: &[T], (c, out): (usize, usize)) -> Vec<T> {
    let mut dw = unwritten(TAPS * c * out);
    parallel::for_rows(&mut dw, TAPS * c, 1, |outputs, dw| gather_weight(dw, du, outputs, (c, out)));
    dw
}

vectorised! {
    /// Gᵀ·du·G for these output channels, du summed over its parts.
    fn gather_weight[T: Real](dw: &mut [T], du: &[T], outputs: Range<usize>, channels: (usize, usize)) {
        let (c, out) = channels;
        let mut taps = unwritten(TAPS * c); // [9, c]
        for (dw, output) in dw.chunks_exact_mut(TAPS * c).zip(outputs) {
            for channel in (0..c).step_by(LANES) {
                let u = |point: usize| {
                    let mut sum = Lanes::all(T::ZERO);
                    for part in du.chunks_exact(POINTS * c * out) {
                        sum = sum + Lanes::load(&part[(point * out + output) * c..][..c], channel);
                    }
                    sum
                };
                at_taps(u, |tap, value| {
                    let to = tap * c + channel;
                    value.store(&mut taps[to..to + LANES.min(c - channel)]);
                });
            }
            // SAFETY: both have nine times c values.
            unsafe { transpose((TAPS, c), (taps.as_ptr(), c), (dw.as_mut_ptr(), TAPS), T::ONE) };
        }
    }
}

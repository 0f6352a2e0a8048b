//! Cholesky factorisation of a symmetric positive definite matrix, and the solves that follow from it.

use anyhow::{Result, ensure};
use rayon::prelude::*;

/// Columns factored together: their rows stay in the second-level cache while all rows below are updated.
const BLOCK: usize = 64;

/// The lower triangle L with A = L·Lᵀ, row-major `[n, n]` (above the diagonal whatever A had there).
pub struct Cholesky {
    n: usize,
    lower: Vec<f64>,
}

impl Cholesky {
    /// Factors `matrix`, `[n, n]`, of which only the lower triangle is read.
    pub fn factor(matrix: Vec<f64>, n: usize) -> Result<Self> {
        assert_eq!(matrix.len(), n * n, "a square matrix");
        let mut lower = matrix;
        for first in (0..n).step_by(BLOCK) {
            let last = (first + BLOCK).min(n);
            for row in first..last {
                let (above, rest) = lower.split_at_mut(row * n);
                eliminate(above, &mut rest[..n], first..row, n);
                let pivot = rest[row] - dot(&rest[..row], &rest[..row]);
                ensure!(pivot > 0.0, "matrix is not positive definite at row {row}; raise the ridge");
                rest[row] = pivot.sqrt();
            }
            let (above, below) = lower.split_at_mut(last * n);
            below.par_chunks_mut(n).for_each(|row| eliminate(above, row, first..last, n));
        }
        Ok(Self { n, lower })
    }

    /// L⁻¹·v, in place.
    pub fn solve_lower(&self, v: &mut [f64]) {
        for i in 0..self.n {
            let row = &self.lower[i * self.n..][..self.n];
            v[i] = (v[i] - dot(&row[..i], &v[..i])) / row[i];
        }
    }

    /// A⁻¹·v, in place.
    pub fn solve(&self, v: &mut [f64]) {
        self.solve_lower(v);
        self.solve_upper(v);
    }

    /// L⁻ᵀ·v, in place.
    pub fn solve_upper(&self, v: &mut [f64]) {
        for i in (0..self.n).rev() {
            let row = &self.lower[i * self.n..][..self.n];
            let (before, from) = v.split_at_mut(i);
            from[0] /= row[i];
            before.iter_mut().zip(row).for_each(|(v, l)| *v -= from[0] * l);
        }
    }
}

/// Entries `columns` of one row of L, given the finished rows `above` and the row's entries before them.
fn eliminate(above: &[f64], row: &mut [f64], columns: std::ops::Range<usize>, n: usize) {
    for c in columns {
        let other = &above[c * n..][..n];
        row[c] = (row[c] - dot(&row[..c], &other[..c])) / other[c];
    }
}

/// Eight running sums, so that the additions vectorise.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for lane in 0..8 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f64>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// B·Bᵀ + I for a random B: larger than a block, so that every branch runs.
    fn positive(n: usize) -> Vec<f64> {
        let mut rng = Rng::new(1, "cholesky test", 0);
        let b: Vec<f64> = (0..n * n).map(|_| rng.normal()).collect();
        let mut a = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..n {
                a[i * n + j] = dot(&b[i * n..][..n], &b[j * n..][..n]) + if i == j { 1.0 } else { 0.0 };
            }
        }
        a
    }

    #[test]
    fn solving_undoes_the_matrix() {
        let n = 150;
        let a = positive(n);
        let expected: Vec<f64> = (0..n).map(|i| (i as f64 * 0.37).sin()).collect();
        let mut v: Vec<f64> = (0..n).map(|i| dot(&a[i * n..][..n], &expected)).collect();
        Cholesky::factor(a, n).unwrap().solve(&mut v);
        let error = v.iter().zip(&expected).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
        assert!(error < 1e-8, "{error}");
    }

    #[test]
    fn the_lower_solve_whitens() {
        // |L⁻¹·v|² = vᵀ·A⁻¹·v for every v.
        let n = 70;
        let factor = Cholesky::factor(positive(n), n).unwrap();
        let v: Vec<f64> = (0..n).map(|i| (i as f64).cos()).collect();
        let (mut half, mut whole) = (v.clone(), v.clone());
        factor.solve_lower(&mut half);
        factor.solve(&mut whole);
        let (left, right) = (dot(&half, &half), dot(&v, &whole));
        assert!((left - right).abs() < 1e-9 * right.abs(), "{left} {right}");
    }

    #[test]
    fn fails_when_the_matrix_is_indefinite() {
        assert!(Cholesky::factor(vec![1.0, 2.0, 2.0, 1.0], 2).is_err());
    }
}

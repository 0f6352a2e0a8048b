//! Linear discriminants of labelled feature vectors by ridge regression: closed form, nothing to tune but the ridge.

use anyhow::Result;
use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::cholesky::Cholesky;

/// Scores of every class as a linear function of the features.
pub struct Discriminant {
    /// `[1, width]`
    mean: Tensor,
    /// `[width, classes]`
    weight: Tensor,
}

impl Discriminant {
    /// The least-squares fit of `targets`, with `ridge` (in units of the features' mean variance) on the squared weights.
    ///
    /// # Shapes
    /// - features `[k, width]`, targets `[k, classes]`
    pub fn fit(features: &Tensor, targets: &Tensor, ridge: f64) -> Result<Self> {
        let (k, width) = features.dims2()?;
        let classes = targets.dim(1)?;
        let mean = features.mean_keepdim(0)?;
        let centred = features.broadcast_sub(&mean)?;
        let targets = targets.broadcast_sub(&targets.mean_keepdim(0)?)?;

        // (XᵀX/k + ridge)·W = XᵀY/k: the products in f32, the solve in f64.
        let gram = (centred.t()?.matmul(&centred)? / k as f64)?; // [width, width]
        let mut gram = gram.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let variance = (0..width).map(|i| gram[i * width + i]).sum::<f64>() / width as f64;
        // The tiny constant keeps the matrix definite where all features are the same.
        (0..width).for_each(|i| gram[i * width + i] += ridge * variance + 1e-12);
        let factor = Cholesky::factor(gram, width)?;

        let correlation = (targets.t()?.matmul(&centred)? / k as f64)?; // [classes, width]
        let mut weight = correlation.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        weight.par_iter_mut().for_each(|row| factor.solve(row));
        let weight = Tensor::from_vec(weight.concat(), (classes, width), features.device())?;
        Ok(Self { mean, weight: weight.to_dtype(DType::F32)?.t()?.contiguous()? })
    }

    /// # Shapes
    /// - features `[k, width]` → `[k, classes]`
    pub fn scores(&self, features: &Tensor) -> Result<Tensor> {
        Ok(features.broadcast_sub(&self.mean)?.matmul(&self.weight)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn finds_the_linear_map_behind_its_targets() {
        let mut rng = Rng::new(2, "discriminant test", 0);
        let features = rng.normal_tensor(&[200, 6]).unwrap();
        let map = rng.normal_tensor(&[6, 3]).unwrap();
        let targets = features.matmul(&map).unwrap();
        let fitted = Discriminant::fit(&features, &targets, 1e-7).unwrap();
        let error = (fitted.weight - map).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error < 1e-4, "{error}");
    }

    #[test]
    fn a_great_ridge_shrinks_every_score() {
        let mut rng = Rng::new(3, "discriminant test", 0);
        let (features, targets) = (rng.normal_tensor(&[50, 4]).unwrap(), rng.normal_tensor(&[50, 2]).unwrap());
        let fitted = Discriminant::fit(&features, &targets, 1e6).unwrap();
        let largest = fitted.scores(&features).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(largest < 1e-4, "{largest}");
    }
}

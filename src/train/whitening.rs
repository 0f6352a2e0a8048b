//! Latents whose channels carry alike: a linear map folded into the VAE's 1×1 convolutions on either side of the latents.
//!
//! A VAE is free to put nearly all variance into a few directions: the toybox's first had 60 % in one of sixteen, the
//! brightness of the place, and what a toy looks like in directions of a hundredth of that. Diffusion noise then hides the
//! toy until the last few of a thousand timesteps. The map z' = L⁻¹(z − μ), with L·Lᵀ the latents' covariance (and a little
//! of the identity, so that directions without content are not blown up), changes no decoded picture.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};

/// Share of the mean variance that is added to every direction's.
const FLOOR: f64 = 0.1;

/// Row-major square matrix.
type Matrix = Vec<Vec<f64>>;

/// The weights of a VAE with the map for `latents` folded in.
///
/// # Shapes
/// - latents `[b, c, h, w]`: unscaled means of sample pictures
pub fn whitened(vae: &BTreeMap<String, Tensor>, latents: &Tensor) -> Result<BTreeMap<String, Tensor>> {
    let c = latents.dim(1)?;
    let rows = latents.permute((0, 2, 3, 1))?.reshape(((), c))?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let mean = rows.mean(0)?.to_vec1::<f64>()?;
    let centred = rows.broadcast_sub(&rows.mean_keepdim(0)?)?;
    let mut covariance = (centred.t()?.matmul(&centred)? / rows.dim(0)? as f64)?.to_vec2::<f64>()?;
    let floor = FLOOR * (0..c).map(|i| covariance[i][i]).sum::<f64>() / c as f64;
    (0..c).for_each(|i| covariance[i][i] += floor);
    let lower = cholesky(&covariance)?;
    let inverse = inverse_of_lower(&lower);

    let mut weights = vae.clone();
    let mut change = |name: &str, f: &dyn Fn(Matrix) -> Matrix| -> Result<()> {
        let old = weights.get(name).with_context(|| format!("the VAE has no {name}"))?;
        let (shape, device, dtype) = (old.shape().clone(), old.device().clone(), old.dtype());
        let flat = old.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.reshape((old.dim(0)?, ()))?; // [out, in]
        let new: Vec<f64> = f(flat.to_vec2::<f64>()?).concat();
        let new = Tensor::from_vec(new, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(&device)?;
        weights.insert(name.into(), new);
        Ok(())
    };
    // The encoder's side: rows 0..c give the means, rows c..2c the log-variances. Noise that was alike in all channels has
    // Σ_j (L⁻¹)²_ij times its variance behind the map.
    let means_mapped = |m: Matrix| [product(&inverse, &m[..c]), m[c..].to_vec()].concat();
    change("quant_conv.weight", &means_mapped)?;
    change("quant_conv.bias", &|mut bias| {
        (0..c).for_each(|i| bias[i][0] -= mean[i]);
        let mut mapped = means_mapped(bias);
        for (row, inverse) in mapped[c..].iter_mut().zip(&inverse) {
            row[0] += inverse.iter().map(|v| v * v).sum::<f64>().ln();
        }
        mapped
    })?;
    // The decoder's side undoes it: z = L·z' + μ. Its bias takes the old weight times μ.
    let old = vae.get("post_quant_conv.weight").context("the VAE has no post_quant_conv.weight")?;
    let old = old.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.reshape((c, c))?.to_vec2::<f64>()?;
    let offset: Vec<f64> = old.iter().map(|row| row.iter().zip(&mean).map(|(w, m)| w * m).sum()).collect();
    change("post_quant_conv.weight", &|m| product(&m, &lower))?;
    change("post_quant_conv.bias", &|bias| bias.iter().zip(&offset).map(|(b, o)| vec![b[0] + o]).collect())?;
    Ok(weights)
}

fn product(a: &[Vec<f64>], b: &[Vec<f64>]) -> Matrix {
    let row = |a: &Vec<f64>| (0..b[0].len()).map(|j| a.iter().zip(b).map(|(a, b)| a * b[j]).sum()).collect();
    a.iter().map(row).collect()
}

/// L with L·Lᵀ = `matrix`.
fn cholesky(matrix: &[Vec<f64>]) -> Result<Matrix> {
    let n = matrix.len();
    let mut lower = vec![vec![0.0; n]; n];
    for i in 0..n {
        for j in 0..=i {
            let rest = matrix[i][j] - (0..j).map(|k| lower[i][k] * lower[j][k]).sum::<f64>();
            if i == j {
                ensure!(rest > 0.0, "the latents have no variance; the autoencoder has learnt nothing yet");
                lower[i][i] = rest.sqrt();
            } else {
                lower[i][j] = rest / lower[j][j];
            }
        }
    }
    Ok(lower)
}

/// Row by row: the i-th is (e_i − Σ_{k<i} L_ik · row k) / L_ii.
fn inverse_of_lower(lower: &[Vec<f64>]) -> Matrix {
    let mut inverse: Matrix = Vec::with_capacity(lower.len());
    for (i, factors) in lower.iter().enumerate() {
        let mut row = vec![0.0; lower.len()];
        row[i] = 1.0;
        for (factor, known) in factors.iter().zip(&inverse) {
            row.iter_mut().zip(known).for_each(|(value, known)| *value -= factor * known);
        }
        row.iter_mut().for_each(|value| *value /= factors[i]);
        inverse.push(row);
    }
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn the_factor_and_its_inverse_give_the_matrix_back() {
        let matrix = vec![vec![4.0, 2.0, 0.4], vec![2.0, 5.0, -1.0], vec![0.4, -1.0, 3.0]];
        let lower = cholesky(&matrix).unwrap();
        let transposed: Matrix = (0..3).map(|j| lower.iter().map(|row| row[j]).collect()).collect();
        let (square, unit) = (product(&lower, &transposed), product(&inverse_of_lower(&lower), &lower));
        for i in 0..3 {
            for j in 0..3 {
                assert!((square[i][j] - matrix[i][j]).abs() < 1e-12);
                assert!((unit[i][j] - f64::from(i == j)).abs() < 1e-12);
            }
        }
        assert!(cholesky(&[vec![0.0]]).is_err());
    }

    /// One strong direction becomes one among others, and what follows the latents sees no difference.
    #[test]
    fn channels_carry_alike_and_the_decoder_sees_what_it_saw() {
        let (c, cpu) = (2, Device::Cpu);
        let mut rng = Rng::new(0, "test", 0);
        let mut weight = |shape: &[usize]| rng.normal_tensor(shape).unwrap();
        let mut vae = BTreeMap::new();
        for (name, shape) in [("quant_conv", [2 * c, 2 * c, 1, 1]), ("post_quant_conv", [c, c, 1, 1])] {
            vae.insert(format!("{name}.weight"), weight(&shape));
            vae.insert(format!("{name}.bias"), weight(&shape[..1]));
        }
        let strong = Tensor::from_slice(&[30f32, 1.0, 1.0, 1.0], (1, 2 * c, 1, 1), &cpu).unwrap();
        let hidden = weight(&[50, 2 * c, 4, 4]).broadcast_mul(&strong).unwrap();
        let conv = |x: &Tensor, vae: &BTreeMap<String, Tensor>, name: &str| {
            let (w, b) = (&vae[&format!("{name}.weight")], &vae[&format!("{name}.bias")]);
            let b = b.reshape((1, (), 1, 1)).unwrap();
            x.conv2d(w, 0, 1, 1, 1).unwrap().broadcast_add(&b).unwrap()
        };
        let means = |vae| conv(&hidden, vae, "quant_conv").narrow(1, 0, c).unwrap().contiguous().unwrap();
        let before = means(&vae);
        let white = whitened(&vae, &before).unwrap();
        let after = means(&white);
        let (seen, sees) = (conv(&before, &vae, "post_quant_conv"), conv(&after, &white, "post_quant_conv"));
        let error = (seen - sees).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error < 1e-3, "{error}");
        let spread = |channel: usize| {
            let x = after.narrow(1, channel, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            x.iter().map(|v| (v * v) as f64).sum::<f64>() / x.len() as f64
        };
        assert!((0..c).all(|channel| (0.05..=1.01).contains(&spread(channel))), "{} {}", spread(0), spread(1));
    }
}

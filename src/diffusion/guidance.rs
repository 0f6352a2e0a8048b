//! Guidance: which variants of the conditions the network is asked for, and how its answers are combined (§3.3).

use candle_core::{DType, Device, Result as CandleResult, Tensor};

/// One variant of the conditions; what is not kept is null (the empty prompt; mask 1 and reference 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Branch {
    /// Or the empty text instead.
    pub keeps_text: bool,
    /// Or mask 1 for all images instead.
    pub keeps_references: bool,
}

impl Branch {
    /// All that is known.
    pub const FULL: Self = Self { keeps_text: true, keeps_references: true };
    /// Nothing is known.
    pub const NULL: Self = Self { keeps_text: false, keeps_references: false };
    /// The text alone.
    pub const TEXT: Self = Self { keeps_text: true, keeps_references: false };
    /// The references alone.
    pub const REFERENCES: Self = Self { keeps_text: false, keeps_references: true };
}

/// A way to guide, with its scales.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)] // The formulas name the scales.
pub enum Guidance {
    /// ε⁰ + λ(ε − ε⁰) (equation 3).
    Joint { scale: f64 },
    /// ε⁰ + λ_text(ε_text − ε⁰) + λ_image(ε − ε_text) (equation 4): the second scale pushes identity.
    TextFirst { text_scale: f64, image_scale: f64 },
    /// ε⁰ + λ_image(ε_image − ε⁰) + λ_text(ε − ε_image) (equation 4).
    ImageFirst { text_scale: f64, image_scale: f64 },
    /// ε_image + λ(ε − ε_image): references in both branches (Table 4, without image guidance).
    TextOnly { scale: f64 },
}

/// What keeps strong guidance from over-exposing its pictures.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Restraint {
    /// Whether the two directions of [`Guidance::TextFirst`] and [`Guidance::ImageFirst`] are scaled to the norm of the
    /// smaller one before their scales act (SynCD, Kumari et al. 2025). A direction of no length has no say.
    pub is_normalised: bool,
    /// φ: how far the spread of the guided prediction goes back to that of the full branch (Lin et al. 2023, equations 15
    /// and 16); 0 not at all.
    pub rescale: f64,
}

impl Guidance {
    /// The branches to compute, in the order in which [`Guidance::combine`] takes them.
    pub fn branches(self) -> &'static [Branch] {
        match self {
            Self::Joint { scale } | Self::TextOnly { scale } if scale == 1.0 => &[Branch::FULL],
            Self::Joint { .. } => &[Branch::NULL, Branch::FULL],
            Self::TextFirst { .. } => &[Branch::NULL, Branch::TEXT, Branch::FULL],
            Self::ImageFirst { .. } => &[Branch::NULL, Branch::REFERENCES, Branch::FULL],
            Self::TextOnly { .. } => &[Branch::REFERENCES, Branch::FULL],
        }
    }

    /// The guided prediction.
    ///
    /// # Shapes
    /// - one prediction a branch, all of one shape → that shape
    pub fn combine(self, predictions: &[Tensor]) -> CandleResult<Tensor> {
        match (self, predictions) {
            (_, [full]) => Ok(full.clone()),
            (Self::Joint { scale } | Self::TextOnly { scale }, [base, full]) => base + ((full - base)? * scale)?,
            (
                Self::TextFirst { text_scale: first, image_scale: second }
                | Self::ImageFirst { text_scale: second, image_scale: first },
                [base, half, full],
            ) => (base + ((half - base)? * first)?)? + ((full - half)? * second)?,
            _ => candle_core::bail!("guidance: {} predictions do not fit {self:?}", predictions.len()),
        }
    }
}

impl Restraint {
    /// The guided prediction within bounds; norms and spreads are each picture's own.
    ///
    /// # Shapes
    /// - one prediction a branch, all of one shape `[k, …]`, the pictures alone and not their references → that shape
    pub fn combine(self, guidance: Guidance, predictions: &[Tensor]) -> CandleResult<Tensor> {
        let guided = match predictions {
            [base, half, full] if self.is_normalised => {
                let (first, second) = ((half - base)?, (full - half)?);
                let norms: Vec<(f64, f64)> = norms(&first)?.into_iter().zip(norms(&second)?).collect();
                // What brings a direction of norm `own` to the smaller norm of the two.
                let shrink = |own: f64, other: f64| if own > 0.0 && other > 0.0 { own.min(other) / own } else { 1.0 };
                let first = scaled(&first, norms.iter().map(|&(a, b)| shrink(a, b)).collect())?;
                let second = scaled(&second, norms.iter().map(|&(a, b)| shrink(b, a)).collect())?;
                let half = (base + first)?;
                let full = (&half + second)?;
                guidance.combine(&[base.clone(), half, full])?
            }
            _ => guidance.combine(predictions)?,
        };
        match predictions {
            [_, .., full] if self.rescale > 0.0 => {
                let spreads = deviations(full)?.into_iter().zip(deviations(&guided)?);
                let back = |(full, guided): (f64, f64)| if guided > 0.0 { full / guided } else { 1.0 };
                scaled(&guided, spreads.map(|pair| self.rescale * back(pair) + 1.0 - self.rescale).collect())
            }
            _ => Ok(guided),
        }
    }
}

/// The values of each picture, on the host in f64: their sums are the same in any batch.
fn rows(x: &Tensor) -> CandleResult<Vec<Vec<f64>>> {
    x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.reshape((x.dim(0)?, ()))?.to_vec2()
}

fn norms(x: &Tensor) -> CandleResult<Vec<f64>> {
    Ok(rows(x)?.iter().map(|row| row.iter().map(|v| v * v).sum::<f64>().sqrt()).collect())
}

/// Standard deviations (the unbiased ones, as `torch.std` gives them).
fn deviations(x: &Tensor) -> CandleResult<Vec<f64>> {
    let deviation = |row: &Vec<f64>| {
        let count = row.len() as f64;
        let mean = row.iter().sum::<f64>() / count;
        (row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (count - 1.0)).sqrt()
    };
    Ok(rows(x)?.iter().map(deviation).collect())
}

/// Each picture times its own factor.
fn scaled(x: &Tensor, factors: Vec<f64>) -> CandleResult<Tensor> {
    let mut shape = vec![1; x.rank()];
    shape[0] = factors.len();
    let factors = Tensor::from_vec(factors, shape, &Device::Cpu)?.to_dtype(x.dtype())?.to_device(x.device())?;
    x.broadcast_mul(&factors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(guidance: Guidance, predictions: &[f64]) -> f64 {
        let tensors: Vec<Tensor> =
            predictions.iter().map(|&p| Tensor::from_slice(&[p], 1, &Device::Cpu).unwrap()).collect();
        guidance.combine(&tensors).unwrap().to_vec1::<f64>().unwrap()[0]
    }

    #[test]
    fn scale_one_is_the_conditional_branch() {
        assert_eq!(Guidance::Joint { scale: 1.0 }.branches(), [Branch::FULL]);
        for guidance in [
            Guidance::TextFirst { text_scale: 1.0, image_scale: 1.0 },
            Guidance::ImageFirst { text_scale: 1.0, image_scale: 1.0 },
        ] {
            assert_eq!(value(guidance, &[3.0, 5.0, 11.0]), 11.0);
        }
    }

    #[test]
    fn equations_3_and_4_by_hand() {
        assert_eq!(value(Guidance::Joint { scale: 3.0 }, &[1.0, 2.0]), 4.0);
        assert_eq!(value(Guidance::TextOnly { scale: 3.0 }, &[1.0, 2.0]), 4.0);
        // 1 + 2·(2−1) + 10·(4−2)
        assert_eq!(value(Guidance::TextFirst { text_scale: 2.0, image_scale: 10.0 }, &[1.0, 2.0, 4.0]), 23.0);
        // 1 + 10·(2−1) + 2·(4−2)
        assert_eq!(value(Guidance::ImageFirst { text_scale: 2.0, image_scale: 10.0 }, &[1.0, 2.0, 4.0]), 15.0);
    }

    #[test]
    fn each_scale_pushes_the_direction_that_its_name_says() {
        let text_first = Guidance::TextFirst { text_scale: 1.0, image_scale: 1.0 };
        assert_eq!(text_first.branches()[1], Branch::TEXT);
        let image_first = Guidance::ImageFirst { text_scale: 1.0, image_scale: 1.0 };
        assert_eq!(image_first.branches()[1], Branch::REFERENCES);
    }

    /// Pictures of two values each.
    fn pictures(values: &[[f64; 2]]) -> Tensor {
        Tensor::from_vec(values.concat(), (values.len(), 2), &Device::Cpu).unwrap()
    }

    #[test]
    fn normalised_guidance_by_hand_for_each_picture() {
        let restraint = Restraint { is_normalised: true, rescale: 0.0 };
        let guidance = Guidance::TextFirst { text_scale: 2.0, image_scale: 10.0 };
        let zero = pictures(&[[0.0, 0.0]; 3]);
        // The text's direction and, on top of it, that of the references.
        let text = [[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]];
        let images = [[0.0, 1.0], [0.0, 20.0], [6.0, 8.0]];
        let full: Vec<[f64; 2]> = text.iter().zip(&images).map(|(a, b)| [a[0] + b[0], a[1] + b[1]]).collect();
        let found = restraint.combine(guidance, &[zero, pictures(&text), pictures(&full)]).unwrap();
        // Norms 5 and 1: 2·(3, 4)/5 + 10·(0, 1). Norms 5 and 20: 2·(3, 4) + 10·(0, 20)/4. No text: 10·(6, 8).
        let expected = [[1.2, 11.6], [6.0, 58.0], [60.0, 80.0]];
        for (found, expected) in found.to_vec2::<f64>().unwrap().iter().zip(expected) {
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}, not {expected:?}");
        }
    }

    #[test]
    fn rescaling_brings_back_the_spread_of_the_full_branch() {
        let (base, full) = (pictures(&[[0.0, 0.0]; 2]), pictures(&[[1.0, 3.0], [2.0, -2.0]]));
        let combine = |rescale| {
            let restraint = Restraint { is_normalised: false, rescale };
            restraint.combine(Guidance::Joint { scale: 3.0 }, &[base.clone(), full.clone()]).unwrap()
        };
        assert_eq!(combine(0.0).to_vec2::<f64>().unwrap(), [[3.0, 9.0], [6.0, -6.0]]);
        let close = |found: Tensor, expected: [[f64; 2]; 2]| {
            let found = found.to_vec2::<f64>().unwrap().concat();
            assert!(found.iter().zip(expected.concat()).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
        };
        // The spread has grown to three times that of the full branch in both pictures.
        close(combine(1.0), [[1.0, 3.0], [2.0, -2.0]]);
        close(combine(0.5), [[2.0, 6.0], [4.0, -4.0]]);
    }

    #[test]
    fn without_restraint_the_bits_are_those_of_the_equations() {
        let three: Vec<Tensor> = [[0.1, 0.7], [-1.3, 0.2], [0.9, -0.4]].iter().map(|&v| pictures(&[v])).collect();
        let guidance = Guidance::ImageFirst { text_scale: 2.5, image_scale: 1.5 };
        let plain = guidance.combine(&three).unwrap().to_vec2::<f64>().unwrap();
        assert_eq!(Restraint::default().combine(guidance, &three).unwrap().to_vec2::<f64>().unwrap(), plain);
    }
}

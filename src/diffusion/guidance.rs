//! Guidance: which variants of the conditions the network is asked for, and how its answers are combined (§3.3).

use candle_core::{Result as CandleResult, Tensor};

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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

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
}

//! Weights of networks that are not trained, packed once for all steps of sampling: where pictures are few and small, packing
//! a weight takes a good part of what multiplying by it does.
//!
//! Only weights that are small beside the caches are kept, and of all together no more than [`BUDGET`] bytes: for a large
//! network, whose pictures have more positions, packing is a hundredth of the work, and its weights would double.

use std::any::Any;
use std::mem::size_of;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use candle_core::Tensor;

use super::product::{Panels, takes_panels};
use super::real::Real;

/// Bytes that all kept weights of the process may take.
const BUDGET: usize = 64 << 20;
/// Of which so many are taken.
static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// A layer's weight as it is multiplied by, made at the first use. It belongs to one weight, which must stay as it is.
#[derive(Default)]
pub struct Packed(OnceLock<Option<Kept>>);

/// Panels of one number format, behind a type that has none.
struct Kept {
    panels: Box<dyn Any + Send + Sync>,
    bytes: usize,
}

impl Packed {
    /// The panels that `pack` makes of so many values, from the first call on; None for a weight that may change, and
    /// where no memory is left.
    pub(super) fn panels<T: Real>(
        &self,
        weight: &Tensor,
        values: usize,
        pack: impl FnOnce() -> Vec<Panels<T>>,
    ) -> Option<&[Panels<T>]> {
        if weight.track_op() || !takes_panels::<T>() {
            return None;
        }
        let kept = self.0.get_or_init(|| {
            let bytes = values * size_of::<T>();
            let take = |taken: usize| Some(taken + bytes).filter(|taken| *taken <= BUDGET);
            TAKEN.fetch_update(Relaxed, Relaxed, take).ok()?;
            Some(Kept { panels: Box::new(pack()), bytes })
        });
        kept.as_ref()?.panels.downcast_ref::<Vec<Panels<T>>>().map(Vec::as_slice)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        TAKEN.fetch_sub(self.bytes, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::ops::{Conv2d, conv2d, conv2d_packed, linear, linear_packed};
    use crate::rng::Rng;

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn packed_weights_give_the_same_bits_and_are_used_again() {
        let mut rng = Rng::new(3, "packed test", 0);
        for (rows, inputs, outputs) in [(7, 40, 20), (50, 40, 20), (64, 128, 200)] {
            let (x, weight) =
                (rng.normal_tensor(&[rows, inputs]).unwrap(), rng.normal_tensor(&[outputs, inputs]).unwrap());
            let bias = rng.normal_tensor(&[outputs]).unwrap();
            let (expected, packed) = (values(&linear(&x, &weight, Some(&bias)).unwrap()), Packed::default());
            for _ in 0..2 {
                assert_eq!(values(&linear_packed(&x, &weight, Some(&bias), Some(&packed)).unwrap()), expected);
            }
            assert_eq!(packed.0.get().is_some(), takes_panels::<f32>() && rows >= 32, "{rows} rows");
        }
        let (x, weight) = (rng.normal_tensor(&[2, 16, 16, 32]).unwrap(), rng.normal_tensor(&[48, 32, 3, 3]).unwrap());
        let (conv, packed) = (Conv2d::same(3), Packed::default());
        let expected = values(&conv2d(&x, &weight, None, conv).unwrap());
        for _ in 0..2 {
            assert_eq!(values(&conv2d_packed(&x, &weight, None, conv, Some(&packed)).unwrap()), expected);
        }
        assert_eq!(packed.0.get().is_some(), takes_panels::<f32>());
        // Another number format than the first call's is packed anew.
        let [x, weight] = [x, weight].map(|t| t.to_dtype(DType::F64).unwrap());
        conv2d_packed(&x, &weight, None, conv, Some(&packed)).unwrap();
    }

    #[test]
    fn weights_that_are_trained_are_never_kept() {
        let weight = Var::ones((48, 32), DType::F32, &Device::Cpu).unwrap();
        let (x, packed) = (Tensor::ones((64, 32), DType::F32, &Device::Cpu).unwrap(), Packed::default());
        let before = values(&linear_packed(&x, weight.as_tensor(), None, Some(&packed)).unwrap());
        weight.set(&Tensor::zeros((48, 32), DType::F32, &Device::Cpu).unwrap()).unwrap();
        let after = values(&linear_packed(&x, weight.as_tensor(), None, Some(&packed)).unwrap());
        assert!(before.iter().all(|v| *v == 32.0) && after.iter().all(|v| *v == 0.0));
    }

    #[test]
    fn what_is_kept_is_bounded_and_given_back() {
        if !takes_panels::<f32>() {
            return;
        }
        let weight = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        let (large, small) = (Packed::default(), Packed::default());
        // More than is left, then what is left but for the other tests' weights.
        assert!(large.panels::<f32>(&weight, BUDGET / 4 + 1, || unreachable!("nothing is packed")).is_none());
        assert!(small.panels::<f32>(&weight, BUDGET / 8, Vec::new).is_some());
        let taken = TAKEN.load(Relaxed);
        assert!(taken >= BUDGET / 2);
        drop(small);
        assert!(TAKEN.load(Relaxed) < taken);
    }
}

//! Results that do not depend on the batch: which kernel a convolution takes is a question of speed, answered by all
//! positions of a batch, and the kernels differ in the last bits. Whoever promises the same picture alone and in a batch
//! has it answered for a batch of one size instead.

use std::cell::Cell;

/// Pictures that kernels are chosen for then: a reference and a target in two branches.
const PICTURES: usize = 4;

thread_local! {
    static IS_FIXED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, in which the operations of this thread give each picture the same bits in any batch.
pub fn alike_in_any_batch<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            IS_FIXED.set(self.0);
        }
    }
    let _restore = Restore(IS_FIXED.replace(true));
    f()
}

/// Whether this thread was asked for that.
pub fn is_alike() -> bool {
    IS_FIXED.get()
}

/// The pictures that a kernel is chosen for in a batch of `pictures`.
pub fn pictures_to_choose_by(pictures: usize) -> usize {
    if IS_FIXED.get() { PICTURES } else { pictures }
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::ops::{Conv2d, conv2d, linear};
    use crate::rng::Rng;

    /// A picture of few positions, whose convolution takes another way alone than in a batch.
    #[test]
    fn a_picture_has_the_same_bits_alone_and_in_a_batch() {
        let mut rng = Rng::new(2, "any batch test", 0);
        let mut differs = false;
        let values = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (channels, out, side) in [(32, 32, 8), (64, 64, 4), (480, 480, 4), (128, 16, 8)] {
            let x = rng.normal_tensor(&[12, side, side, channels]).unwrap();
            let weight = rng.normal_tensor(&[out, channels, 3, 3]).unwrap();
            let conv = |x: &Tensor| conv2d(x, &weight, None, Conv2d { stride: 1, pad: [1; 4] }).unwrap();
            let alone = x.narrow(0, 5, 1).unwrap().contiguous().unwrap();
            let of_batch = |y: Tensor| values(y.narrow(0, 5, 1).unwrap());
            differs |= values(conv(&alone)) != of_batch(conv(&x));
            let (alone, all) = alike_in_any_batch(|| (values(conv(&alone)), of_batch(conv(&x))));
            assert!(alone == all, "{channels} to {out} channels, {side}² positions");
        }
        let x = rng.normal_tensor(&[12, 16, 600]).unwrap();
        let (one, weight) = (x.narrow(0, 5, 1).unwrap(), rng.normal_tensor(&[700, 600]).unwrap());
        let (alone, all) = alike_in_any_batch(|| [&one, &x].map(|x| linear(x, &weight, None).unwrap())).into();
        assert!(values(alone) == values(all.narrow(0, 5, 1).unwrap()), "a large weight");
        assert!(differs, "none of these depends on the batch anyway, so that nothing was shown");
        assert_eq!(pictures_to_choose_by(7), 7, "outside all is as before");
    }
}

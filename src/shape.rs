//! The shape of a batch of image sets.

use anyhow::{Result, ensure};

/// `sets` sets of `images` images each; tensors over it start with the dimension `[b·n, …]`, sets outermost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetShape {
    /// b: how many independent sets the batch holds.
    pub sets: usize,
    /// n: how many images each set holds.
    pub images: usize,
}

impl SetShape {
    /// b sets of n images.
    pub fn new(sets: usize, images: usize) -> Self {
        Self { sets, images }
    }

    /// b·n, the leading dimension of every per-image tensor.
    pub fn total(self) -> usize {
        self.sets * self.images
    }

    /// Splits a leading dimension of `total` images into sets of `images`.
    pub fn from_total(total: usize, images: usize) -> Result<Self> {
        ensure!(images > 0 && total.is_multiple_of(images), "{total} images do not divide into sets of {images}");
        Ok(Self { sets: total / images, images })
    }
}

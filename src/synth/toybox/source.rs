//! The toybox as a source of training sets.

use anyhow::Result;

use super::draw_set;
use crate::data::{ImageSet, SetSource};

/// `sets` sets of `images` pictures of `size` pixels a side, drawn when they are read.
pub struct ToyboxSource {
    pub seed: u64,
    pub sets: usize,
    pub images: usize,
    pub size: u32,
}

impl SetSource for ToyboxSource {
    fn n_sets(&self) -> usize {
        self.sets
    }

    fn read(&self, set_idx: usize) -> Result<ImageSet> {
        let set = draw_set(self.seed, set_idx as u64, self.images, self.size);
        Ok(ImageSet {
            key: format!("{set_idx:08}"),
            images: set.images,
            captions: set.captions,
            masks: set.masks,
            metadata: serde_json::Value::Null,
        })
    }
}

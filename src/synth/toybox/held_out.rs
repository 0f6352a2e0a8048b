//! The evaluation toys as a source of sets: for validation losses and previews, never for training.

use anyhow::Result;

use super::{EVAL_SUBJECTS, Subject, draw_subject_set};
use crate::data::{ImageSet, SetSource};
use crate::rng::Rng;

/// One set of each evaluation toy.
pub struct HeldOutToys {
    /// Pictures a set.
    pub images: usize,
    /// Pixels a side.
    pub size: u32,
}

impl SetSource for HeldOutToys {
    fn n_sets(&self) -> usize {
        EVAL_SUBJECTS.count()
    }

    fn read(&self, set_idx: usize) -> Result<ImageSet> {
        let subject = Subject::from_seed(EVAL_SUBJECTS.start + set_idx as u64);
        let mut rng = Rng::new(0, "held-out toys", set_idx as u64);
        let set = draw_subject_set(subject, &mut rng, self.images, self.size);
        Ok(ImageSet {
            key: format!("held-out-{set_idx:02}"),
            images: set.images,
            captions: set.captions,
            masks: set.masks,
            metadata: serde_json::Value::Null,
        })
    }
}

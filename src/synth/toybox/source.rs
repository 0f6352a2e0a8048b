//! The toybox as training data that needs no disk: drawn when asked for.

use anyhow::Result;
use serde_json::{Value, json};

use super::paint::Colour;
use super::{ToySet, draw_set};
use crate::data::{ImageSet, SetSource};

/// Toybox sets 0..`sets` of a seed.
#[derive(Clone, Copy, Debug)]
pub struct ToyboxSource {
    /// The seed of all sets.
    pub seed: u64,
    /// How many there are.
    pub sets: usize,
    /// Pictures a set.
    pub images: usize,
    /// Pixels a side.
    pub size: u32,
}

impl SetSource for ToyboxSource {
    fn n_sets(&self) -> usize {
        self.sets
    }

    fn read(&self, set_idx: usize) -> Result<ImageSet> {
        let set = draw_set(self.seed, set_idx as u64, self.images, self.size);
        let metadata = metadata(self.seed, set_idx, &set);
        let ToySet { captions, images, masks, .. } = set;
        Ok(ImageSet { key: key(set_idx), images, captions, masks, metadata })
    }
}

/// The name of a set: eight digits, more where they are needed.
pub fn key(set_idx: usize) -> String {
    format!("{set_idx:08}")
}

fn metadata(seed: u64, set_idx: usize, set: &ToySet) -> Value {
    let subject = &set.subject;
    let hex = |Colour { red, green, blue }: Colour| format!("#{red:02x}{green:02x}{blue:02x}");
    json!({
        "source": "toybox",
        "seed": seed,
        "index": set_idx,
        "class": subject.kind.name(),
        "subject": {
            "seed": subject.seed,
            "kind": subject.kind.name(),
            "body": hex(subject.body),
            "second": hex(subject.second),
            "accent": hex(subject.accent),
            "pattern": format!("{:?}", subject.pattern),
            "repeats": subject.repeats,
            "aspect": subject.aspect,
            "topper": format!("{:?}", subject.topper),
            "eyes": format!("{:?}", subject.eyes),
            "limbs": subject.limbs,
        },
        "scenes": set.scenes.iter().map(|scene| scene.phrase()).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::toybox::Subject;

    #[test]
    fn a_set_depends_on_its_number_alone_and_says_who_it_shows() {
        let source = ToyboxSource { seed: 3, sets: 40, images: 3, size: 24 };
        let other = ToyboxSource { sets: 9, ..source };
        let (a, b) = (source.read(7).unwrap(), other.read(7).unwrap());
        assert_eq!((&a.images, &a.captions, &a.masks, &a.metadata), (&b.images, &b.captions, &b.masks, &b.metadata));
        assert_ne!(a.images, source.read(8).unwrap().images);
        assert_eq!((source.n_sets(), a.images.len(), a.masks.len(), a.key.as_str()), (40, 3, 3, "00000007"));
        let subject = Subject::from_seed(a.metadata["subject"]["seed"].as_u64().unwrap());
        assert_eq!(a.metadata["subject"]["kind"], subject.kind.name());
        assert!(a.captions.iter().all(|caption| caption.contains(subject.kind.name())));
        assert_eq!(a.metadata["scenes"].as_array().unwrap().len(), 3);
    }
}

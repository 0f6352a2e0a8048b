//! Where training sets come from.

use anyhow::{Result, ensure};

use super::dataset::Dataset;
use super::{ImageSet, Layout, SetOutline};

/// A numbered collection of sets; reading one depends on its number alone.
pub trait SetSource: Send + Sync {
    /// How many sets there are.
    fn n_sets(&self) -> usize;

    /// Set number `set_idx`, square pictures of one size.
    fn read(&self, set_idx: usize) -> Result<ImageSet>;

    /// What set number `set_idx` promises, told without decoding it; None where sets are made when asked for, and nothing
    /// can be wrong with them.
    fn outline(&self, _set_idx: usize) -> Result<Option<SetOutline>> {
        Ok(None)
    }
}

/// Sets from a folder or from shards, resized.
pub struct DatasetSource {
    dataset: Dataset,
    size: u32,
}

impl DatasetSource {
    /// Opens `place` (see [`Dataset::open`]); its pictures will have `size` pixels a side.
    pub fn open(place: &str, layout: Layout, size: u32) -> Result<Self> {
        ensure!(size > 0, "{place}: the image size must be at least 1");
        Ok(Self { dataset: Dataset::open(place, layout)?, size })
    }
}

impl SetSource for DatasetSource {
    fn n_sets(&self) -> usize {
        self.dataset.n_samples()
    }

    fn read(&self, set_idx: usize) -> Result<ImageSet> {
        Ok(self.dataset.read(set_idx)?.resized(self.size))
    }

    fn outline(&self, set_idx: usize) -> Result<Option<SetOutline>> {
        self.dataset.outline(set_idx).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use image::RgbImage;

    use super::*;

    #[test]
    fn single_pictures_become_sets_of_one_at_the_asked_size() {
        let folder = tempfile::tempdir().unwrap();
        for (idx, (width, height)) in [(40, 20), (20, 40), (8, 8)].into_iter().enumerate() {
            let path = folder.path().join(format!("{idx:09}"));
            RgbImage::from_pixel(width, height, image::Rgb([90; 3])).save(path.with_extension("jpg")).unwrap();
            fs::write(path.with_extension("txt"), format!("caption {idx}")).unwrap();
        }
        let source = DatasetSource::open(folder.path().to_str().unwrap(), Layout::Single, 12).unwrap();
        assert_eq!(source.n_sets(), 3);
        for idx in 0..3 {
            let set = source.read(idx).unwrap();
            assert_eq!((set.images.len(), set.images[0].dimensions()), (1, (12, 12)));
            assert_eq!(set.captions, [format!("caption {idx}")]);
        }
    }
}

//! Where training sets come from.

use anyhow::Result;

use super::ImageSet;

/// A numbered collection of sets; reading one depends on its number alone.
pub trait SetSource: Send + Sync {
    /// How many sets there are.
    fn n_sets(&self) -> usize;

    /// Set number `set_idx`, square pictures of one size.
    fn read(&self, set_idx: usize) -> Result<ImageSet>;
}

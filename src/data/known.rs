//! What need not be read or decoded, because the one who is fed has it.

use super::loader::Slot;

/// What the one who is fed has already. The default has nothing.
pub trait Known: Send + Sync {
    /// The number of pictures of a set that need not be read, where it is one.
    fn n_images(&self, _slot: &Slot) -> Option<usize> {
        None
    }

    /// Whether pictures with this content need not be decoded; None: the contents are not asked for.
    fn has_content(&self) -> Option<&dyn Fn(&str) -> bool> {
        None
    }
}

/// Knows nothing.
pub struct NothingKnown;

impl Known for NothingKnown {}

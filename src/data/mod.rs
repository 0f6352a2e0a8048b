//! Pictures and sets of pictures: read from files, written to files, and dealt out to training.

pub mod set;
pub mod sources;

pub use set::ImageSet;
pub use sources::SetSource;

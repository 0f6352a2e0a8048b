//! Pictures and sets of pictures: read from files, written to files, and dealt out to training.

pub mod loader;
mod tensors;
pub mod set;
pub mod sources;

pub use loader::{Loader, LoaderSettings};
pub use set::ImageSet;
pub use tensors::{images_from_tensor, tensor_from_images};
pub use sources::SetSource;

//! Pictures and sets of pictures: read from files, written to files, and dealt out to training.
//!
//! A picture: `jpeg` and `decode` (bytes to RGB), `image` (the user's references, sizes), `tensors`. A set: `set` and
//! `members` (its files). Many sets: `tar`, `dataset`, `sources`.

mod decode;
mod image;
mod jpeg;
mod tensors;

pub mod set;
pub mod sources;

pub use self::decode::{Decoded, Notice, decode};
pub use self::image::{Fit, load_reference, middle_square, resized};
pub use self::tensors::{images_from_tensor, tensor_from_images};
pub use set::ImageSet;
pub use sources::SetSource;

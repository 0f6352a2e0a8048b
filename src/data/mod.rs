//! Pictures and sets of pictures: read from files, written to files, and dealt out to training.
//!
//! A picture: `jpeg` and `decode` (bytes to RGB), `image` (the user's references, sizes), `pillow` (sizes as Python has them), `tensors`, `sheet` (many in one). A set: `set` and
//! `members` (its files), `header` and `outline` (what they promise, undecoded). Many sets: `shards`, `dataset`, `sources`, `loader`.

mod dataset;
mod decode;
mod header;
mod image;
mod jpeg;
#[cfg(test)]
mod kinds;
mod members;
mod outline;
mod pillow;
pub mod shards;
mod sheet;
mod tensors;

pub mod loader;
pub mod set;
pub mod sources;

pub use self::dataset::Dataset;
pub use self::decode::{Decoded, Notice, decode};
pub use self::image::{Fit, load_reference, middle_square, resized, write_png};
pub use self::members::{Layout, Members, members_from_set, set_from_members};
pub use self::outline::SetOutline;
pub use self::pillow::{Filter, resized as resized_as_pillow};
pub use self::sheet::sheet;
pub use self::tensors::{images_from_tensor, tensor_from_images};
pub use loader::{Loader, LoaderSettings};
pub use set::ImageSet;
pub use sources::{DatasetSource, SetSource};

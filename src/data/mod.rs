//! Pictures and sets of pictures: read from files, written to files, and dealt out to training.
//!
//! A picture: `jpeg` and `decode` (bytes to RGB), `image` (the user's references, sizes), `cut` and `shrink` (the square that
//! is trained on), `tensors`, `sheet` (many in one). A set: `set` and `members` (its files), `captions` and `rules` (what a
//! source makes of them), `header` and `outline` (what they promise, undecoded). Many sets: `shards` and `dataset` (samples by
//! number), `gallery` and `video` (clips, views), `sources` and `deal` (what training asks of them). Training: `mixture`,
//! `order`, `loader` (which sets a step sees), `ahead`, `known` and `feed` (decoded before they are needed), `store` (what is
//! kept on the disk). `survey` tells what a source holds.

mod ahead;
mod captions;
mod cut;
mod dataset;
mod deal;
mod decode;
mod feed;
mod gallery;
mod header;
mod image;
mod jpeg;
#[cfg(test)]
mod kinds;
mod known;
mod members;
mod mixture;
mod order;
mod outline;
mod rules;
pub mod shards;
mod sheet;
mod shrink;
mod tensors;
mod video;

pub mod loader;
pub mod set;
pub mod sources;
pub mod store;
pub mod survey;

pub use self::captions::CaptionRule;
pub use self::cut::Cut;
pub use self::dataset::Dataset;
pub use self::dataset::Fault;
pub use self::deal::{Dealt, DealtSet, Wanted};
pub use self::decode::{Decoded, Notice, decode};
pub use self::feed::{Fed, Feed, FeedSettings};
pub use self::gallery::{GalleryKind, GallerySettings, GallerySource};
pub use self::image::{Fit, load_reference, middle_square, resized, write_png};
pub use self::known::{Known, NothingKnown};
pub use self::members::{Layout, Members, members_from_set, set_from_members};
pub use self::mixture::{BrokenSample, MixedSource, Mixture};
pub use self::order::Runs;
pub use self::outline::SetOutline;
pub use self::rules::{Rules, ScoreFilter};
pub use self::sheet::sheet;
pub use self::tensors::{images_from_tensor, tensor_from_images};
pub use loader::{BatchPlan, Loader, Share, Slot};
pub use set::ImageSet;
pub use sources::{DatasetSettings, DatasetSource, SetSource};
pub use store::{Store, Warn};

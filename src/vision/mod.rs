//! Pictures to findings: what is where in them, which pixels it covers, how alike two pictures are. The networks are
//! [`crate::model`]'s; here is what stands around them, as transformers' processors have it.
//!
//! `prepare` (with `resize`) makes a picture the numbers that a network was trained on, `words` a phrase its tokens;
//! `detector` finds things, `segmenter` cuts them out, `embedder` tells how alike pictures are;
//! `draw` shows what was found.

pub mod detector;
pub mod draw;
pub mod embedder;
pub mod prepare;
mod resize;
pub mod segmenter;
pub mod words;

pub use detector::{Finding, ObjectDetector, Thresholds};
pub use embedder::{ImageEmbedder, on_grey_square, similarity};
pub use resize::{Filter, resized};
pub use segmenter::{Mask, ObjectSegmenter};

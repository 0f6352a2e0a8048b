//! A set of pictures of one subject, in memory.

use image::{GrayImage, RgbImage};

/// n square pictures of one subject with their captions.
#[derive(Clone, Debug, Default)]
pub struct ImageSet {
    /// Name of the set in its data set (file name without suffixes).
    pub key: String,
    pub images: Vec<RgbImage>,
    /// One a picture.
    pub captions: Vec<String>,
    /// Where the subject is (255), one a picture; empty where nobody knows.
    pub masks: Vec<GrayImage>,
    /// What else is known: subject, class, source, seeds, scores, boxes; `Null` where nothing is.
    pub metadata: serde_json::Value,
}

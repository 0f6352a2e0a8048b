//! The stages of Algorithm 1 and the openings for the models that do them. A stage asks a model for a whole batch at once;
//! what comes back for one ask depends on that ask alone, never on its batch or on what was asked before: only so is a set a
//! function of (config, seed, number).
//!
//! A model is plugged in by implementing one of the traits below and opening it in `commands/synth_data/tools.rs` under the
//! name that the config gives. Thresholds, retries, saving and counting are not a model's business: the stages do them.

use anyhow::Result;
use image::{GrayImage, RgbImage};
use serde::{Deserialize, Serialize};

/// In the order of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Descriptions of the object and of scenes with it.
    Prompts,
    /// One picture of many photos of the same thing.
    Collage,
    /// Things in the collage, cut out: detection, then segmentation.
    Instances,
    /// Which of them are one subject.
    Affinity,
    /// Each of them in a scene of its own.
    Compose,
    /// Some of the pictures in another style.
    Stylise,
    /// A caption a picture.
    Caption,
    /// How alike the pictures of a set are in the end.
    Score,
}

impl Stage {
    /// In the order of work.
    pub const ALL: [Self; 8] = [
        Self::Prompts,
        Self::Collage,
        Self::Instances,
        Self::Affinity,
        Self::Compose,
        Self::Stylise,
        Self::Caption,
        Self::Score,
    ];

    /// As options and files call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prompts => "prompts",
            Self::Collage => "collage",
            Self::Instances => "instances",
            Self::Affinity => "affinity",
            Self::Compose => "compose",
            Self::Stylise => "stylise",
            Self::Caption => "caption",
            Self::Score => "score",
        }
    }
}

/// One answer an ask, in the order of the asks. An error is about that ask alone (the endpoint refused, the picture cannot be
/// read): it is asked again, then given up and counted. Only an error made by `invalid` or by [`crate::interrupt::Interrupt::check`] ends
/// the run.
pub type Answers<T> = Vec<Result<T>>;

/// Writes prompts: a grammar, a language model, an endpoint.
pub trait Prompter {
    /// What the collage and the scenes are painted from.
    fn prompts(&mut self, asks: &[PromptAsk]) -> Answers<Prompts>;
}

/// One set's prompts.
#[derive(Clone, Copy, Debug)]
pub struct PromptAsk<'a> {
    /// Name of the object, a common noun such as `teapot`.
    pub object: &'a str,
    /// Scenes wanted.
    pub n_scenes: usize,
    /// Of everything that is drawn for this ask.
    pub seed: u64,
}

/// The prompts of one set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prompts {
    /// Object-centric: what the thing looks like; the collage stage puts its own words around it.
    pub object: String,
    /// Scene-centric: the thing somewhere, as many as were asked for.
    pub scenes: Vec<String>,
}

/// Paints collages: a text-to-image model, or the drawn toybox.
pub trait CollagePainter {
    /// Pictures that show the same thing several times.
    fn collages(&mut self, asks: &[CollageAsk]) -> Answers<Collage>;
}

/// One collage.
#[derive(Clone, Copy, Debug)]
pub struct CollageAsk<'a> {
    /// Name of the object.
    pub object: &'a str,
    /// The whole prompt.
    pub prompt: &'a str,
    /// Of the noise, or of everything that is drawn.
    pub seed: u64,
}

/// A painted collage.
#[derive(Clone, Debug)]
pub struct Collage {
    /// Of any shape.
    pub image: RgbImage,
    /// What really is in it, where the painter knows; None for a diffusion model.
    pub truth: Option<Truth>,
}

/// What really is in a collage.
#[derive(Clone, Debug)]
pub struct Truth {
    /// Of the collage's size: 0 the ground, k the k-th thing, counted from 1.
    pub labels: GrayImage,
    /// One a thing: equal numbers are one subject.
    pub subjects: Vec<u64>,
}

/// Finds things in a picture.
pub trait Detector {
    /// The things in each picture that the phrase names, best first or in any order; no thresholds of the pipeline applied.
    fn detections(&mut self, asks: &[DetectAsk]) -> Answers<Vec<Detection>>;
}

/// One picture to look through.
#[derive(Clone, Copy, Debug)]
pub struct DetectAsk<'a> {
    /// Of any shape.
    pub image: &'a RgbImage,
    /// Name of the object.
    pub phrase: &'a str,
}

/// A rectangle of whole pixels inside a picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    /// First column.
    pub left: u32,
    /// First row.
    pub top: u32,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Detection {
    /// Where.
    pub area: Area,
    /// How sure, 0 to 1.
    pub score: f32,
    /// What it was taken for.
    pub phrase: String,
}

/// Cuts things out of a picture.
pub trait Segmenter {
    /// One segment an area, in the order of the areas.
    fn segments(&mut self, asks: &[SegmentAsk]) -> Answers<Vec<Segment>>;
}

/// The things in one picture to cut out.
#[derive(Clone, Copy, Debug)]
pub struct SegmentAsk<'a> {
    /// Of any shape.
    pub image: &'a RgbImage,
    /// Where they are.
    pub areas: &'a [Area],
}

/// Which pixels a thing covers.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Of the whole picture's size, 255 where the thing is.
    pub mask: GrayImage,
    /// How sure, 0 to 1.
    pub score: f32,
}

/// Turns pictures of things into vectors whose angles tell how alike they are.
pub trait Embedder {
    /// A vector a picture, of unit length. Of a whole picture the mask is white everywhere.
    fn embeddings(&mut self, asks: &[Cutout]) -> Answers<Vec<f32>>;
}

/// A thing cut out of a picture.
#[derive(Clone, Debug)]
pub struct Cutout {
    /// The rectangle around it.
    pub image: RgbImage,
    /// Of the picture's size, 255 where the thing is.
    pub mask: GrayImage,
}

/// Paints what is unknown in a picture.
pub trait Inpainter {
    /// Side of the square pictures that it paints, in pixels.
    fn size(&self) -> u32;

    /// The pictures, of [`Inpainter::size`], with the unknown part painted; the known part may come back changed, the stage
    /// puts it back.
    fn inpainted(&mut self, asks: &[InpaintAsk]) -> Answers<RgbImage>;
}

/// One picture to complete.
#[derive(Clone, Copy, Debug)]
pub struct InpaintAsk<'a> {
    /// A square of [`Inpainter::size`]; grey where nothing is known.
    pub image: &'a RgbImage,
    /// Of the same size, 255 where the picture is known.
    pub known: &'a GrayImage,
    /// The scene.
    pub prompt: &'a str,
    /// Of the noise.
    pub seed: u64,
}

/// Gives pictures another style.
pub trait Styler {
    /// The styles that it can be asked for, as captions call them.
    fn styles(&self) -> Vec<String>;

    /// Pictures of the same size.
    fn styled(&mut self, asks: &[StyleAsk]) -> Answers<RgbImage>;
}

/// One picture to change.
#[derive(Clone, Copy, Debug)]
pub struct StyleAsk<'a> {
    /// The picture.
    pub image: &'a RgbImage,
    /// One of [`Styler::styles`].
    pub style: &'a str,
    /// Of everything that is drawn.
    pub seed: u64,
}

/// Describes pictures.
pub trait Captioner {
    /// One line a picture.
    fn captions(&mut self, asks: &[CaptionAsk]) -> Answers<String>;
}

/// One picture to describe.
#[derive(Clone, Copy, Debug)]
pub struct CaptionAsk<'a> {
    /// The final picture.
    pub image: &'a RgbImage,
    /// Name of the object.
    pub object: &'a str,
    /// The scene that it was painted from.
    pub prompt: &'a str,
    /// The style that it was given, if any.
    pub style: Option<&'a str>,
    /// Of everything that is drawn.
    pub seed: u64,
}

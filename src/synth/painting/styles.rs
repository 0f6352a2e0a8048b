//! InstructPix2Pix as a painter of styles.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use image::RgbImage;

use super::{Manner, OnStep, each};
use crate::data::resized;
use crate::interrupt::Interrupt;
use crate::sample::{Edit, Editor};
use crate::synth::stage::{Answers, StyleAsk, Styler};

/// Goes up when the pictures change.
pub const VERSION: u32 = 1;

/// What pictures are turned into where the config names nothing; captions say it so.
pub const STYLES: [&str; 12] = [
    "a pencil sketch",
    "a watercolour painting",
    "an oil painting",
    "a comic book illustration",
    "a black and white photo",
    "an old faded photo",
    "a pixel art picture",
    "a stained glass window",
    "a charcoal drawing",
    "a Japanese woodblock print",
    "a pop art poster",
    "a 3D rendering",
];

/// Turns pictures into something else by an instruction.
pub struct StyleModel {
    editor: Editor,
    manner: Manner,
    /// Side at which pictures are changed, in pixels; 0: their own.
    size: usize,
    styles: Vec<String>,
    /// `{style}` stands for the style.
    instruction: String,
    interrupt: Interrupt,
}

impl StyleModel {
    /// Changes pictures at `size` pixels, 0: at their own, by the `instruction` in which `{style}` stands for one of `styles`.
    pub fn new(
        editor: Editor,
        manner: Manner,
        size: usize,
        (instruction, styles): (String, Vec<String>),
        interrupt: Interrupt,
    ) -> Self {
        Self { editor, manner, size, styles, instruction, interrupt }
    }

    /// Pictures of one shape.
    fn painted(&self, asks: &[StyleAsk], on_step: OnStep) -> Result<Vec<RgbImage>> {
        let side = asks.first().context("nothing to change")?.image.width();
        ensure!(asks.iter().all(|ask| ask.image.dimensions() == (side, side)), "a picture is not square");
        let size = if self.size == 0 { side as usize } else { self.size };
        self.editor.sides().check("stylise.size", size)?;
        let edit = |ask: &StyleAsk| Edit {
            image: resized(ask.image, size as u32),
            instruction: self.instruction.replace("{style}", ask.style),
            seed: ask.seed,
        };
        let edits: Vec<Edit> = asks.iter().map(edit).collect();
        let painted = self.editor.edit(&edits, &self.manner.at(size), None, on_step)?;
        Ok(painted.images.iter().map(|image| resized(image, side)).collect())
    }
}

impl Styler for StyleModel {
    fn styles(&self) -> Vec<String> {
        self.styles.clone()
    }

    fn styled(&mut self, asks: &[StyleAsk]) -> Answers<RgbImage> {
        // What goes through the network together has one shape.
        let mut by_shape: BTreeMap<(u32, u32), Vec<usize>> = BTreeMap::new();
        for (idx, ask) in asks.iter().enumerate() {
            by_shape.entry(ask.image.dimensions()).or_default().push(idx);
        }
        let mut answers: BTreeMap<usize, Result<RgbImage>> = BTreeMap::new();
        for numbers in by_shape.into_values() {
            let some: Vec<StyleAsk> = numbers.iter().map(|&idx| asks[idx]).collect();
            let painted = each(&self.interrupt, &some, &mut |asks, on_step| self.painted(asks, on_step));
            answers.extend(numbers.into_iter().zip(painted));
        }
        answers.into_values().collect()
    }
}

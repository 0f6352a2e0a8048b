//! The running pictures, roughly and now and then, in a file that is replaced again and again.

use std::path::PathBuf;

use anyhow::Result;
use image::RgbImage;

use crate::data::{sheet, write_png};
use crate::report;
use crate::sample::{Gallery, LatentColours, Pipeline, SampleSettings, Step};

/// A preview every so many steps.
pub struct Live {
    every: usize,
    path: PathBuf,
    colours: LatentColours,
}

impl Live {
    /// None where no preview is wanted.
    pub fn new(
        every: usize,
        gallery: &Gallery,
        pipeline: &Pipeline,
        settings: &SampleSettings,
    ) -> Result<Option<Self>> {
        if every == 0 {
            return Ok(None);
        }
        let path = gallery.preview_path();
        report::note(format!("{}: shows the running pictures every {every} steps", path.display()));
        Ok(Some(Self { every, path, colours: LatentColours::fit(pipeline, settings)? }))
    }

    /// Shows what the network sees of the pictures, if it is time to.
    pub fn show(&self, step: &Step) -> Result<()> {
        if !(step.number + 1).is_multiple_of(self.every) {
            return Ok(());
        }
        let pictures = self.colours.pictures(&step.clean()?)?;
        let columns = (pictures.len() as f64).sqrt().ceil() as usize;
        let groups: Vec<Vec<&RgbImage>> = pictures.iter().map(|picture| vec![picture]).collect();
        write_png(&self.path, &sheet(&groups, columns)?)
    }
}

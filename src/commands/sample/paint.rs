//! Tasks become pictures, batch by batch, each written as it is done.

use anyhow::{Result, bail};
use candle_core::{Device, Tensor};
use image::RgbImage;
use serde_json::json;

use super::live::Live;
use super::tasks::Task;
use crate::cli::SampleArgs;
use crate::interrupt::Interrupt;
use crate::model::write::write_tensors;
use crate::report;
use crate::sample::{Gallery, GivenNoise, Painted, Pipeline, SetRequest, Step};

/// All that painting needs besides the tasks.
pub struct Hand<'a> {
    pub args: &'a SampleArgs,
    pub pipeline: &'a Pipeline,
    /// Noise of all tasks.
    pub given: Option<GivenNoise>,
    pub interrupt: Interrupt,
    pub live: Option<Live>,
}

impl Hand<'_> {
    /// Paints all tasks into the gallery.
    pub fn paint(&self, tasks: &[Task], mut gallery: Gallery) -> Result<()> {
        let keys: Vec<_> = tasks.iter().map(Task::key).collect();
        let batches = self.pipeline.batches(&keys);
        let n_steps: usize = batches.iter().map(|batch| tasks[batch[0]].settings.steps).sum();
        let n_pictures = tasks.iter().map(|task| (0..task.records.len()).filter(|&n| task.keeps(n)).count()).sum();
        let bar = report::progress(n_steps as u64, "sampling");
        let (mut pictures, mut latents): (Vec<RgbImage>, Vec<Tensor>) = (Vec::new(), Vec::new());
        for batch in batches {
            let sets: Vec<&Task> = batch.iter().map(|&number| &tasks[number]).collect();
            let painted = self.painted(&sets, &mut |step| {
                if self.interrupt.requested() {
                    bail!("interrupted; {} of {n_pictures} pictures are done and kept", pictures.len());
                }
                bar.inc(1);
                self.live.as_ref().map_or(Ok(()), |live| live.show(step))
            })?;
            let targets = sets.iter().flat_map(|set| set.records.iter().enumerate().map(|(n, r)| (r, set.keeps(n))));
            for (number, (picture, (record, is_kept))) in painted.images.into_iter().zip(targets).enumerate() {
                if !is_kept {
                    continue;
                }
                let path = gallery.add(&picture, &record.prompt, record.seed, &json!(record))?;
                report::result(record.line(&path, self.args.json))?;
                latents.push(painted.latents.get(number)?.to_device(&Device::Cpu)?);
                pictures.push(picture);
            }
            if !report::has_bars() && pictures.len() < n_pictures {
                report::note(format!("{} of {n_pictures} pictures", pictures.len()));
            }
        }
        bar.finish_and_clear();
        if let Some(path) = &self.args.save_latents {
            let latents = Tensor::stack(&latents, 0)?; // [k, c, h, w]
            write_tensors(path, &[("latents".to_owned(), latents)].into(), &[])?;
        }
        if self.args.grid { self.add_grid(&tasks[0], &pictures, &gallery) } else { Ok(()) }
    }

    /// The pictures of sets that go together.
    fn painted(&self, sets: &[&Task], watch: &mut dyn FnMut(&Step) -> Result<()>) -> Result<Painted> {
        let requests: Vec<SetRequest> = sets.iter().map(|set| set.request()).collect();
        let n_targets = sets.iter().map(|set| set.records.len()).sum();
        let own = self.given.as_ref().map(|given| given.of_targets(sets[0].first_target, n_targets)).transpose()?;
        self.pipeline.paint_watched(&requests, &sets[0].settings, own.as_ref(), watch)
    }

    /// The references beside the pictures, a row a prompt.
    fn add_grid(&self, first: &Task, pictures: &[RgbImage], gallery: &Gallery) -> Result<()> {
        let references = || first.references.iter().map(|shown| &shown.picture.image);
        let a_row = self.args.num_images.unwrap_or(1);
        let rows: Vec<Vec<&RgbImage>> = pictures.chunks(a_row).map(|some| references().chain(some).collect()).collect();
        let path = gallery.add_grid(&rows)?;
        let name = path.display().to_string();
        Ok(report::result(if self.args.json { json!({ "grid": name }).to_string() } else { name })?)
    }
}

//! The sets of a run, ready to paint: references read, settings filled in, and what is to be written of each picture.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use image::imageops::grayscale as to_grey;

use super::asked::Asked;
use super::plan::{Run, Sets, Wish};
use super::record::{Record, RecordedMask, RecordedNoise, RecordedReference, RecordedSet};
use super::references::{Shelf, Shown};
use super::settings::{recorded_guidance, recorded_sampler, settings};
use crate::sample::{BatchKey, Gallery, Pipeline, Reference, SampleSettings, SetRequest};

/// One set.
pub struct Task {
    pub references: Vec<Shown>,
    pub settings: SampleSettings,
    pub negative_prompt: String,
    /// One a new picture, in the order of the set.
    pub records: Vec<Record>,
    /// The only one of them that is written; None: all.
    pub only: Option<usize>,
    /// Which of the given noise's targets is the set's first.
    pub first_target: usize,
}

impl Task {
    /// What the library is asked for.
    pub fn request(&self) -> SetRequest {
        let reference = |shown: &Shown| Reference {
            image: shown.picture.image.clone(),
            caption: shown.caption.clone().unwrap_or_default(),
            weight: shown.weight,
            mask: shown.mask.as_ref().map(|(mask, _)| to_grey(&mask.image)),
        };
        SetRequest {
            references: self.references.iter().map(reference).collect(),
            prompts: self.records.iter().map(|record| record.prompt.clone()).collect(),
            negative_prompt: self.negative_prompt.clone(),
            seeds: self.records.iter().map(|record| record.seed).collect(),
        }
    }

    /// With which sets it may go through the network.
    pub fn key(&self) -> BatchKey {
        let (references, targets) = (self.references.len(), self.records.len());
        BatchKey { settings: self.settings.clone(), references, targets }
    }

    /// Whether picture `number` of the set is written.
    pub fn keeps(&self, number: usize) -> bool {
        self.only.is_none_or(|only| only == number)
    }
}

/// Makes tasks of wishes.
pub struct Desk<'a> {
    pub run: &'a Run,
    pub pipeline: &'a Pipeline,
    /// Guidance scale where none is asked for.
    pub model_scale: f64,
    /// As the records name it.
    pub device: String,
    /// SHA-256 of the noise file.
    pub noise_sha256: Option<String>,
    pub shelf: Shelf,
    /// Targets so far.
    pub n_targets: usize,
}

impl Desk<'_> {
    /// All tasks of a run.
    pub fn tasks(&mut self, sets: &Sets) -> Result<Vec<Task>> {
        let mut tasks = Vec::new();
        match sets {
            Sets::Each(wishes) => {
                for Wish { asked, origin } in wishes {
                    let prompt = asked.prompt.clone().unwrap_or_default();
                    for number in 0..asked.n_pictures() as u64 {
                        let seed = asked.seed.unwrap_or(0).wrapping_add(number);
                        let task = self.task(asked, vec![(prompt.clone(), seed)], None);
                        tasks.push(match origin {
                            Some(origin) => task.with_context(|| origin.clone())?,
                            None => task?,
                        });
                    }
                }
            }
            Sets::Joint { wish, set, only } => {
                let repeated = set.prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, set.num_images));
                let seeds = (0..).map(|number| set.seed.wrapping_add(number));
                let pictures = repeated.cloned().zip(seeds).collect();
                tasks.push(Task { only: *only, ..self.task(&wish.asked, pictures, Some(set))? });
            }
        }
        Ok(tasks)
    }

    /// The set of these prompts with their seeds.
    fn task(&mut self, asked: &Asked, pictures: Vec<(String, u64)>, set: Option<&RecordedSet>) -> Result<Task> {
        let settings = settings(asked, self.run, self.pipeline, self.model_scale)?;
        let shown = asked.refs.iter().flatten().map(|reference| self.shelf.shown(reference, settings.size));
        let references = shown.collect::<Result<Vec<_>>>()?;
        let negative_prompt = asked.negative_prompt.clone().unwrap_or_default();
        let first_target = self.run.noise.as_ref().map_or(0, |noise| noise.first) + self.n_targets;
        self.n_targets += pictures.len();
        let (sampler, karras) = recorded_sampler(settings.sampler);
        let noise = self.run.noise.as_ref().zip(self.noise_sha256.as_ref());
        let recorded = |shown: &Shown| RecordedReference {
            path: shown.path.clone(),
            sha256: shown.picture.sha256.clone(),
            caption: shown.caption.clone(),
            weight: shown.weight,
            mask: shown
                .mask
                .as_ref()
                .map(|(mask, path)| RecordedMask { path: path.clone(), sha256: mask.sha256.clone() }),
        };
        let record = |(prompt, seed): (String, u64)| Record {
            version: env!("CARGO_PKG_VERSION").into(),
            model: self.run.model.clone(),
            loras: self.run.loras.clone(),
            prompt,
            negative_prompt: negative_prompt.clone(),
            references: references.iter().map(recorded).collect(),
            fit: self.run.fit,
            seed,
            steps: settings.steps,
            sampler,
            karras,
            guidance: recorded_guidance(&settings),
            size: settings.size,
            coupled: self.run.is_coupled,
            device: self.device.clone(),
            dtype: self.run.dtype,
            low_memory: settings.is_frugal,
            vae_tile: settings.vae_tile,
            set: set.cloned(),
            noise: noise.map(|(file, sha256)| RecordedNoise {
                path: file.path.clone(),
                sha256: sha256.clone(),
                first: first_target,
            }),
        };
        let records = pictures.into_iter().map(record).collect();
        Ok(Task { references, settings, negative_prompt, records, only: None, first_target })
    }
}

/// Takes out the tasks whose picture is in the gallery already, made by the same settings; returns where those are.
pub fn take_done(tasks: &mut Vec<Task>, gallery: &Gallery) -> Result<Vec<(PathBuf, Record)>> {
    let mut there: HashMap<String, Vec<PathBuf>> = HashMap::new();
    for (path, settings) in gallery.recorded()?.into_iter().rev() {
        // What does not read as a record is another program's, or another version's.
        if let Ok(record) = serde_json::from_value::<Record>(settings) {
            there.entry(record.essence()).or_default().push(path);
        }
    }
    let mut done = Vec::new();
    tasks.retain(|task| {
        let [record] = task.records.as_slice() else { return true };
        // A line that stands twice is made twice.
        match there.get_mut(&record.essence()).and_then(Vec::pop) {
            Some(path) => done.push((path, record.clone())),
            None => return true,
        }
        false
    });
    Ok(done)
}

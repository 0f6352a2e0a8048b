//! The picture sheet that `train` leaves at every checkpoint: held-out toys, never seen in training.

use std::path::Path;

use anyhow::{Context as _, Result};
use image::RgbImage;

use super::{models, toybox_trials};
use crate::data::{SetSource, images_from_tensor, sheet, tensor_from_images, write_png};
use crate::device::Runtime;
use crate::diffusion::Guidance;
use crate::eval::trials;
use crate::model::{Files, Vae, VaeConfig};
use crate::sample::{Pipeline, SampleSettings};
use crate::synth::toybox::HeldOutToys;
use crate::train::{ObjectiveKind, TrainConfig};

/// Denoising steps of a preview.
const STEPS: usize = 20;

/// Writes `samples/step-N.png`: pairs of reference and result, or of picture and reconstruction; and returns the sheet.
pub fn write(settings: &TrainConfig, run: &Path, steps: u64, model: &Path, runtime: &Runtime) -> Result<RgbImage> {
    let (files, n_toys) = (Files::Folder(model.to_path_buf()), settings.run.preview_images);
    let pairs = match settings.objective {
        ObjectiveKind::Autoencoder => reconstructions(&files, runtime, n_toys)?,
        ObjectiveKind::Joint => pictures(&files, runtime, n_toys)?,
    };
    let groups: Vec<Vec<&RgbImage>> = pairs.iter().map(|(left, right)| vec![left, right]).collect();
    let path = run.join("samples").join(format!("step-{steps}.png"));
    let folder = run.join("samples");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let sheet = sheet(&groups, 6)?;
    write_png(&path, &sheet)?;
    Ok(sheet)
}

fn pictures(files: &Files, runtime: &Runtime, n_toys: usize) -> Result<Vec<(RgbImage, RgbImage)>> {
    let pipeline = Pipeline::load(files, runtime, true)?;
    let guidance = Guidance::Joint { scale: models::guidance_scale(None, files)? };
    let settings = SampleSettings::new(guidance, STEPS, pipeline.native_size());
    let mut trials = trials(&toybox_trials::world(), 1, 0)?;
    trials.truncate(n_toys);
    let requests = toybox_trials::requests(&trials, settings.size, true);
    let images = pipeline.paint(&requests, &settings, None, &mut || Ok(()))?.images;
    Ok(trials.iter().map(|trial| toybox_trials::reference(trial, settings.size)).zip(images).collect())
}

fn reconstructions(files: &Files, runtime: &Runtime, n_toys: usize) -> Result<Vec<(RgbImage, RgbImage)>> {
    let config: VaeConfig = files.json("vae/config.json")?;
    let (vae, _) = Vae::new(&config, files.params("vae", runtime, false)?)?;
    let source = HeldOutToys { images: 1, size: config.sample_size.unwrap_or(64) as u32 };
    let mut originals = Vec::new();
    for set_idx in 0..n_toys.min(source.n_sets()) {
        originals.extend(source.read(set_idx)?.images);
    }
    let latents = vae.latents_from_images(&tensor_from_images(&originals, &runtime.device)?)?;
    let decoded = images_from_tensor(&vae.decode(&latents)?)?;
    Ok(originals.into_iter().zip(decoded).collect())
}

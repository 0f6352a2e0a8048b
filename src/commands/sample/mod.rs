//! `jedi sample`: references and prompts become pictures. What is wrong is found before the sampling starts; pictures
//! are written as they are done.

mod references;
mod requests;
mod story;

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use candle_core::{Device, DeviceLocation, Tensor};
use image::RgbImage;
use serde_json::json;

use super::models;
use crate::cli::{self, SampleArgs};
use crate::device::Runtime;
use crate::diffusion::Sampler;
use crate::interrupt::Interrupt;
use crate::invalid::invalid;
use crate::model::write::write_tensors;
use crate::ops::{Precision, set_matmul_precision};
use crate::report;
use crate::sample::gallery::check_file_writable;
use crate::sample::{Gallery, GivenNoise, Pipeline, SampleSettings};
use references::read_references;
use requests::{guidance, requests};
use story::{Story, line};

pub fn run(args: SampleArgs) -> Result<()> {
    let files = models::open(&args.model)?;
    let guidance = guidance(&args, &files)?;
    let shown = read_references(&args)?;
    let given = args.noise.as_deref().map(GivenNoise::read).transpose()?;
    let n_pictures = args.prompts.len() * args.num_images;
    let interrupt = Interrupt::install()?;
    let mut gallery = Gallery::open(&args.out, n_pictures)?;
    check_outputs(&args, &gallery)?;

    let runtime = Runtime::open(args.device.name())?;
    let pipeline = Pipeline::load(&files, &runtime, !args.uncoupled)?;
    let size = args.size.unwrap_or(pipeline.native_size());
    pipeline.check_size(size)?;
    let cli::Sampler::Ddim = args.sampler;
    match args.dtype {
        cli::Dtype::F32 => {}
        cli::Dtype::Bf16 if runtime.device.is_cpu() => set_matmul_precision(Precision::Medium),
        cli::Dtype::Bf16 => return Err(invalid("--dtype bf16: on the CPU only so far; leave it out on a GPU")),
    }
    let settings = SampleSettings { sampler: Sampler::Ddim, steps: args.steps, guidance, size };
    if let Some(given) = &given {
        given.validate(n_pictures, shown.len(), args.steps, pipeline.latent_shape(size))?;
    }
    note_what_may_surprise(&args, &pipeline)?;

    let requests = requests(&args, &shown, size);
    let story = Story { args: &args, shown: &shown, settings: &settings, device: device_name(&runtime.device) };
    let bar = report::progress(pipeline.steps_of(&requests, &settings) as u64, "sampling");
    let mut painted = Vec::new();
    let mut latents = Vec::new();
    for sets in requests.chunks(pipeline.sets_at_once(&requests, &settings)) {
        let n_new = sets.iter().map(|set| set.prompts.len()).sum();
        let own = given.as_ref().map(|given| given.of_targets(painted.len(), n_new)).transpose()?;
        let on_step = &mut || {
            if interrupt.requested() {
                bail!("interrupted; {} of {n_pictures} pictures are done and kept", painted.len());
            }
            bar.inc(1);
            Ok(())
        };
        let new = pipeline.paint(sets, &settings, own.as_ref(), on_step)?;
        let asked = sets.iter().flat_map(|set| set.prompts.iter().zip(&set.seeds));
        for (picture, (prompt, &seed)) in new.images.iter().zip(asked) {
            let record = story.of_picture(prompt, seed);
            let path = gallery.add(picture, prompt, seed, &record)?;
            report::result(line(&path, &record, args.json))?;
        }
        painted.extend(new.images);
        latents.push(new.latents.to_device(&Device::Cpu)?);
        if !report::has_bars() && painted.len() < n_pictures {
            report::note(format!("{} of {n_pictures} pictures", painted.len()));
        }
    }
    bar.finish_and_clear();

    if let Some(path) = &args.save_latents {
        let latents = Tensor::cat(&latents, 0)?.contiguous()?; // [k, c, h, w]
        write_tensors(path, &[("latents".to_owned(), latents)].into(), &[])?;
    }
    if args.grid {
        let references: Vec<RgbImage> = requests[0].references.iter().map(|known| known.image.clone()).collect();
        let row = |results| references.iter().chain(results).collect();
        let rows: Vec<Vec<&RgbImage>> = painted.chunks(args.num_images).map(row).collect();
        let path = gallery.add_grid(&rows)?;
        let name = path.display().to_string();
        report::result(if args.json { json!({ "grid": name }).to_string() } else { name })?;
    }
    Ok(())
}

/// What would be lost or could not be written in the end.
fn check_outputs(args: &SampleArgs, gallery: &Gallery) -> Result<()> {
    if let Some(path) = &args.save_latents {
        check_file_writable(path).context("--save-latents")?;
    }
    let Some(path) = gallery.replaces() else { return Ok(()) };
    let is_same = |other: &Path| path.canonicalize().is_ok_and(|path| other.canonicalize().is_ok_and(|o| o == path));
    if args.references.iter().any(|reference| is_same(&reference.image)) {
        return Err(invalid(format!("--out {}: is a reference; name another file", path.display())));
    }
    report::warn(format!("{}: is there already and will be replaced", path.display()));
    Ok(())
}

fn note_what_may_surprise(args: &SampleArgs, pipeline: &Pipeline) -> Result<()> {
    let captions = args.references.iter().filter_map(|reference| reference.caption.as_ref());
    for text in args.prompts.iter().chain(captions) {
        if let Some(cut) = pipeline.tokenizer().encode(text)?.cut {
            report::warn(format!("{text:?}: too long for this model, its end is not used: {cut:?}"));
        }
    }
    if args.prompts.iter().any(|prompt| prompt.trim().is_empty()) {
        report::note("--prompt: is empty, so the picture follows the references alone");
    }
    if !pipeline.is_joint() && !args.references.is_empty() {
        report::note(format!(
            "{}: takes no references (a plain Stable Diffusion U-Net), so this is training-free: coupled attention and \
             the replacement trick alone",
            args.model
        ));
    }
    if args.uncoupled && !args.references.is_empty() {
        report::note("--uncoupled: the references cannot be seen");
    }
    Ok(())
}

fn device_name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".into(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

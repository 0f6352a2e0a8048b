//! `jedi sample`: references and prompts become pictures. What is wrong is found before the sampling starts; pictures
//! are written as they are done.
//!
//! Flags, a prompts file and an earlier picture (`asked`, `prompts_file`, `record`) make a `plan`; with the model loaded it
//! becomes `tasks` with `settings` and `references`; `paint` does them, batch by batch.

mod asked;
mod live;
mod loras;
mod paint;
mod plan;
mod prompts_file;
mod record;
mod references;
mod settings;
mod tasks;

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, DeviceLocation};

use super::models;
use super::steering::Steering;
use crate::cli::{self, SampleArgs};
use crate::device::Runtime;
use crate::interrupt::Interrupt;
use crate::invalid::invalid;
use crate::model::Family;
use crate::ops::{Precision, set_matmul_precision};
use crate::report;
use crate::sample::gallery::check_file_writable;
use crate::sample::{Gallery, GivenNoise, Pipeline};
use crate::sha256::sha256_hex;
use live::Live;
use plan::{NoiseFile, Run, Sets};
use record::Record;
use references::Shelf;
use tasks::{Desk, Task, take_done};

pub fn run(args: SampleArgs) -> Result<()> {
    let made = args.from.as_deref().map(Record::read).transpose()?;
    let mut run = Run::new(&args, made.as_ref());
    let sets = plan::sets(&args, made.as_ref())?;
    references::check_there(sets.wishes())?;
    let files = models::open(&run.model, args.tokenizer.as_deref())?;
    run.model = models::lasting_name(&run.model, &files);
    let files = loras::merged(files, &mut run.loras)?;
    let model_scale = models::guidance_scale(None, &files)?;
    check_guidance(&sets, model_scale)?;
    let given = run.noise.as_ref().map(read_noise).transpose()?;
    let interrupt = Interrupt::install()?;
    let gallery = Gallery::open(&args.out, sets.n_pictures())?;
    check_outputs(&args, &sets, &gallery)?;

    let runtime = open_runtime(&args.device, run.dtype)?;
    let pipeline = Pipeline::load(&files, &runtime, run.is_coupled)?;
    let mut desk = Desk {
        run: &run,
        pipeline: &pipeline,
        model_scale,
        device: device_name(&runtime.device),
        noise_sha256: given.as_ref().map(|(_, sha256)| sha256.clone()),
        shelf: Shelf::new(run.fit),
        n_targets: 0,
    };
    let mut tasks = desk.tasks(&sets)?;
    let given = given.map(|(noise, _)| noise);
    check_noise(&tasks, given.as_ref(), made.is_some(), &pipeline)?;
    note_what_may_surprise(&args, &run, &tasks, &pipeline)?;

    if args.prompts_file.is_some() {
        let done = take_done(&mut tasks, &gallery)?;
        for (path, record) in &done {
            report::result(record.line(path, args.json))?;
        }
        if !done.is_empty() {
            report::note(format!("{} of {} pictures are there already", done.len(), sets.n_pictures()));
        }
    }
    let Some(first) = tasks.first() else { return Ok(()) };
    let live = Live::new(args.preview_every, &gallery, &pipeline, &first.settings)?;
    let hand = paint::Hand { args: &args, pipeline: &pipeline, given, interrupt, live };
    hand.paint(&tasks, gallery)
}

/// What is wrong with guidance and sampler needs no model to be seen.
fn check_guidance(sets: &Sets, model_scale: f64) -> Result<()> {
    for wish in sets.wishes() {
        let check = || Steering::new(&wish.asked.steering(), model_scale);
        match &wish.origin {
            Some(origin) => check().with_context(|| origin.clone())?,
            None => check()?,
        };
    }
    Ok(())
}

/// The noise of a file and its SHA-256; that of an earlier picture must be the same file.
fn read_noise(file: &NoiseFile) -> Result<(GivenNoise, String)> {
    let noise = GivenNoise::read(&file.path)?;
    let name = file.path.display();
    let sha256 = sha256_hex(&std::fs::read(&file.path).with_context(|| format!("--noise {name}"))?);
    if file.sha256.as_ref().is_some_and(|expected| *expected != sha256) {
        return Err(invalid(format!(
            "--from: {name} is not the noise any more that the picture was made with; bring that back, or give this one \
             with --noise"
        )));
    }
    Ok((noise, sha256))
}

/// All of the noise is used, but for a picture that is repeated: that may be one of many.
fn check_noise(tasks: &[Task], given: Option<&GivenNoise>, is_repeated: bool, pipeline: &Pipeline) -> Result<()> {
    let (Some(given), Some(first)) = (given, tasks.first()) else { return Ok(()) };
    let n_targets = tasks.iter().map(|task| task.records.len()).sum();
    let (n_references, steps) = (first.references.len(), first.settings.steps);
    let latent = pipeline.latent_shape(first.settings.size);
    let there = given.target.dim(0)?;
    if is_repeated && first.first_target + n_targets <= there {
        return given.of_targets(first.first_target, n_targets)?.validate(n_targets, n_references, steps, latent);
    }
    given.validate(n_targets, n_references, steps, latent)
}

/// Where the networks run, in the number format that is asked for: on a GPU of their weights and of all between their layers,
/// on the CPU of the factors of matrix products alone.
fn open_runtime(device: &cli::Device, dtype: cli::Dtype) -> Result<Runtime> {
    let runtime = Runtime::open(device.name())?;
    let format = match (dtype, runtime.device.is_cpu()) {
        (cli::Dtype::F32, _) => DType::F32,
        (cli::Dtype::Bf16, true) => {
            set_matmul_precision(Precision::Medium);
            DType::F32
        }
        (cli::Dtype::F16, true) => {
            return Err(invalid(
                "--dtype f16: on a GPU only; on the CPU leave it out (f32), or give bf16 for faster matrix products where \
                 there is AMX",
            ));
        }
        (cli::Dtype::Bf16, false) => DType::BF16,
        (cli::Dtype::F16, false) => DType::F16,
    };
    Ok(Runtime { dtype: format, ..runtime })
}

/// What would be lost or could not be written in the end.
fn check_outputs(args: &SampleArgs, sets: &Sets, gallery: &Gallery) -> Result<()> {
    if let Some(path) = &args.save_latents {
        check_file_writable(path).context("--save-latents")?;
    }
    let Some(path) = gallery.replaces() else { return Ok(()) };
    let is_same = |other: &Path| path.canonicalize().is_ok_and(|path| other.canonicalize().is_ok_and(|o| o == path));
    let mut references = sets.wishes().iter().flat_map(|wish| wish.asked.refs.iter().flatten());
    if references.any(|reference| is_same(&reference.image)) {
        return Err(invalid(format!("--out {}: is a reference; name another file", path.display())));
    }
    report::warn(format!("{}: is there already and will be replaced", path.display()));
    Ok(())
}

fn note_what_may_surprise(args: &SampleArgs, run: &Run, tasks: &[Task], pipeline: &Pipeline) -> Result<()> {
    let texts: BTreeSet<&str> = tasks
        .iter()
        .flat_map(|task| {
            let captions = task.references.iter().filter_map(|shown| shown.caption.as_deref());
            let prompts = task.records.iter().map(|record| record.prompt.as_str());
            prompts.chain(captions).chain([task.negative_prompt.as_str()])
        })
        .collect();
    for text in texts {
        if let Some(cut) = pipeline.tokenizer().encode(text)?.cut {
            report::warn(format!("{text:?}: too long for this model, its end is not used: {cut:?}"));
        }
    }
    if args.prompts.iter().any(|prompt| prompt.trim().is_empty()) {
        report::note("--prompt: is empty, so the picture follows the references alone");
    }
    let has_references = tasks.iter().any(|task| !task.references.is_empty());
    if has_references && pipeline.family() == Family::Inpainting {
        report::note(format!(
            "{}: is made for inpainting, not trained on sets, so this is training-free: the references go in as pictures \
             of which nothing is masked, beside coupled attention and the replacement trick",
            run.model
        ));
    }
    if !pipeline.is_joint() && has_references {
        report::note(format!(
            "{}: takes no references (a plain Stable Diffusion U-Net), so this is training-free: coupled attention and \
             the replacement trick alone",
            run.model
        ));
    }
    if !run.is_coupled && has_references {
        report::note("--uncoupled: the references cannot be seen");
    }
    let is_unguided = |task: &Task| task.settings.guidance.branches().len() == 1;
    if tasks.iter().any(|task| is_unguided(task) && !task.negative_prompt.is_empty()) {
        report::note("--negative-prompt: has no say at scale 1, where nothing is pushed");
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

//! `jedi sample`: references and prompts become pictures. What is wrong is found before the sampling starts; pictures
//! are written as they are done.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use candle_core::{Device, DeviceLocation, Tensor};
use image::RgbImage;
use serde_json::{Value, json};

use super::models;
use crate::cli::{self, SampleArgs};
use crate::data::{self, load_reference};
use crate::device::Runtime;
use crate::diffusion::{Guidance, Sampler};
use crate::interrupt::Interrupt;
use crate::invalid::invalid;
use crate::model::write::write_tensors;
use crate::model::{Family, Files};
use crate::ops::{Precision, set_matmul_precision};
use crate::report;
use crate::sample::gallery::check_file_writable;
use crate::sample::{Gallery, GivenNoise, Pipeline, Reference, SampleSettings, SetRequest};
use crate::sha256::sha256_hex;

pub fn run(args: SampleArgs) -> Result<()> {
    let files = models::open(&args.model, args.tokenizer.as_deref())?;
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
    note_what_may_surprise(&args, &files, &pipeline)?;

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

/// A reference as the user gave it.
struct Shown {
    image: RgbImage,
    caption: Option<String>,
    path: String,
    sha256: String,
}

fn read_references(args: &SampleArgs) -> Result<Vec<Shown>> {
    let fit = match args.fit {
        cli::Fit::Crop => data::Fit::Crop,
        cli::Fit::Pad => data::Fit::Pad,
    };
    let read = |reference: &cli::Reference| {
        let path = reference.image.display().to_string();
        if !reference.image.exists() {
            return Err(invalid(format!("--ref {path}: no such file; check the path")));
        }
        let (image, notices) = load_reference(&reference.image, fit)?;
        for notice in notices {
            report::warn(format!("{path}: {notice}"));
        }
        let bytes = std::fs::read(&reference.image).with_context(|| path.clone())?;
        Ok(Shown { image, caption: reference.caption.clone(), path, sha256: sha256_hex(&bytes) })
    };
    args.references.iter().map(read).collect()
}

/// The guidance that the flags ask for.
fn guidance(args: &SampleArgs, files: &Files) -> Result<Guidance> {
    let scale = models::guidance_scale(args.scale, files)?;
    let text_scale = args.text_scale.unwrap_or(scale);
    let image_scale = args.image_scale.unwrap_or(scale);
    let has_one_scale = matches!(args.guidance, cli::Guidance::Joint | cli::Guidance::TextOnly);
    for (flag, value) in [("--text-scale", args.text_scale), ("--image-scale", args.image_scale)] {
        if let Some(value) = value.filter(|_| has_one_scale) {
            return Err(invalid(format!(
                "{flag} {value}: works with --guidance text-first or image-first; the other ways take --scale"
            )));
        }
    }
    Ok(match args.guidance {
        cli::Guidance::Joint => Guidance::Joint { scale },
        cli::Guidance::TextOnly => Guidance::TextOnly { scale },
        cli::Guidance::TextFirst => Guidance::TextFirst { text_scale, image_scale },
        cli::Guidance::ImageFirst => Guidance::ImageFirst { text_scale, image_scale },
    })
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

fn note_what_may_surprise(args: &SampleArgs, files: &Files, pipeline: &Pipeline) -> Result<()> {
    let captions = args.references.iter().filter_map(|reference| reference.caption.as_ref());
    for text in args.prompts.iter().chain(captions) {
        if let Some(cut) = pipeline.tokenizer().encode(text)?.cut {
            report::warn(format!("{text:?}: too long for this model, its end is not used: {cut:?}"));
        }
    }
    if args.prompts.iter().any(|prompt| prompt.trim().is_empty()) {
        report::note("--prompt: is empty, so the picture follows the references alone");
    }
    let family = Family::of(files, &files.json("unet/config.json")?)?;
    if family == Family::Inpainting && !args.references.is_empty() {
        report::note(format!(
            "{}: is made for inpainting, not trained on sets, so this is training-free: the references go in as masked \
             pictures beside coupled attention and the replacement trick",
            args.model
        ));
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

/// One set a picture, or all pictures in one; each picture has its own seed.
fn requests(args: &SampleArgs, shown: &[Shown], size: usize) -> Vec<SetRequest> {
    let known = |shown: &Shown| Reference {
        image: data::resized(&shown.image, size as u32),
        caption: shown.caption.clone().unwrap_or_default(),
    };
    let references: Vec<Reference> = shown.iter().map(known).collect();
    let each = args.prompts.iter().flat_map(|prompt| (0..args.num_images as u64).map(move |j| (prompt.clone(), j)));
    let set = |prompts, seeds| SetRequest { references: references.clone(), prompts, seeds };
    if args.joint {
        let prompts: Vec<String> = each.map(|(prompt, _)| prompt).collect();
        let seeds = (0..prompts.len() as u64).map(|j| args.seed.wrapping_add(j)).collect();
        return vec![set(prompts, seeds)];
    }
    each.map(|(prompt, j)| set(vec![prompt], vec![args.seed.wrapping_add(j)])).collect()
}

/// How the pictures of a run came about.
struct Story<'a> {
    args: &'a SampleArgs,
    shown: &'a [Shown],
    settings: &'a SampleSettings,
    device: String,
}

impl Story<'_> {
    /// All that makes one picture again.
    fn of_picture(&self, prompt: &str, seed: u64) -> Value {
        let SampleSettings { steps, guidance, size, .. } = self.settings;
        let reference = |shown: &Shown| json!({"path": shown.path, "sha256": shown.sha256, "caption": shown.caption});
        let guidance = match guidance {
            Guidance::Joint { scale } => json!({"kind": "joint", "scale": scale}),
            Guidance::TextOnly { scale } => json!({"kind": "text-only", "scale": scale}),
            Guidance::TextFirst { text_scale, image_scale } => {
                json!({"kind": "text-first", "text_scale": text_scale, "image_scale": image_scale})
            }
            Guidance::ImageFirst { text_scale, image_scale } => {
                json!({"kind": "image-first", "text_scale": text_scale, "image_scale": image_scale})
            }
        };
        let fit = match self.args.fit {
            cli::Fit::Crop => "crop",
            cli::Fit::Pad => "pad",
        };
        let mut record = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": self.args.model,
            "prompt": prompt,
            "references": self.shown.iter().map(reference).collect::<Vec<_>>(),
            "fit": fit,
            "seed": seed,
            "steps": steps,
            "sampler": "ddim",
            "guidance": guidance,
            "size": size,
            "coupled": !self.args.uncoupled,
            "device": self.device,
            "dtype": match self.args.dtype {
                cli::Dtype::F32 => "f32",
                cli::Dtype::Bf16 => "bf16",
            },
        });
        if self.args.joint {
            record["set"] = json!({"prompts": self.args.prompts, "num_images": self.args.num_images,
                "seed": self.args.seed});
        }
        if let Some(noise) = &self.args.noise {
            record["noise"] = json!(noise);
        }
        record
    }
}

/// A picture on stdout: its path, or all about it.
fn line(path: &Path, record: &Value, is_json: bool) -> String {
    let path = path.display().to_string();
    let mut all = json!({ "path": path });
    match (all.as_object_mut(), record.as_object()) {
        (Some(all), Some(record)) if is_json => all.extend(record.clone()),
        _ => return path,
    }
    all.to_string()
}

fn device_name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".into(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

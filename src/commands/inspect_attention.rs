//! `jedi inspect attention`: the heat map of one place over the pictures of its set, and the strongest correspondences (the
//! paper's Figure 5).

use std::fs;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use image::RgbImage;
use serde_json::json;

use super::models;
use crate::cli::InspectAttentionArgs;
use crate::data::{Fit, load_reference, resized, write_png};
use crate::device::Runtime;
use crate::diffusion::Guidance;
use crate::interrupt::Interrupt;
use crate::invalid::invalid;
use crate::model::Probe;
use crate::model::coupling::Heard;
use crate::report;
use crate::sample::attention_map::{correspondences, heat_map, matches_picture};
use crate::sample::{Pipeline, Reference, SampleSettings, SetRequest};

pub fn run(args: &InspectAttentionArgs) -> Result<()> {
    let at_step = args.at_step.unwrap_or(args.steps.div_ceil(2));
    let n_images = args.references.len() + 1;
    let image = args.image.unwrap_or(n_images);
    if at_step > args.steps {
        return Err(invalid(format!("--at-step {at_step}: there are {} steps; name one of them", args.steps)));
    }
    if image > n_images {
        return Err(invalid(format!("--image {image}: the set has {n_images} pictures, the new one being the last")));
    }
    let files = models::open(&args.model, args.tokenizer.as_deref())?;
    let guidance = Guidance::Joint { scale: models::guidance_scale(args.scale, &files)? };
    let interrupt = Interrupt::install()?;
    fs::create_dir_all(&args.out).with_context(|| format!("--out {}", args.out.display()))?;

    let probe = Arc::new(Probe::new(args.layers.clone()));
    let pipeline = Pipeline::load(&files, &Runtime::open(args.device.name())?, true)?.probed(probe.clone());
    let settings = SampleSettings::new(guidance, args.steps, args.size.unwrap_or(pipeline.native_size()));
    pipeline.check_size(settings.size)?;
    let (x, y) = args.point.map_or((settings.size / 2, settings.size / 2), |point| (point.x, point.y));
    if x.max(y) >= settings.size {
        return Err(invalid(format!(
            "--point {x},{y}: the pictures have {0}×{0} pixels, counted from 0",
            settings.size
        )));
    }

    let request = request(args, settings.size)?;
    let bar = report::progress(args.steps as u64, "sampling");
    let mut heard = Vec::new();
    let painted = pipeline.paint_watched(std::slice::from_ref(&request), &settings, None, &mut |step| {
        if interrupt.requested() {
            bail!("interrupted; nothing is written yet");
        }
        bar.inc(1);
        let now = probe.take();
        if step.number + 1 == at_step {
            heard = now;
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    if heard.is_empty() {
        return Err(invalid(format!(
            "--layer {}: no self-attention of this model has that in its name; `jedi inspect checkpoint` lists the names",
            args.layers.join(", ")
        )));
    }
    let mut images: Vec<RgbImage> = request.references.into_iter().map(|reference| reference.image).collect();
    images.extend(painted.images);
    // All that is known comes last of the branches.
    let set = settings.guidance.branches().len() - 1;
    heard.iter().try_for_each(|heard| draw(args, heard, &images, set, image - 1, (x, y)))
}

/// The set of the references and the new picture.
fn request(args: &InspectAttentionArgs, size: usize) -> Result<SetRequest> {
    let mut references = Vec::with_capacity(args.references.len());
    for reference in &args.references {
        let name = reference.image.display();
        if !reference.image.exists() {
            return Err(invalid(format!("--ref {name}: no such file; check the path")));
        }
        let (image, notices) = load_reference(&reference.image, Fit::Crop)?;
        for notice in notices {
            report::warn(format!("{name}: {notice}"));
        }
        references.push(Reference::new(resized(&image, size as u32), reference.caption.clone().unwrap_or_default()));
    }
    let (prompts, seeds) = (vec![args.prompt.clone()], vec![args.seed]);
    Ok(SetRequest { references, prompts, negative_prompt: String::new(), seeds })
}

/// Both pictures of a layer.
fn draw(
    args: &InspectAttentionArgs,
    heard: &Heard,
    images: &[RgbImage],
    set: usize,
    image: usize,
    point: (usize, usize),
) -> Result<()> {
    let size = images[0].width() as usize;
    let (row, column) = (point.1 * heard.height / size, point.0 * heard.width / size);
    let shares = heard.of_places(set, image, &[row * heard.width + column])?.get(0)?.to_vec2::<f32>()?; // [n, h·w]
    let layer = heard.layer.trim_end_matches(".attn1").replace(".transformer_blocks", "");
    let heat_path = args.out.join(format!("heat-{layer}.png"));
    write_png(&heat_path, &heat_map(images, &shares, heard.width, (image, point))?)?;

    let last = images.len() - 1;
    let matches = correspondences(heard, set, (0, last), args.matches)?;
    let matches_path = args.out.join(format!("matches-{layer}.png"));
    let grid = (heard.width, heard.height);
    write_png(&matches_path, &matches_picture(&images[0], &images[last], &matches, grid)?)?;

    let paths = [heat_path, matches_path].map(|path| path.display().to_string());
    if args.json {
        let of_images: Vec<f32> = shares.iter().map(|shares| shares.iter().sum()).collect();
        let [heat, matched] = paths;
        let line = json!({"layer": heard.layer, "heat": heat, "matches": matched, "shares": of_images});
        return Ok(report::result(line.to_string())?);
    }
    paths.iter().try_for_each(|path| Ok(report::result(path)?))
}

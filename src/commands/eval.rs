//! `jedi eval`: how well a model keeps the subject and follows the prompt.

use anyhow::{Context as _, Result, bail};
use image::RgbImage;

use super::steering::Steering;
use super::{models, toybox_trials};
use crate::cli::{EvalArgs, EvalRow, Protocol};
use crate::data::{sheet, write_png};
use crate::device::Runtime;
use crate::eval::{Judge, JudgeSettings, Label, Report, judge_pictures, oracle, run as run_trials, trials};
use crate::interrupt::Interrupt;
use crate::report;
use crate::sample::Pipeline;

/// Variations of the pictures that the judge is fitted to come first, those of the oracle from here on, and the references
/// take theirs from the trials' seeds, which lie far away.
const ORACLE_VARIATION: u64 = 100;

pub fn run(args: &EvalArgs) -> Result<()> {
    let Protocol::Toybox = args.protocol;
    let files = models::open(&args.model, args.tokenizer.as_deref())?;
    let steering = Steering::new(&args.steering, models::guidance_scale(None, &files)?)?;
    let runtime = Runtime::open(args.device.name())?;
    let interrupt = Interrupt::install()?;
    if let Some(out) = &args.out {
        std::fs::create_dir_all(out).with_context(|| format!("--out {}: cannot be made", out.display()))?;
    }
    let coupled = Pipeline::load(&files, &runtime, true)?;
    let settings = steering.at(coupled.native_size());

    report::note("fitting the judge to real pictures of the 64 toys");
    let judge_settings = JudgeSettings { seed: args.seed, ..JudgeSettings::default() };
    let world = toybox_trials::world();
    let draw = |label, variation| toybox_trials::picture(label, variation, settings.size as u32);
    let judge = Judge::fit(&world, &world.draw_all(0..judge_settings.variations, &draw), &judge_settings)?;
    let real = world.draw_all(ORACLE_VARIATION..ORACLE_VARIATION + 1, &draw);
    let mut oracle_rows = oracle(&judge, &real, args.seed)?;
    let (pictures, wanted): (Vec<RgbImage>, Vec<Label>) = real.into_iter().map(|real| (real.image, real.label)).unzip();
    let through_vae = coupled.reconstruct(&pictures, &settings)?;
    oracle_rows.push(judge_pictures("real pictures, through the VAE", &judge, &through_vae, &wanted)?);

    let mut trials = trials(&world, 1, args.seed)?;
    trials.retain(|trial| trial.toy < args.toys);
    let references: Vec<RgbImage> = trials.iter().map(|trial| toybox_trials::reference(trial, settings.size)).collect();
    let conditions = match args.only.as_slice() {
        [] => &[EvalRow::Coupled, EvalRow::Uncoupled, EvalRow::NoReference],
        only => only,
    };
    let (mut rows, mut columns) = (Vec::new(), vec![references]);
    for condition in conditions {
        let (name, has_references) = match condition {
            EvalRow::Coupled => ("one reference", true),
            EvalRow::Uncoupled => ("one reference, --uncoupled", true),
            EvalRow::NoReference => ("no reference", false),
        };
        let uncoupled = match condition {
            EvalRow::Uncoupled => Some(Pipeline::load(&files, &runtime, false)?),
            _ => None,
        };
        let pipeline = uncoupled.as_ref().unwrap_or(&coupled);
        if !report::has_bars() {
            report::note(format!("painting {} pictures: {name}", trials.len()));
        }
        let bar = report::progress(settings.steps as u64, name);
        let outcome = run_trials(name, &trials, &judge, &mut |trials| {
            let requests = toybox_trials::requests(trials, settings.size, has_references);
            bar.set_length(pipeline.steps_of(&requests, &settings) as u64);
            let on_step = &mut || {
                bar.inc(1);
                if interrupt.requested() {
                    bail!("interrupted; nothing was written");
                }
                Ok(())
            };
            Ok(pipeline.paint(&requests, &settings, None, on_step)?.images)
        })?;
        bar.finish_and_clear();
        rows.push(outcome.row);
        columns.push(outcome.images);
    }

    let result = Report::new(&world, judge_settings, oracle_rows, rows);
    let mut json = serde_json::to_value(&result)?;
    // What the flags said; the rest is as `jedi sample` has it.
    json["sampling"] = serde_json::to_value(&args.steering)?;
    let json = serde_json::to_string_pretty(&json)?;
    if let Some(out) = &args.out {
        let groups: Vec<Vec<&RgbImage>> =
            (0..trials.len()).map(|trial| columns.iter().map(|column| &column[trial]).collect()).collect();
        write_png(&out.join("sheet.png"), &sheet(&groups, 4)?)?;
        crate::whole_file::write_whole(&out.join("report.json"), json.as_bytes())?;
        report::note(format!("wrote report.json and sheet.png in {}", out.display()));
    }
    Ok(report::result(if args.json { json } else { result.to_string() })?)
}

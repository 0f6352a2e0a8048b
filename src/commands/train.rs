//! `jedi train`: a config file becomes a run folder.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use candle_core::Device;

use super::models::{self, Part};
use super::preview;
use super::sources::{self, BrokenSamples};
use crate::cli::TrainArgs;
use crate::data::{Mixture, SetSource};
use crate::device::Runtime;
use crate::interrupt::Interrupt;
use crate::model::HubName;
use crate::ops::{peak_resident_bytes, set_matmul_precision, threads};
use crate::ranks::Ranks;
use crate::synth::toybox::HeldOutToys;
use crate::train::data_settings::SourceConfig;
use crate::train::optimizer::Optimizer;
use crate::train::plan::{MemoryPlan, TimePlan, duration, gigabytes};
use crate::train::settings::{ComputeDtype, ValidationConfig};
use crate::train::trainer::{Outcome, own_share};
use crate::train::{
    AutoencoderObjective, Hooks, JointObjective, Objective, ObjectiveKind, Share, StepReport, TrainConfig,
};
use crate::{config, report, train};

pub fn run(args: TrainArgs) -> Result<()> {
    let ranks = Rc::new(Ranks::join()?);
    if !ranks.is_first() {
        report::hush();
    }
    let outcome = run_among(&ranks, args);
    // An error that the others do not know of is told here, and its rank is missed by them.
    if outcome.is_ok() || ranks.has_agreed_to_fail() {
        ranks.leave();
        if !ranks.is_first() {
            report::hush_errors();
        }
    }
    outcome.and_then(|ended| ended.told())
}

fn run_among(ranks: &Rc<Ranks>, args: TrainArgs) -> Result<Ended> {
    let settings = ranks.all_succeed(read_settings(&args))?;
    if args.dry_run {
        report::result(config::to_toml(&settings)?.trim_end())?;
    }
    ranks.all_have_same("--config", toml::to_string(&settings)?.as_bytes())?;
    if !ranks.watch(super::end_without)? {
        report::warn("some ranks cannot reach the first one by TCP: only the launcher will notice one that is gone");
    }
    // One downloads, the others find it in the cache.
    let on_disk = ranks.on_first(|| downloaded(&settings))?;
    let mut on_disk = ranks.all_succeed(on_disk.map_or_else(|| downloaded(&settings), Ok))?;
    let out = args.out.unwrap_or_else(|| default_out(&args.config));
    let runtime = ranks.all_succeed(Runtime::open_for(args.device.name(), ranks.local_rank()))?;
    if args.dry_run && runtime.device.is_cpu() && on_disk.run.dtype == ComputeDtype::Bf16 {
        report::note("run.dtype: bf16 is for GPUs; without one the dry run counts and times f32");
        on_disk.run.dtype = ComputeDtype::F32;
    }
    let is_direct = ranks.connect_gpus(&runtime.device)?;
    let interrupt = ranks.all_succeed(Interrupt::install())?;
    set_matmul_precision(settings.run.matmul_precision);

    let broken = BrokenSamples::new(&out);
    let mut mixture = ranks.all_succeed(sources::mixture(&on_disk.data, &broken))?;
    if let (0, Some(cpus)) = (mixture.workers, ranks.own_cpus()) {
        mixture.workers = Mixture::workers_of(cpus);
    }
    let n_workers = mixture.n_workers();
    let mut objective = ranks.all_succeed(objective(&on_disk, &runtime, mixture))?;
    ranks.all_have_same("the networks that are trained", shapes(objective.as_ref()).as_bytes())?;
    objective.notices().iter().for_each(report::note);
    let own = ranks.all_succeed(own_share(ranks, objective.as_ref()))?;
    let plan = ranks.all_succeed(MemoryPlan::of(&settings, objective.as_mut(), own, &runtime.device))?;
    if args.dry_run {
        report::result(format!("# threads: {}", threads_of(ranks, n_workers)))?;
        ranks.all_succeed(tell_plan(&settings, objective.as_mut(), own, &plan))?;
        return Ok(Ended::Tried);
    }
    report::note(plan.describe());
    let parameters: usize = objective.parameters().values().map(|var| var.elem_count()).sum();
    let way = match runtime.device {
        Device::Cuda(_) if is_direct => ", from GPU to GPU by NCCL",
        Device::Cuda(_) => ", through the host's memory",
        _ => "",
    };
    report::note(format!(
        "{}: training {:.2} M parameters{}",
        out.display(),
        parameters as f64 / 1e6,
        company(ranks, way, n_workers)
    ));
    let mut progress = Progress::new(settings.run.steps);
    let outcome = train::train_among(
        ranks,
        &settings,
        objective.as_mut(),
        &out,
        Hooks {
            on_step: &mut |step| progress.show(step),
            on_notice: &mut |notice| report::warn(notice),
            on_checkpoint: &mut |steps, folder| {
                report::note(format!("saved {}", folder.display()));
                // Whoever sends SIGTERM soon sends SIGKILL.
                if interrupt.terminated() || settings.run.preview_images == 0 {
                    return Ok(None);
                }
                let sheet = preview::write(&settings, &out, steps, folder, &runtime);
                // A preview is for looking at; a run does not end for want of one.
                let warn = |error| report::warn(format!("no preview of step {steps}: {error:#}"));
                Ok(sheet.map_err(warn).ok())
            },
            is_interrupted: &|| interrupt.requested(),
        },
    )?;
    if let Some(summary) = broken.summary() {
        report::note_of_any(summary);
    }
    Ok(match outcome {
        Outcome::Finished => {
            if let Some(most) = peak_resident_bytes() {
                report::note(format!("at most {} of memory were in use", gigabytes(most)));
            }
            Ended::Finished(out.join("checkpoints/latest"))
        }
        Outcome::Interrupted(steps) if ranks.any(interrupt.terminated()) => Ended::Terminated(steps),
        Outcome::Interrupted(steps) => Ended::Interrupted(steps),
    })
}

/// What is left to tell once the ranks have parted.
enum Ended {
    /// With all that was asked for, which is told.
    Tried,
    Finished(PathBuf),
    /// By SIGTERM to any rank.
    Terminated(u64),
    Interrupted(u64),
}

impl Ended {
    fn told(self) -> Result<()> {
        match self {
            Self::Tried => Ok(()),
            Self::Finished(latest) => Ok(report::result(latest.display().to_string())?),
            Self::Terminated(steps) => {
                report::note(format!(
                    "ended by SIGTERM after {steps} steps, which are saved; run the same command again to go on"
                ));
                Ok(())
            }
            Self::Interrupted(steps) => {
                bail!("interrupted after {steps} steps, which are saved; run the same command again to go on")
            }
        }
    }
}

fn read_settings(args: &TrainArgs) -> Result<TrainConfig> {
    let settings: TrainConfig = config::load(&args.config, &args.overrides)?;
    settings.validate().with_context(|| args.config.display().to_string())?;
    Ok(settings)
}

/// Names and sizes of all that is trained.
fn shapes(objective: &dyn Objective) -> String {
    objective.parameters().iter().map(|(name, var)| format!("{name} {:?}\n", var.dims())).collect()
}

/// `way`: that of gradients between the processes.
fn company(ranks: &Ranks, way: &str, n_workers: usize) -> String {
    match ranks.count() {
        1 => String::new(),
        count => format!(" by {count} processes{way}; threads: {}", threads_of(ranks, n_workers)),
    }
}

fn threads_of(ranks: &Ranks, n_workers: usize) -> String {
    let place = match ranks.local_count() {
        1 => String::new(),
        count => format!(", in each of {count} processes on this machine"),
    };
    format!("{} compute, {n_workers} decode ahead{place}", threads())
}

/// The end of a dry run, as comments behind the settings: the whole is a config file still.
fn tell_plan(settings: &TrainConfig, objective: &mut dyn Objective, own: Share, memory: &MemoryPlan) -> Result<()> {
    /// Steps that the number of sets in a step is averaged over.
    const SAMPLED: u64 = 1000;
    let (steps, n_sets) = (settings.run.steps, objective.footprint().n_sets);
    let mut n_dealt = 0;
    for step in 0..steps.min(SAMPLED) {
        n_dealt += objective.shape(step).sets;
    }
    let passes = n_dealt as f64 / steps.min(SAMPLED) as f64 * steps as f64 / n_sets as f64;
    let n_images = steps * settings.run.images_per_step as u64;
    let sources = settings.data.all_sources();
    let sources: Vec<&str> = sources.iter().map(SourceConfig::name).collect();
    report::result(format!(
        "# data: {n_sets} sets in {}; the run sees {n_images} images, each set about {passes:.1} times",
        sources.join(", ")
    ))?;
    report::result(format!("# {}", memory.describe()))?;
    let mut optimizer = Optimizer::new(settings, objective.parameters())?;
    let time = TimePlan::of(settings, objective, own, &mut optimizer)?;
    Ok(report::result(format!("# {}", time.describe(steps)))?)
}

/// `runs/` and the name of the config file.
fn default_out(config: &Path) -> PathBuf {
    Path::new("runs").join(config.file_stem().unwrap_or_default())
}

/// The settings with models of the hub replaced by their folders in its cache. What the run writes keeps their names.
fn downloaded(settings: &TrainConfig) -> Result<TrainConfig> {
    let mut on_disk = settings.clone();
    let model = &mut on_disk.model;
    let (built, started): (&[Part], &[Part]) = match settings.objective {
        ObjectiveKind::Autoencoder => (&[Part::Vae], &[Part::Vae]),
        ObjectiveKind::Joint => {
            (&[Part::Unet, Part::TextEncoder, Part::Tokenizer, Part::Scheduler], &[Part::Unet, Part::TextEncoder])
        }
    };
    for (option, folder, parts) in [
        ("model.architecture", Some(&mut model.architecture), built),
        ("model.start_from", model.start_from.as_mut(), started),
        ("model.vae", model.vae.as_mut(), &[Part::Vae]),
    ] {
        let Some(folder) = folder else { continue };
        let name = folder.display().to_string();
        if !folder.is_dir() && HubName::parse(&name).is_some() {
            *folder = models::from_hub(option, &name, parts)?;
        }
    }
    Ok(on_disk)
}

fn objective(settings: &TrainConfig, runtime: &Runtime, mixture: Mixture) -> Result<Box<dyn Objective>> {
    let size = settings.data.size;
    let toys = HeldOutToys { images: 4, size };
    Ok(match settings.objective {
        ObjectiveKind::Autoencoder => Box::new(AutoencoderObjective::new(settings, runtime, mixture, &toys)?),
        ObjectiveKind::Joint => {
            let mut validation: Vec<(String, Arc<dyn SetSource>)> = vec![];
            for ValidationConfig { name, source, layout } in &settings.validation {
                let source = SourceConfig { layout: *layout, ..SourceConfig::plain(source) };
                let source = sources::open(&source, size).with_context(|| format!("validation {name}"))?;
                validation.push((name.clone(), source));
            }
            if validation.is_empty() {
                validation.push(("toys".to_owned(), Arc::new(toys)));
            }
            Box::new(JointObjective::new(settings, runtime, mixture, validation)?)
        }
    })
}

/// A bar on a terminal; elsewhere a line every hundred steps.
struct Progress {
    bar: indicatif::ProgressBar,
    steps: u64,
    /// Smoothed loss and seconds a step.
    recent: Option<(f64, f64)>,
}

impl Progress {
    fn new(steps: u64) -> Self {
        Self { bar: report::progress(steps, "training"), steps, recent: None }
    }

    fn show(&mut self, step: &StepReport) {
        let (loss, seconds) = self.recent.unwrap_or((step.loss, step.seconds));
        let smooth = |old: f64, new: f64| 0.98 * old + 0.02 * new;
        let (loss, seconds) = (smooth(loss, step.loss), smooth(seconds, step.seconds));
        self.recent = Some((loss, seconds));
        let images_per_step = step.images as f64 / (step.step + 1) as f64;
        let left = duration(seconds * (self.steps - step.step - 1) as f64);
        let line = format!("loss {loss:.4}, {:.1} images/s", images_per_step / seconds);
        self.bar.set_position(step.step + 1);
        self.bar.set_message(line.clone());
        if let Some(validation) = step.validation_loss {
            report::note(format!("step {}: {line}, {left} left, held-out loss {validation:.4}", step.step + 1));
        } else if !report::has_bars() && (step.step + 1).is_multiple_of(100) {
            report::note(format!("step {} of {}: {line}, {left} left", step.step + 1, self.steps));
        }
    }
}

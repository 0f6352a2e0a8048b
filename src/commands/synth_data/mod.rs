//! `jedi synth-data`: sets that share a subject, to train on; drawn, or made by the pipeline that a config describes.

mod dry_run;
mod language;
mod networks;
mod painters;
mod tools;

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;

use crate::cli::{SynthDataArgs, SynthSource, SynthStage};
use crate::device::Runtime;
use crate::interrupt::Interrupt;
use crate::synth::page::write_page;
use crate::synth::settings::SynthConfig;
use crate::synth::stage::Stage;
use crate::synth::toybox::ToyboxSource;
use crate::synth::{Done, Job, Packing, Part, Progress, ToyboxData, Watch, synthesise, write_toybox};
use crate::{config, report};

pub fn run(args: SynthDataArgs) -> Result<()> {
    match args.config.clone() {
        Some(config) => synthesised(&args, &config),
        None => drawn(args),
    }
}

fn drawn(args: SynthDataArgs) -> Result<()> {
    let SynthSource::Toybox = args.source;
    let data = ToyboxData {
        folder: args.out,
        source: ToyboxSource {
            seed: args.seed.unwrap_or(0),
            sets: args.sets,
            images: args.images,
            size: args.size as u32,
        },
        masks: args.masks,
        packing: match args.per_shard {
            0 => Packing::Folder,
            sets_per_shard => Packing::Shards { sets_per_shard },
        },
        part: Part::new(args.shard.index, args.shard.count)?,
    };
    let interrupt = Interrupt::install()?;
    let bar = report::progress(args.sets as u64, "drawing");
    let mut show = |done: usize, total: usize| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    };
    let summary = write_toybox(&data, &mut show, &|| interrupt.requested())?;
    bar.finish_and_clear();
    let place = data.folder.display();
    let (written, kept) = (summary.written, summary.kept);
    report::note(format!("{place}: {written} sets of {} pictures written, {kept} were there", data.source.images));
    if summary.missing > 0 {
        bail!("interrupted, {} sets are missing; run the same command again to go on", summary.missing);
    }
    Ok(report::result(place.to_string())?)
}

fn synthesised(args: &SynthDataArgs, file: &Path) -> Result<()> {
    let mut config: SynthConfig = config::load(file, &args.overrides)?;
    if let Some(seed) = args.seed {
        config.sets.seed = seed;
    }
    config.validate().with_context(|| file.display().to_string())?;
    let job = Job {
        config,
        sets: args.sets,
        folder: args.out.clone(),
        work: args.work.clone(),
        part: Part::new(args.shard.index, args.shard.count)?,
        limit: args.limit,
        until: args.stage.map_or(Stage::Score, stage),
        keep_rejected: args.keep_rejected,
    };
    let runtime = Runtime::open(args.device.name())?;
    let interrupt = Interrupt::default();
    let mut tools = tools::open(&job, &runtime, &interrupt, args.dry_run)?;
    if args.dry_run {
        return dry_run::print(&job, &tools);
    }
    // Not before: Ctrl-C ends a download at once.
    interrupt.catch_signals()?;
    let mut shown = Shown::new(&job);
    let mut watch = Watch { progress: &mut |progress| shown.show(progress), interrupted: &|| interrupt.requested() };
    let done = synthesise(&job, &mut tools, &mut watch)?;
    shown.bar.finish_and_clear();
    told(&job, &done)
}

/// What came of it, on stderr; where it lies, on stdout.
fn told(job: &Job, done: &Done) -> Result<()> {
    if done.yields.numbers > 0 {
        done.yields.lines().iter().for_each(report::note);
    }
    let place = job.folder.display();
    let Done { written, kept, missing, .. } = *done;
    report::note(format!("{place}: {written} shards written, {kept} were there, {missing} of this part are missing"));
    let mut pages = vec![write_page(&job.work_root())?];
    if job.until == Stage::Score {
        pages.push(write_page(&job.folder)?);
    }
    for page in pages.iter().flatten() {
        report::note(format!("report: {}", page.display()));
    }
    if done.is_interrupted {
        bail!("interrupted, {missing} shards are missing; run the same command again to go on");
    }
    Ok(report::result(place.to_string())?)
}

fn stage(asked: SynthStage) -> Stage {
    match asked {
        SynthStage::Prompts => Stage::Prompts,
        SynthStage::Collage => Stage::Collage,
        SynthStage::Instances => Stage::Instances,
        SynthStage::Affinity => Stage::Affinity,
        SynthStage::Compose => Stage::Compose,
        SynthStage::Stylise => Stage::Stylise,
        SynthStage::Caption => Stage::Caption,
        SynthStage::Score => Stage::Score,
    }
}

/// A bar over set numbers times stages on a terminal; elsewhere a line now and then.
struct Shown {
    bar: ProgressBar,
    told: Instant,
}

impl Shown {
    /// Seconds between two lines where there is no bar.
    const PAUSE: f64 = 10.0;

    fn new(job: &Job) -> Self {
        let numbers: usize = job.shards().iter().map(|shard| shard.sets.len()).sum();
        let numbers = job.limit.map_or(numbers, |limit| limit.min(numbers));
        let n_stages = Stage::ALL.iter().filter(|stage| **stage <= job.until).count();
        Self { bar: report::progress((numbers * n_stages) as u64, "stages"), told: Instant::now() }
    }

    fn show(&mut self, progress: Progress) {
        let Progress { stage, shard, attempt, sets, was_there } = progress;
        if attempt == 0 {
            self.bar.inc(sets as u64);
        }
        let again = if attempt == 0 { String::new() } else { format!(", attempt {}", attempt + 1) };
        let line = format!("shard {shard}{again}: {}", stage.name());
        self.bar.set_message(line.clone());
        if !report::has_bars() && !was_there && self.told.elapsed().as_secs_f64() > Self::PAUSE {
            self.told = Instant::now();
            report::note(format!("{line} of {sets} sets is done"));
        }
    }
}

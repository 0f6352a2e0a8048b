//! The run: shard by shard, attempt by attempt, group of stages by group, batch by batch. Read `job` first.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};

use super::draft::Draft;
use super::finish::{Outcome, clear, finish, summarise};
use super::job::{Batch, Job, Shard};
use super::manifest::claim;
use super::prompts::object_of;
use super::saved::{self, Head};
use super::settings::SynthConfig;
use super::stage::Stage;
use super::tool::Tools;
use super::yields::Yield;
use super::{affinity, caption, collage, compose, instances, prompts, score, stylise};
use crate::folder_lock;
use crate::interrupt::is_interrupted;
use crate::whole_file::target_name;

/// A stage of a batch is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Which.
    pub stage: Stage,
    /// Number of the shard.
    pub shard: usize,
    /// From 0.
    pub attempt: u64,
    /// Set numbers that went through it.
    pub sets: usize,
    /// It lay there from an earlier run.
    pub was_there: bool,
}

/// Who watches the run.
pub struct Watch<'a> {
    /// Hears of every stage of a batch that is done.
    pub progress: &'a mut dyn FnMut(Progress),
    /// Says whether to stop.
    pub interrupted: &'a dyn Fn() -> bool,
}

/// What a run has done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Done {
    /// Of the shards that were worked on now.
    pub yields: Yield,
    /// Shards written now.
    pub written: usize,
    /// Shards that were there before.
    pub kept: usize,
    /// Shards of this part that are not there yet.
    pub missing: usize,
    /// Stopped before the asked work was done.
    pub is_interrupted: bool,
}

/// Makes what is not there yet. A second process at the same part is refused.
pub fn synthesise(job: &Job, tools: &mut Tools, watch: &mut Watch) -> Result<Done> {
    let outcome = run(job, tools, watch);
    let is_full = |cause: &std::io::Error| cause.kind() == ErrorKind::StorageFull;
    match outcome {
        Err(error) if error.chain().any(|cause| cause.downcast_ref().is_some_and(is_full)) => {
            Err(error.context("the disk is full; nothing is lost: make room and run the same command again"))
        }
        other => other,
    }
}

fn run(job: &Job, tools: &mut Tools, watch: &mut Watch) -> Result<Done> {
    job.check()?;
    let objects = job.config.objects()?;
    if job.until == Stage::Score {
        claim(&job.folder, &job.manifest(tools)?)?;
    } else {
        fs::create_dir_all(&job.folder).with_context(|| format!("{}: cannot be made", job.folder.display()))?;
    }
    let _lock = folder_lock::hold(&job.folder, &job.part.lock_name(), "synth-data")?;
    let shards = job.shards();
    sweep(job, &shards).with_context(|| format!("{}: unfinished files cannot be removed", job.folder.display()))?;
    let mut run = Run {
        job,
        fingerprints: job.fingerprints(tools)?.into_iter().collect(),
        groups: job.groups(tools),
        models: job.models(tools),
        objects,
        tools,
        watch,
    };
    let mut done = Done { missing: shards.len(), ..Done::default() };
    let mut room = job.limit.unwrap_or(usize::MAX);
    for shard in &shards {
        if room == 0 {
            break;
        }
        let (batches, is_whole) = job.batches(shard, room);
        room = room.saturating_sub(shard.sets.len());
        if job.shard_path(shard).exists() {
            done.kept += 1;
            done.missing -= 1;
            continue;
        }
        let Some(outcomes) = run.work(shard, &batches)? else {
            done.is_interrupted = true;
            break;
        };
        let sum = if job.until == Stage::Score && is_whole {
            done.written += 1;
            done.missing -= 1;
            finish(job, shard, &outcomes, &run.models)?
        } else {
            summarise(job, shard, &outcomes)?
        };
        done.yields = done.yields.plus(&sum);
    }
    run.tools.close_all_but(&[]);
    Ok(done)
}

struct Run<'a, 'w> {
    job: &'a Job,
    tools: &'a mut Tools,
    fingerprints: BTreeMap<Stage, String>,
    groups: Vec<Vec<Stage>>,
    models: serde_json::Value,
    objects: Vec<String>,
    watch: &'a mut Watch<'w>,
}

impl Run<'_, '_> {
    /// Brings the batches to the last asked stage; where their results lie then. None when interrupted.
    fn work(&mut self, shard: &Shard, batches: &[Batch]) -> Result<Option<Vec<Outcome>>> {
        let folder = self.job.work_folder(shard);
        fs::create_dir_all(&folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
        let mut pending: Vec<Vec<u64>> =
            batches.iter().map(|batch| batch.sets.clone().map(|number| number as u64).collect()).collect();
        let mut outcomes: Vec<Outcome> = batches.iter().map(|_| Outcome::default()).collect();
        for attempt in 0..self.job.config.sets.attempts {
            for group in self.groups.clone() {
                self.tools.close_all_but(&group);
                for (batch, numbers) in batches.iter().zip(&pending).filter(|(_, numbers)| !numbers.is_empty()) {
                    if !self.work_batch((shard, batch, attempt), numbers, &group)? {
                        return Ok(None);
                    }
                }
            }
            let done = batches.iter().zip(&mut pending).zip(&mut outcomes);
            for ((batch, numbers), outcome) in done.filter(|((_, numbers), _)| !numbers.is_empty()) {
                let path = |stage: Stage| self.job.work_path(shard, batch, attempt, stage);
                let records = saved::records(&path(self.job.until))?;
                let rejected = records.into_iter().filter(|record| record.rejection.is_some());
                *numbers = rejected.map(|record| record.number).collect();
                let stages = Stage::ALL.into_iter().filter(|stage| *stage <= self.job.until);
                outcome.attempts.push(stages.map(|stage| (stage, path(stage))).collect());
            }
        }
        Ok(Some(outcomes))
    }

    /// Brings one batch through a group of stages; false when interrupted.
    fn work_batch(
        &mut self,
        (shard, batch, attempt): (&Shard, &Batch, u64),
        numbers: &[u64],
        group: &[Stage],
    ) -> Result<bool> {
        let path = |stage: Stage| self.job.work_path(shard, batch, attempt, stage);
        let mut progress =
            Progress { stage: group[0], shard: shard.number, attempt, sets: numbers.len(), was_there: true };
        let mut todo = group;
        while let Some((&stage, rest)) = todo.split_first() {
            if !saved::is_valid(&path(stage), &self.fingerprints[&stage], numbers)? {
                break;
            }
            (self.watch.progress)(Progress { stage, ..progress });
            todo = rest;
        }
        let Some(&first) = todo.first() else { return Ok(true) };
        let mut drafts: Vec<Draft> = match first {
            Stage::Prompts => {
                let seed = self.job.config.sets.seed;
                let draft = |&number: &u64| Draft::new(seed, number, attempt, object_of(seed, number, &self.objects));
                numbers.iter().map(draft).collect()
            }
            _ => saved::read(&stages_before(first).map(path).collect::<Vec<PathBuf>>())?,
        };
        progress.was_there = false;
        for &stage in todo {
            if (self.watch.interrupted)() {
                return Ok(false);
            }
            let start = Instant::now();
            match run_stage(&self.job.config, stage, self.tools, &mut drafts) {
                Err(error) if is_interrupted(&error) => return Ok(false),
                outcome => outcome.with_context(|| format!("shard {}, stage {}", shard.number, stage.name()))?,
            }
            let head = Head {
                fingerprint: self.fingerprints[&stage].clone(),
                numbers: numbers.to_vec(),
                seconds: start.elapsed().as_secs_f64(),
            };
            saved::write(&self.job.work_path(shard, batch, attempt, stage), stage, &head, &drafts)?;
            (self.watch.progress)(Progress { stage, ..progress });
        }
        Ok(true)
    }
}

fn stages_before(stage: Stage) -> impl Iterator<Item = Stage> {
    Stage::ALL.into_iter().filter(move |other| *other < stage)
}

fn run_stage(config: &SynthConfig, stage: Stage, tools: &mut Tools, drafts: &mut [Draft]) -> Result<()> {
    let common = &config.sets;
    match stage {
        Stage::Prompts => prompts::run(common, tools, drafts),
        Stage::Collage => collage::run(&config.collage, common, tools, drafts),
        Stage::Instances => instances::run(&config.instances, common, tools, drafts),
        Stage::Affinity => affinity::run(&config.affinity, common, tools, drafts),
        Stage::Compose => compose::run(&config.compose, common, tools, drafts),
        Stage::Stylise => stylise::run(&config.stylise, common, tools, drafts),
        Stage::Caption => caption::run(common, tools, drafts),
        Stage::Score => score::run(common, tools, drafts),
    }
}

/// Removes what killed runs of this part have left: half-written shards, and the work of finished ones.
fn sweep(job: &Job, shards: &[Shard]) -> Result<()> {
    let is_mine = |name: &str| {
        let number = target_name(name)?.strip_suffix(".tar")?.parse::<usize>().ok()?;
        Some(shards.iter().any(|shard| shard.number == number))
    };
    for entry in fs::read_dir(&job.folder)? {
        let entry = entry?;
        if is_mine(&entry.file_name().to_string_lossy()) == Some(true) {
            fs::remove_file(entry.path())?;
        }
    }
    for shard in shards {
        let folder = job.work_folder(shard);
        if !folder.is_dir() {
            continue;
        }
        if job.work.is_none() && job.shard_path(shard).exists() {
            clear(job, shard)?;
            continue;
        }
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if target_name(&entry.file_name().to_string_lossy()).is_some() {
                fs::remove_file(entry.path())?;
            }
        }
    }
    Ok(())
}

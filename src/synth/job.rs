//! What is to be made, cut into shards, shards into batches: the unit of work is a stage of a batch. Its result lies on disk
//! when it is done, so that a run that was killed anywhere goes on from there, and a set depends on nothing but the config, the
//! seed and its number.

use std::ops::Range;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

use super::output::stage_models;
use super::settings::SynthConfig;
use super::stage::Stage;
use super::tool::{Model, Tools};
use super::write::Part;
use crate::sha256::sha256_hex;

/// Folder of unfinished work in the data's folder; readers of data pass over it.
pub const WORK: &str = ".work";

/// Sets to be made.
#[derive(Clone, Debug)]
pub struct Job {
    /// How.
    pub config: SynthConfig,
    /// Set numbers, in all parts together.
    pub sets: usize,
    /// Where to; made if it does not exist.
    pub folder: PathBuf,
    /// Where the stages keep their results, which then stay there; None: in `.work` of the folder, until their shard is done.
    pub work: Option<PathBuf>,
    /// The share of the work that this call does.
    pub part: Part,
    /// Work on so many set numbers of the part, rounded up to whole batches; None: all.
    pub limit: Option<usize>,
    /// The last stage that is done; only behind the very last one shards are written.
    pub until: Stage,
    /// Write rejected attempts, too, into tars of their own.
    pub keep_rejected: bool,
}

/// One shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 0, over all parts.
    pub number: usize,
    /// Its set numbers.
    pub sets: Range<usize>,
}

/// One batch of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Of its shard, from 0.
    pub number: usize,
    /// Its set numbers.
    pub sets: Range<usize>,
}

impl Job {
    /// The shards of this part.
    pub fn shards(&self) -> Vec<Shard> {
        let per_shard = self.config.sets.sets_per_shard;
        let shards = self.part.range(self.sets.div_ceil(per_shard));
        let shard = |number| Shard { number, sets: number * per_shard..((number + 1) * per_shard).min(self.sets) };
        shards.map(shard).collect()
    }

    /// The batches of a shard, of which `room` set numbers may be worked on; and whether that is all of them.
    pub fn batches(&self, shard: &Shard, room: usize) -> (Vec<Batch>, bool) {
        let size = self.config.sets.batch;
        let batch = |(number, first): (usize, usize)| Batch { number, sets: first..(first + size).min(shard.sets.end) };
        let all: Vec<Batch> = shard.sets.clone().step_by(size).enumerate().map(batch).collect();
        let n_all = all.len();
        let some: Vec<Batch> = all.into_iter().take_while(|batch| batch.sets.start - shard.sets.start < room).collect();
        let is_whole = some.len() == n_all;
        (some, is_whole)
    }

    /// The finished shard.
    pub fn shard_path(&self, shard: &Shard) -> PathBuf {
        self.folder.join(format!("{:05}.tar", shard.number))
    }

    /// Folder of all unfinished work.
    pub fn work_root(&self) -> PathBuf {
        self.work.clone().unwrap_or_else(|| self.folder.join(WORK))
    }

    /// Folder of a shard's unfinished work.
    pub fn work_folder(&self, shard: &Shard) -> PathBuf {
        self.work_root().join(format!("{:05}", shard.number))
    }

    /// The result of a stage of a batch in its `round`-th attempt.
    pub fn work_path(&self, shard: &Shard, batch: &Batch, round: u64, stage: Stage) -> PathBuf {
        self.work_folder(shard).join(format!("b{:04}.r{round}.{}.tar", batch.number, stage.name()))
    }

    /// All that decides what the shards hold; a folder is of one such.
    pub fn manifest(&self, tools: &Tools) -> Result<Map<String, Value>> {
        let mut manifest = Map::new();
        manifest.insert("format".into(), json!(1));
        manifest.insert("source".into(), json!("synth"));
        manifest.insert("sets".into(), json!(self.sets));
        if let Value::Object(tables) = self.config.as_json()? {
            for (table, settings) in tables {
                let Value::Object(settings) = settings else { continue };
                let own = settings.into_iter().filter(|(name, _)| !SynthConfig::is_only_how(&table, name));
                manifest.extend(own.map(|(name, value)| (format!("{table}.{name}"), value)));
            }
        }
        manifest.insert("stages".into(), self.models(tools));
        Ok(manifest)
    }

    /// Versions and models of the stages, for the sets' JSON.
    pub fn models(&self, tools: &Tools) -> Value {
        stage_models(tools, &|stage| SynthConfig::version(stage))
    }

    /// A fingerprint a stage: of its settings, versions and models, and those of all stages before it.
    pub fn fingerprints(&self, tools: &Tools) -> Result<Vec<(Stage, String)>> {
        let mut chain = String::new();
        let mut fingerprints = vec![];
        for stage in Stage::ALL {
            let name = |model: &Model| json!([model.name, model.version, model.hash]);
            let models: Vec<Value> = tools.models(stage).into_iter().map(name).collect();
            let all = json!([chain, self.sets, self.config.of_stage(stage)?, models]);
            chain = sha256_hex(all.to_string().as_bytes());
            fingerprints.push((stage, chain.clone()));
        }
        Ok(fingerprints)
    }

    /// The stages in groups whose models fit into memory together, in order.
    pub fn groups(&self, tools: &Tools) -> Vec<Vec<Stage>> {
        let budget = (self.config.sets.memory_gb * 1e9) as u64;
        let mut groups: Vec<Vec<Stage>> = vec![];
        for stage in Stage::ALL.into_iter().filter(|stage| *stage <= self.until) {
            if let Some(group) = groups.last_mut() {
                let stages: Vec<Stage> = group.iter().copied().chain([stage]).collect();
                if memory(tools, &stages) <= budget {
                    group.push(stage);
                    continue;
                }
            }
            groups.push(vec![stage]);
        }
        groups
    }

    /// Refuses a job that nothing can come of.
    pub fn check(&self) -> Result<()> {
        self.config.validate()?;
        ensure!(self.sets > 0, "sets: must be at least 1");
        ensure!(self.limit != Some(0), "limit: must be at least 1");
        Ok(())
    }
}

/// Bytes that the models of these stages take together; one that several stages use counts once.
pub fn memory(tools: &Tools, stages: &[Stage]) -> u64 {
    different_models(tools, stages).into_iter().map(|model| model.memory_bytes).sum()
}

/// The models of these stages, each once.
pub fn different_models<'a>(tools: &'a Tools, stages: &[Stage]) -> Vec<&'a Model> {
    let mut models: Vec<&Model> = vec![];
    for model in stages.iter().flat_map(|&stage| tools.models(stage)) {
        if !models.contains(&model) {
            models.push(model);
        }
    }
    models
}

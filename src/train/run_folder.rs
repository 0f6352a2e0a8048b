//! The folder of a run: its settings and record, and the way to its checkpoints; all of it survives a kill at any moment.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::checkpoints::Checkpoints;
use super::data_settings::DataConfig;
use super::settings::{JointConfig, TrainConfig};
use crate::folder_lock;
use crate::invalid::invalid;
use crate::whole_file::write_whole;

/// A run on the disk, held by this process alone.
pub struct RunFolder {
    root: PathBuf,
    checkpoints: Checkpoints,
    _lock: File,
}

impl RunFolder {
    /// Opens `root`, new or from an earlier start, for this process alone. A folder whose run was set up otherwise is
    /// refused: settings may only change in `[run]` and `[optimizer]`, and how much memory, threads and
    /// disk are taken.
    pub fn open(root: &Path, config: &TrainConfig) -> Result<Self> {
        let checkpoints = Checkpoints::open(root, &record_in(root))?;
        let lock = folder_lock::hold(root, "lock", "train")?;
        let path = root.join("config.toml");
        if path.is_file() {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let known: TrainConfig = toml::from_str(&text).with_context(|| path.display().to_string())?;
            let joint = JointConfig { latent_cache_gb: config.joint.latent_cache_gb, ..known.joint };
            let (run, optimizer) = (config.run.clone(), config.optimizer.clone());
            let DataConfig { workers, cache, cache_gb, .. } = config.data.clone();
            let data = DataConfig { workers, cache, cache_gb, ..known.data };
            let adapted = TrainConfig { run, optimizer, joint, data, ..known };
            if adapted != *config {
                return Err(invalid(format!(
                    "--out {}: holds a run with other settings (see its config.toml); only [run] and [optimizer] may \
                     change when a run goes on, so choose another --out",
                    root.display()
                )));
            }
        }
        write_whole(&path, toml::to_string(config)?.as_bytes())?;
        checkpoints.remove_unfinished()?;
        Ok(Self { root: root.to_path_buf(), checkpoints, _lock: lock })
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its checkpoints.
    pub fn checkpoints(&self) -> &Checkpoints {
        &self.checkpoints
    }

    /// Appends a line to `metrics.jsonl`.
    pub fn record(&self, line: &impl Serialize) -> Result<()> {
        let path = record_in(&self.root);
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        let append = || OpenOptions::new().create(true).append(true).open(&path)?.write_all(text.as_bytes());
        append().with_context(|| path.display().to_string())
    }

    /// Drops the record of steps from `step` on: they will be made again.
    pub fn forget_from(&self, step: u64) -> Result<()> {
        #[derive(Deserialize)]
        struct Line {
            step: u64,
        }
        let path = record_in(&self.root);
        if !path.is_file() {
            return Ok(());
        }
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        // A line that was cut short by a kill does not parse and goes too.
        let keeps = |line: &&str| serde_json::from_str::<Line>(line).is_ok_and(|line| line.step < step);
        let kept: String = text.lines().filter(keeps).flat_map(|line| [line, "\n"]).collect();
        write_whole(&path, kept.as_bytes())
    }
}

fn record_in(root: &Path) -> PathBuf {
    root.join("metrics.jsonl")
}

//! The folder of a run: its settings, record and checkpoints; all of it survives a kill at any moment.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::objective::Weights;
use super::settings::TrainConfig;
use crate::model::files::read_safetensors;
use crate::model::write::{write_json, write_tensors};
use crate::whole_file::write_whole;

pub struct RunFolder {
    root: PathBuf,
}

/// `jedi.json` of a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckpointInfo {
    pub format_version: u32,
    pub trained_steps: u64,
    /// Side of the training pictures in pixels.
    pub image_size: u32,
    /// Order of the U-Net's input channels.
    pub channel_order: Vec<String>,
    /// SHA-256 of the resolved config.
    pub config_hash: String,
}

impl RunFolder {
    /// Opens `root`, new or from an earlier start. A folder whose run was set up otherwise is refused: settings may only
    /// change in `[run]` and `[optimizer]`.
    pub fn open(root: &Path, config: &TrainConfig) -> Result<Self> {
        fs::create_dir_all(root.join("checkpoints"))
            .with_context(|| format!("--out {}: cannot be written", root.display()))?;
        let path = root.join("config.toml");
        if path.is_file() {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let known: TrainConfig = toml::from_str(&text).with_context(|| path.display().to_string())?;
            let adapted = TrainConfig { run: config.run.clone(), optimizer: config.optimizer.clone(), ..known };
            ensure!(
                adapted == *config,
                "--out {}: holds a run with other settings (see its config.toml); only [run] and [optimizer] may change \
                 when a run goes on, so choose another --out",
                root.display()
            );
        }
        write_whole(&path, toml::to_string(config)?.as_bytes())?;
        Ok(Self { root: root.to_path_buf() })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The optimizer state of the latest checkpoint, and its step.
    pub fn latest_state(&self) -> Result<Option<(Weights, u64)>> {
        let folder = self.checkpoints().join("latest");
        if !folder.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(folder.join("jedi.json")).with_context(|| folder.display().to_string())?;
        let info: CheckpointInfo = serde_json::from_str(&text).with_context(|| folder.display().to_string())?;
        let state = read_safetensors(&folder.join("state/optimizer.safetensors"))?;
        Ok(Some((state, info.trained_steps)))
    }

    /// Writes `checkpoints/step-N` whole or not at all, points `latest` to it and removes all but the newest `keep` (0: all).
    pub fn write_checkpoint(
        &self,
        info: &CheckpointInfo,
        state: &Weights,
        keep: usize,
        write_model: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let name = format!("step-{}", info.trained_steps);
        let (temporary, folder) = (self.checkpoints().join(format!(".{name}.tmp")), self.checkpoints().join(&name));
        if temporary.exists() {
            fs::remove_dir_all(&temporary).with_context(|| temporary.display().to_string())?;
        }
        let write = || -> Result<()> {
            write_model(&temporary)?;
            write_tensors(&temporary.join("state/optimizer.safetensors"), state, &[])?;
            write_json(&temporary.join("jedi.json"), info)
        };
        if let Err(error) = write() {
            // What is left is of no use; the error that led here is the one to report.
            drop(fs::remove_dir_all(&temporary));
            return Err(error);
        }
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        fs::rename(&temporary, &folder).with_context(|| folder.display().to_string())?;
        self.point_latest_to(&name)?;
        if keep > 0 {
            self.remove_old(keep)?;
        }
        Ok(folder)
    }

    #[cfg(unix)]
    fn point_latest_to(&self, name: &str) -> Result<()> {
        let (link, temporary) = (self.checkpoints().join("latest"), self.checkpoints().join(".latest.tmp"));
        if temporary.symlink_metadata().is_ok() {
            fs::remove_file(&temporary).with_context(|| temporary.display().to_string())?;
        }
        std::os::unix::fs::symlink(name, &temporary).with_context(|| temporary.display().to_string())?;
        fs::rename(&temporary, &link).with_context(|| link.display().to_string())
    }

    #[cfg(not(unix))]
    fn point_latest_to(&self, _: &str) -> Result<()> {
        anyhow::bail!("jedi train: checkpoints/latest is a symbolic link, which only Unix systems have")
    }

    fn remove_old(&self, keep: usize) -> Result<()> {
        let mut steps = Vec::new();
        for entry in fs::read_dir(self.checkpoints())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if let Some(step) = name.strip_prefix("step-").and_then(|step| step.parse::<u64>().ok()) {
                steps.push(step);
            }
        }
        steps.sort_unstable();
        for step in steps.iter().rev().skip(keep) {
            let folder = self.checkpoints().join(format!("step-{step}"));
            fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        Ok(())
    }

    /// Appends a line to `metrics.jsonl`.
    pub fn record(&self, line: &impl Serialize) -> Result<()> {
        let path = self.root.join("metrics.jsonl");
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
        let path = self.root.join("metrics.jsonl");
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

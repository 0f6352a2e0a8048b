//! The folder of a run: its settings, record and checkpoints; all of it survives a kill at any moment.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::objective::Weights;
use super::settings::{JointConfig, TrainConfig};
use crate::invalid::invalid;
use crate::model::files::read_safetensors;
use crate::model::write::{write_json, write_tensors};
use crate::whole_file::{UNFINISHED, write_whole};

/// The optimizer state inside a checkpoint.
const STATE: &str = "state/optimizer.safetensors";

/// A run on the disk, held by this process alone.
pub struct RunFolder {
    root: PathBuf,
    _lock: File,
}

/// What a run goes on from.
pub struct SavedState {
    /// What [`super::optimizer::Optimizer::state`] gave.
    pub tensors: Weights,
    /// Updates made.
    pub step: u64,
    /// The file that it was read from.
    pub path: PathBuf,
    /// Fingerprint of the VAE that the run was trained with; None where it has none, or was written before there were any.
    pub vae_hash: Option<String>,
}

/// `jedi.json` of a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// 1; another number where the meaning of the files changes.
    pub format_version: u32,
    /// Updates that made the model.
    pub trained_steps: u64,
    /// Side of the training pictures in pixels.
    pub image_size: u32,
    /// Order of the U-Net's input channels.
    pub channel_order: Vec<String>,
    /// SHA-256 of the resolved config.
    pub config_hash: String,
    /// Objective `joint`: fingerprint of the VAE that the latents came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae_hash: Option<String>,
}

impl RunFolder {
    /// Opens `root`, new or from an earlier start, for this process alone. A folder whose run was set up otherwise is
    /// refused: settings may only change in `[run]` and `[optimizer]`, and how much memory is taken.
    pub fn open(root: &Path, config: &TrainConfig) -> Result<Self> {
        fs::create_dir_all(root.join("checkpoints"))
            .with_context(|| format!("--out {}: cannot be written", root.display()))?;
        let lock = lock(root)?;
        let path = root.join("config.toml");
        if path.is_file() {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let known: TrainConfig = toml::from_str(&text).with_context(|| path.display().to_string())?;
            let joint = JointConfig { latent_cache_gb: config.joint.latent_cache_gb, ..known.joint };
            let (run, optimizer) = (config.run.clone(), config.optimizer.clone());
            let adapted = TrainConfig { run, optimizer, joint, ..known };
            if adapted != *config {
                return Err(invalid(format!(
                    "--out {}: holds a run with other settings (see its config.toml); only [run] and [optimizer] may \
                     change when a run goes on, so choose another --out",
                    root.display()
                )));
            }
        }
        write_whole(&path, toml::to_string(config)?.as_bytes())?;
        let run = Self { root: root.to_path_buf(), _lock: lock };
        run.remove_unfinished()?;
        Ok(run)
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// The optimizer state of the latest checkpoint; None if there is none yet.
    pub fn latest_state(&self) -> Result<Option<SavedState>> {
        let folder = self.checkpoints().join("latest");
        match fs::read_link(&folder) {
            // To start over because the checkpoint was moved away would throw the run away.
            Ok(target) => ensure!(
                folder.exists(),
                "{}: points to {}, which is not there; let it point to a checkpoint that is, or choose another --out",
                folder.display(),
                target.display()
            ),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(cause).with_context(|| folder.display().to_string()),
        }
        let info = folder.join("jedi.json");
        let text = fs::read_to_string(&info).with_context(|| info.display().to_string())?;
        let info: CheckpointInfo = serde_json::from_str(&text).with_context(|| info.display().to_string())?;
        let path = folder.join(STATE);
        let tensors = read_safetensors(&path)?;
        Ok(Some(SavedState { tensors, step: info.trained_steps, path, vae_hash: info.vae_hash }))
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
        let write = || -> Result<()> {
            write_model(&temporary)?;
            write_tensors(&temporary.join(STATE), state, &[])?;
            write_json(&temporary.join("jedi.json"), info)?;
            sync_folders(&temporary)
        };
        if let Err(error) = write() {
            // What is left is of no use; the error that led here is the one to report.
            drop(fs::remove_dir_all(&temporary));
            return Err(error);
        }
        // There, but not the latest: the run was killed between the two renames below, or began anew from before it.
        if folder.exists() {
            self.remove_checkpoint(&name)?;
        }
        fs::rename(&temporary, &folder).with_context(|| folder.display().to_string())?;
        // Power may fail too: the record first, then the checkpoint, then the link to it.
        if self.metrics().is_file() {
            sync(&self.metrics())?;
        }
        sync(&self.checkpoints())?;
        self.point_latest_to(&name)?;
        sync(&self.checkpoints())?;
        if keep > 0 {
            self.remove_old(info.trained_steps, keep)?;
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

    /// Removes all but the last `keep` checkpoints up to `step`. Those of a later step are left alone: they come from
    /// before somebody let `latest` point back, and are no reason to drop what was just written.
    fn remove_old(&self, step: u64, keep: usize) -> Result<()> {
        let steps = self.names()?.into_iter().filter_map(|name| name.strip_prefix("step-")?.parse::<u64>().ok());
        let mut steps: Vec<u64> = steps.filter(|&known| known <= step).collect();
        steps.sort_unstable();
        for step in steps.iter().rev().skip(keep) {
            self.remove_checkpoint(&format!("step-{step}"))?;
        }
        Ok(())
    }

    /// Under another name first, so that a kill leaves no half checkpoint that looks whole.
    fn remove_checkpoint(&self, name: &str) -> Result<()> {
        let (folder, aside) = (self.checkpoints().join(name), self.checkpoints().join(format!(".{name}.old")));
        fs::rename(&folder, &aside).with_context(|| folder.display().to_string())?;
        fs::remove_dir_all(&aside).with_context(|| aside.display().to_string())
    }

    /// Removes what a kill left half written or half removed.
    fn remove_unfinished(&self) -> Result<()> {
        for name in self.names()?.iter().filter(|name| name.starts_with(UNFINISHED)) {
            let path = self.checkpoints().join(name);
            let is_folder = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
            let removed = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.with_context(|| path.display().to_string())?;
        }
        Ok(())
    }

    /// Names of everything in `checkpoints/`.
    fn names(&self) -> Result<Vec<String>> {
        let list = || {
            let names = fs::read_dir(self.checkpoints())?;
            names.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<io::Result<_>>()
        };
        list().with_context(|| self.checkpoints().display().to_string())
    }

    /// Appends a line to `metrics.jsonl`.
    pub fn record(&self, line: &impl Serialize) -> Result<()> {
        let path = self.metrics();
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
        let path = self.metrics();
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

/// Holds the folder until the process ends, however it ends: two runs in one folder would ruin each other.
fn lock(root: &Path) -> Result<File> {
    let path = root.join(".lock");
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        // Some network file systems have no locks; that is no reason not to train.
        Err(TryLockError::Error(cause)) if cause.kind() == io::ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(cause)) => Err(cause).with_context(|| path.display().to_string()),
        Err(TryLockError::WouldBlock) => {
            bail!(
                "--out {}: another jedi train is at work in it; stop that one or choose another --out",
                root.display()
            )
        }
    }
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).with_context(|| path.display().to_string())
}

/// Puts the names of all files below `folder` on the disk; the files themselves are.
fn sync_folders(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry.with_context(|| folder.display().to_string())?.path();
        if path.is_dir() {
            sync_folders(&path)?;
        }
    }
    sync(folder)
}

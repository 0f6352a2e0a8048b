//! The checkpoints of a run: written whole or not at all, with the hashes of their files, so that what was cut short or
//! changed afterwards is found, and the one before it is used.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::objective::{ModelWriter, Weights};
use crate::model::files::read_safetensors;
use crate::model::write::{write_file, write_json, write_tensors};
use crate::sha256::sha256_of_file;
use crate::whole_file::UNFINISHED;

/// The optimizer state inside a checkpoint.
const STATE: &str = "state/optimizer.safetensors";
/// Hashes of all other files, one a line, as `sha256sum -c` reads them inside the checkpoint's folder.
const HASHES: &str = "state/sha256sums";
/// Their last line, which `sha256sum` passes over.
const END: &str = "# end";
const INFO: &str = "jedi.json";

/// The folder `checkpoints/` of a run.
#[derive(Clone)]
pub struct Checkpoints {
    folder: PathBuf,
    /// The run's record, which must not know less than a checkpoint.
    record: PathBuf,
}

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// The latest ones; 0: all.
    pub last: usize,
    /// And for good those of every so many steps; 0: none.
    pub every: u64,
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
    /// Newer checkpoints that are damaged, each with what is wrong with it.
    pub passed_over: Vec<String>,
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
    /// The file with the hashes of all others; None in checkpoints from before there were any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hashes: Option<String>,
}

/// All that a checkpoint is made of; nothing in it changes while training goes on.
pub struct Snapshot {
    /// What the checkpoint says of itself.
    pub info: CheckpointInfo,
    /// What [`super::optimizer::Optimizer::state`] gave.
    pub state: Weights,
    /// The weights of the model.
    pub model: Weights,
    /// Writes them as a model folder.
    pub write_model: ModelWriter,
}

impl Checkpoints {
    /// Those of the run in `root`, whose record is `record`; the folder is made.
    pub fn open(root: &Path, record: &Path) -> Result<Self> {
        let folder = root.join("checkpoints");
        fs::create_dir_all(&folder).with_context(|| format!("--out {}: cannot be written", root.display()))?;
        Ok(Self { folder, record: record.to_owned() })
    }

    /// Writes `step-N` whole or not at all, points `latest` to it and removes those that need not stay.
    pub fn write(&self, snapshot: Snapshot, keep: Keep) -> Result<PathBuf> {
        let step = snapshot.info.trained_steps;
        let n_bytes: usize = [&snapshot.state, &snapshot.model].into_iter().map(n_bytes).sum();
        self.write_whole(snapshot, keep).map_err(|error| {
            let kept = match fs::read_link(self.folder.join("latest")) {
                Ok(latest) => format!("the last good one, {}, is as it was", self.folder.join(latest).display()),
                Err(_) => "there is none before it".to_owned(),
            };
            let way_out = match is_out_of_room(&error) {
                true => format!("; it takes {:.3} GB or more: make room (or lower run.keep_last)", n_bytes as f64 / 1e9),
                false => String::new(),
            };
            error.context(format!(
                "the checkpoint of step {step} could not be written; {kept}{way_out}; run the same command again to go on"
            ))
        })
    }

    fn write_whole(&self, snapshot: Snapshot, keep: Keep) -> Result<PathBuf> {
        let step = snapshot.info.trained_steps;
        let name = format!("step-{step}");
        let (temporary, folder) = (self.folder.join(format!(".{name}.tmp")), self.folder.join(&name));
        if temporary.exists() {
            fs::remove_dir_all(&temporary).with_context(|| temporary.display().to_string())?;
        }
        let Snapshot { info, state, model, write_model } = snapshot;
        let write = || -> Result<()> {
            write_model(&temporary, &model)?;
            write_tensors(&temporary.join(STATE), &state, &[])?;
            write_json(&temporary.join(INFO), &CheckpointInfo { hashes: Some(HASHES.to_owned()), ..info })?;
            write_file(&temporary.join(HASHES), hashes_of(&temporary)?.as_bytes())?;
            sync_folders(&temporary)
        };
        if let Err(error) = write() {
            // What is left is of no use; the error that led here is the one to report.
            drop(fs::remove_dir_all(&temporary));
            return Err(error);
        }
        // There, but not the latest: the run was killed between the two renames below, or began anew from before it.
        if folder.exists() {
            self.remove(&name)?;
        }
        fs::rename(&temporary, &folder).with_context(|| folder.display().to_string())?;
        // Power may fail too: the record first, then the checkpoint, then the link to it.
        if self.record.is_file() {
            sync(&self.record)?;
        }
        sync(&self.folder)?;
        self.point_latest_to(&name)?;
        sync(&self.folder)?;
        self.remove_old(step, keep)?;
        Ok(folder)
    }

    /// The state that the run goes on from: that of `latest` or, where it is damaged, of the newest whole checkpoint before
    /// it. None if there is none yet.
    pub fn latest_state(&self) -> Result<Option<SavedState>> {
        let latest = self.folder.join("latest");
        let mut passed_over = vec![];
        for name in self.candidates()? {
            let folder = self.folder.join(&name);
            match read_whole(&folder) {
                Ok(saved) => return Ok(Some(SavedState { passed_over, ..saved })),
                Err(error) => passed_over.push(format!("{}: {error:#}", folder.display())),
            }
        }
        match passed_over.first() {
            None => Ok(None),
            // To start over in silence would throw the run away.
            Some(_) => bail!(
                "{}: names no whole checkpoint, and there is none before it ({}); put one back, or choose another --out",
                latest.display(),
                passed_over.join("; ")
            ),
        }
    }

    /// Names of the checkpoints to go on from, the best first: the one that `latest` points to, then those before it.
    fn candidates(&self) -> Result<Vec<String>> {
        let latest = self.folder.join("latest");
        let target = match fs::read_link(&latest) {
            Ok(target) => target.to_string_lossy().into_owned(),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(cause) => return Err(cause).with_context(|| latest.display().to_string()),
        };
        let before = step_of(&target).unwrap_or(u64::MAX);
        let mut steps: Vec<u64> = self.steps()?.into_iter().filter(|&step| step < before).collect();
        steps.sort_unstable_by_key(|&step| std::cmp::Reverse(step));
        Ok(std::iter::once(target).chain(steps.into_iter().map(|step| format!("step-{step}"))).collect())
    }

    #[cfg(unix)]
    fn point_latest_to(&self, name: &str) -> Result<()> {
        let (link, temporary) = (self.folder.join("latest"), self.folder.join(".latest.tmp"));
        if temporary.symlink_metadata().is_ok() {
            fs::remove_file(&temporary).with_context(|| temporary.display().to_string())?;
        }
        std::os::unix::fs::symlink(name, &temporary).with_context(|| temporary.display().to_string())?;
        fs::rename(&temporary, &link).with_context(|| link.display().to_string())
    }

    #[cfg(not(unix))]
    fn point_latest_to(&self, _: &str) -> Result<()> {
        bail!("jedi train: checkpoints/latest is a symbolic link, which only Unix systems have")
    }

    /// Removes all but those to be kept of the checkpoints up to `step`. Those of a later step are left alone: they come
    /// from before somebody let `latest` point back, and are no reason to drop what was just written.
    fn remove_old(&self, step: u64, keep: Keep) -> Result<()> {
        if keep.last == 0 {
            return Ok(());
        }
        let mut steps: Vec<u64> = self.steps()?.into_iter().filter(|&known| known <= step).collect();
        steps.sort_unstable_by_key(|&step| std::cmp::Reverse(step));
        let is_for_good = |step: &u64| keep.every > 0 && step.is_multiple_of(keep.every);
        for step in steps.iter().skip(keep.last).filter(|step| !is_for_good(step)) {
            self.remove(&format!("step-{step}"))?;
        }
        Ok(())
    }

    /// Under another name first, so that a kill leaves no half checkpoint that looks whole.
    fn remove(&self, name: &str) -> Result<()> {
        let (folder, aside) = (self.folder.join(name), self.folder.join(format!(".{name}.old")));
        fs::rename(&folder, &aside).with_context(|| folder.display().to_string())?;
        fs::remove_dir_all(&aside).with_context(|| aside.display().to_string())
    }

    /// Removes what a kill left half written or half removed.
    pub fn remove_unfinished(&self) -> Result<()> {
        for name in self.names()?.iter().filter(|name| name.starts_with(UNFINISHED)) {
            let path = self.folder.join(name);
            let is_folder = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
            let removed = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.with_context(|| path.display().to_string())?;
        }
        Ok(())
    }

    /// The steps that there are checkpoints of, in no order.
    fn steps(&self) -> Result<Vec<u64>> {
        Ok(self.names()?.iter().filter_map(|name| step_of(name)).collect())
    }

    /// Names of everything in the folder.
    fn names(&self) -> Result<Vec<String>> {
        let list = || {
            let names = fs::read_dir(&self.folder)?;
            names.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<io::Result<_>>()
        };
        list().with_context(|| self.folder.display().to_string())
    }
}

fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix("step-")?.parse().ok()
}

fn n_bytes(weights: &Weights) -> usize {
    weights.values().map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
}

/// The state in a checkpoint whose files are all as they were written.
fn read_whole(folder: &Path) -> Result<SavedState> {
    let info = fs::read_to_string(folder.join(INFO)).context(INFO)?;
    let info: CheckpointInfo = serde_json::from_str(&info).context(INFO)?;
    if let Some(hashes) = &info.hashes {
        check_hashes(folder, hashes)?;
    }
    let path = folder.join(STATE);
    let tensors = read_safetensors(&path)?;
    Ok(SavedState { tensors, step: info.trained_steps, path, vae_hash: info.vae_hash, passed_over: vec![] })
}

fn check_hashes(folder: &Path, name: &str) -> Result<()> {
    let text = fs::read_to_string(folder.join(name)).with_context(|| name.to_owned())?;
    let lines = text.strip_suffix('\n').and_then(|text| text.strip_suffix(END));
    let lines = lines.with_context(|| format!("{name}: is cut short"))?;
    let lines = lines.lines().map(|line| line.split_once("  ").with_context(|| format!("{name}: is damaged")));
    let hashes = lines.map(|line| line.map(|(hash, file)| (file, hash))).collect::<Result<BTreeMap<_, _>>>()?;
    ensure!([STATE, INFO].iter().all(|file| hashes.contains_key(file)), "{name}: is damaged");
    for (file, hash) in hashes {
        let found = sha256_of_file(&folder.join(file))?;
        ensure!(found == hash, "{file} is not as it was written (cut short or changed: its SHA-256 is another)");
    }
    Ok(())
}

/// A line a file below `folder`, by name.
fn hashes_of(folder: &Path) -> Result<String> {
    let mut files = vec![];
    collect(folder, folder, &mut files)?;
    files.sort();
    let line = |name: &String| Ok(format!("{}  {name}\n", sha256_of_file(&folder.join(name))?));
    Ok(files.iter().map(line).collect::<Result<String>>()? + END + "\n")
}

fn collect(root: &Path, folder: &Path, files: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry.with_context(|| folder.display().to_string())?.path();
        if path.is_dir() {
            collect(root, &path, files)?;
        } else if let Ok(name) = path.strip_prefix(root) {
            files.push(name.to_string_lossy().into_owned());
        }
    }
    Ok(())
}

/// Whether the disk, a quota or a limit on files was in the way.
fn is_out_of_room(error: &anyhow::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    let kind = |cause: &(dyn std::error::Error + 'static)| cause.downcast_ref::<io::Error>().map(io::Error::kind);
    error.chain().any(|cause| matches!(kind(cause), Some(StorageFull | QuotaExceeded | FileTooLarge)))
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

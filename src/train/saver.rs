//! Checkpoints beside training: one at a time, on a thread of its own, from a snapshot that training does not touch.

use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};

use super::checkpoints::{Checkpoints, Keep, Snapshot};

/// A checkpoint that is there now.
pub struct Saved {
    /// Updates that made it.
    pub step: u64,
    /// Its folder.
    pub folder: PathBuf,
}

/// Writes at most one checkpoint at a time. Dropped, it waits for the one under way: half of it would be work for nothing.
pub struct Saver {
    checkpoints: Checkpoints,
    keep: Keep,
    under_way: Option<(u64, JoinHandle<Result<PathBuf>>)>,
}

impl Saver {
    /// Nothing is under way.
    pub fn new(checkpoints: Checkpoints, keep: Keep) -> Self {
        Self { checkpoints, keep, under_way: None }
    }

    /// Begins to write; call [`Saver::wait`] before, so that nothing is under way.
    pub fn start(&mut self, snapshot: Snapshot) -> Result<()> {
        let (checkpoints, keep, step) = (self.checkpoints.clone(), self.keep, snapshot.info.trained_steps);
        let thread = thread::Builder::new().name("checkpoint".to_owned());
        let thread = thread.spawn(move || checkpoints.write(snapshot, keep)).context("no thread for the checkpoint")?;
        self.under_way = Some((step, thread));
        Ok(())
    }

    /// The checkpoint under way, once it is there; None where nothing is under way.
    pub fn wait(&mut self) -> Result<Option<Saved>> {
        let Some((step, thread)) = self.under_way.take() else { return Ok(None) };
        let folder = thread.join().map_err(|_| anyhow!("the checkpoint of step {step}: its thread panicked"))??;
        Ok(Some(Saved { step, folder }))
    }

    /// The checkpoint under way if it is there by now.
    pub fn finished(&mut self) -> Result<Option<Saved>> {
        match &self.under_way {
            Some((_, thread)) if thread.is_finished() => self.wait(),
            _ => Ok(None),
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        if let Some((_, thread)) = self.under_way.take() {
            // Reached on the way out with another error, which is the one to report.
            drop(thread.join());
        }
    }
}

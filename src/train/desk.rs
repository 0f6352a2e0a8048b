//! What one process of a run alone has: its folder, its record, and the checkpoint under way.

use anyhow::Result;

use super::checkpoints::{Keep, Snapshot};
use super::events::EventFile;
use super::run_folder::RunFolder;
use super::saver::{Saved, Saver};
use super::settings::TrainConfig;
use super::trainer::{Hooks, StepReport};

/// Writes down what happens.
pub struct Desk {
    run: RunFolder,
    events: EventFile,
    saver: Saver,
}

impl Desk {
    /// For a run that goes on from `step`: what was written of later steps is forgotten.
    pub fn open(run: RunFolder, config: &TrainConfig, step: u64) -> Result<Self> {
        run.forget_from(step)?;
        let events = EventFile::start(run.root(), step)?;
        let keep = Keep { last: config.run.keep_last, every: config.run.keep_every };
        let saver = Saver::new(run.checkpoints().clone(), keep);
        Ok(Self { run, events, saver })
    }

    /// A step of so many images.
    pub fn record(&mut self, report: &StepReport, images_per_step: usize) -> Result<()> {
        self.run.record(report)?;
        self.events.numbers(report.step + 1, &report.curves(images_per_step))
    }

    /// Begins to write a checkpoint; call [`Desk::wait`] before.
    pub fn start(&mut self, snapshot: Snapshot) -> Result<()> {
        self.saver.start(snapshot)
    }

    /// Waits for the checkpoint under way, and tells nobody.
    pub fn finish(&mut self) -> Result<()> {
        self.saver.wait().map(drop)
    }

    /// Tells of the checkpoint under way once it is there.
    pub fn wait(&mut self, hooks: &mut Hooks) -> Result<()> {
        let saved = self.saver.wait()?;
        self.show(saved, hooks)
    }

    /// Tells of the checkpoint under way if it is there by now.
    pub fn show_finished(&mut self, hooks: &mut Hooks) -> Result<()> {
        let saved = self.saver.finished()?;
        self.show(saved, hooks)
    }

    /// Tells of a checkpoint, and puts its picture into the record.
    fn show(&mut self, saved: Option<Saved>, hooks: &mut Hooks) -> Result<()> {
        let Some(Saved { step, folder }) = saved else { return Ok(()) };
        match (hooks.on_checkpoint)(step, &folder)? {
            Some(picture) => self.events.picture(step, "preview", &picture),
            None => Ok(()),
        }
    }
}

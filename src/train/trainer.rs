//! The loop: loss, gradient, update; validation, checkpoint and preview now and then.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use image::RgbImage;
use serde::Serialize;

use super::checkpoints::{CheckpointInfo, Keep, SavedState, Snapshot};
use super::events::EventFile;
use super::objective::Objective;
use super::optimizer::{Optimizer, REMEDY, averaged_in, scalar};
use super::run_folder::RunFolder;
use super::saver::{Saved, Saver};
use super::settings::{ObjectiveKind, TrainConfig};
use super::share::Share;
use crate::invalid::invalid;
use crate::ops::{self, Gradients};
use crate::sha256::sha256_hex;

/// What the caller does while training goes on.
pub struct Hooks<'a> {
    /// After every step.
    pub on_step: &'a mut dyn FnMut(&StepReport),
    /// What the user should know of how the run goes on.
    pub on_notice: &'a mut dyn FnMut(&str),
    /// After every checkpoint, once it is on the disk: the number of steps and the model folder. A picture that shows how
    /// far it is goes into the record.
    pub on_checkpoint: &'a mut dyn FnMut(u64, &Path) -> Result<Option<RgbImage>>,
    /// True stops the run behind the current step, with the state saved.
    pub is_interrupted: &'a dyn Fn() -> bool,
}

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// From 0.
    pub step: u64,
    /// Of the batch of this step, before its update.
    pub loss: f64,
    /// Learning rate of the update.
    pub lr: f64,
    /// Global norm before clipping.
    pub gradient_norm: f64,
    /// Duration of the step.
    pub seconds: f64,
    /// Images since the start of the run, those of earlier starts included.
    pub images: u64,
    /// Held-out loss of the averaged weights, where it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// The same by source, and by source and range of timesteps.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub validation: BTreeMap<String, f64>,
}

impl StepReport {
    /// What is drawn as curves.
    fn curves(&self, images_per_step: usize) -> Vec<(String, f64)> {
        let own = [
            ("loss", self.loss),
            ("lr", self.lr),
            ("gradient_norm", self.gradient_norm),
            ("images_per_second", images_per_step as f64 / self.seconds),
        ];
        let own = own.into_iter().chain(self.validation_loss.map(|loss| ("validation_loss", loss)));
        let mut curves: Vec<_> = own.map(|(name, value)| (name.to_owned(), value)).collect();
        curves.extend(self.validation.iter().map(|(part, loss)| (format!("validation/{part}"), *loss)));
        curves
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of `run.steps` are made.
    Finished,
    /// By the caller, after this many steps; the state is saved.
    Interrupted(u64),
}

/// Trains until `run.steps`, from the latest whole checkpoint of the folder where there is one.
pub fn train(config: &TrainConfig, objective: &mut dyn Objective, out: &Path, mut hooks: Hooks) -> Result<Outcome> {
    let run = RunFolder::open(out, config)?;
    let mut optimizer = Optimizer::new(config, objective.parameters())?;
    let mut saved_step = None;
    if let Some(saved) = run.checkpoints().latest_state()? {
        check_vae(&saved, objective, &run)?;
        for damaged in &saved.passed_over {
            (hooks.on_notice)(&format!("{damaged}; going on from step {}, the checkpoint before it", saved.step));
        }
        optimizer.restore(saved.tensors, saved.step).with_context(|| saved.path.display().to_string())?;
        saved_step = Some(saved.step);
    }
    run.forget_from(optimizer.step())?;
    let mut events = EventFile::start(run.root(), optimizer.step())?;
    let keep = Keep { last: config.run.keep_last, every: config.run.keep_every };
    let mut saver = Saver::new(run.checkpoints().clone(), keep);
    while optimizer.step() < config.run.steps {
        let (started, step) = (Instant::now(), optimizer.step());
        let mut report = match advance(config, objective, &mut optimizer) {
            Ok(report) => report,
            Err(error) => {
                // The parameters are still those before this step.
                let is_new = saved_step != Some(step);
                let saved = saver.wait().and_then(|_| match is_new {
                    true => saver.start(snapshot(config, objective, &optimizer)?).and_then(|()| saver.wait()),
                    false => Ok(None),
                });
                let fate = match saved {
                    Ok(_) => format!("is saved in {}", run.root().display()),
                    Err(cause) => format!("could not be saved ({cause:#})"),
                };
                return Err(error.context(format!("training stopped at step {step}; the state before it {fate}")));
            }
        };
        report.images = (step + 1) * config.run.images_per_step as u64;
        let is_last = step + 1 == config.run.steps;
        if is_due(step + 1, config.run.validate_every) || is_last {
            report.validation_loss = Some(validate(objective, &optimizer)?);
            let parts = objective.held_out_parts().iter().filter(|(_, _, sets)| *sets > 0);
            report.validation = parts.map(|(name, sum, sets)| (name.clone(), sum / *sets as f64)).collect();
        }
        report.seconds = started.elapsed().as_secs_f64();
        run.record(&report)?;
        events.numbers(step + 1, &report.curves(config.run.images_per_step))?;
        (hooks.on_step)(&report);
        let is_interrupted = (hooks.is_interrupted)();
        let is_over = is_last || is_interrupted;
        if is_due(step + 1, config.run.checkpoint_every) || is_over {
            show(saver.wait()?, &mut hooks, &mut events)?;
            saver.start(snapshot(config, objective, &optimizer)?)?;
            saved_step = Some(step + 1);
        }
        let saved = if is_over || !config.run.save_beside { saver.wait() } else { saver.finished() };
        show(saved?, &mut hooks, &mut events)?;
        if is_interrupted && !is_last {
            return Ok(Outcome::Interrupted(step + 1));
        }
    }
    Ok(Outcome::Finished)
}

/// Tells of a checkpoint that is there now, and puts its picture into the record.
fn show(saved: Option<Saved>, hooks: &mut Hooks, events: &mut EventFile) -> Result<()> {
    let Some(Saved { step, folder }) = saved else { return Ok(()) };
    match (hooks.on_checkpoint)(step, &folder)? {
        Some(picture) => events.picture(step, "preview", &picture),
        None => Ok(()),
    }
}

/// Latents of another VAE mean something else: a run would go on as if nothing were wrong, and unlearn what it knew.
fn check_vae(saved: &SavedState, objective: &dyn Objective, run: &RunFolder) -> Result<()> {
    match (&saved.vae_hash, objective.vae_hash()) {
        (Some(then), Some(now)) if then != now => Err(invalid(format!(
            "model.vae: its weights or config are no longer those that the run in {} was trained with; put them back (each \
             checkpoint has a copy of them in vae/), or choose another --out",
            run.root().display()
        ))),
        _ => Ok(()),
    }
}

fn is_due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

fn advance(config: &TrainConfig, objective: &mut dyn Objective, optimizer: &mut Optimizer) -> Result<StepReport> {
    let step = optimizer.step();
    let (value, gradients) = accumulate(objective, step, Share::WHOLE, config.run.micro_batch)?;
    let update = optimizer.update(gradients)?;
    Ok(StepReport {
        step,
        loss: value,
        lr: update.lr,
        gradient_norm: update.gradient_norm,
        seconds: 0.0,
        images: 0,
        validation_loss: None,
        validation: BTreeMap::new(),
    })
}

/// How many passes a share of the batch of `step` takes when `micro_batch` images go through at a time (0: all of them).
pub fn parts(objective: &mut dyn Objective, step: u64, share: Share, micro_batch: usize) -> usize {
    let shape = objective.shape(step);
    let sets_at_once = match micro_batch {
        0 => shape.sets,
        images => (images / shape.images).max(1),
    };
    share.range(shape.sets).len().div_ceil(sets_at_once).max(1)
}

/// Loss and gradients of a share, forward and back once.
pub fn pass(objective: &mut dyn Objective, step: u64, share: Share) -> Result<(f64, Gradients)> {
    objective.set_share(share);
    let loss = objective.loss(step)?;
    let value = scalar(&loss)?;
    if !value.is_finite() {
        bail!("the loss of step {step} is {value}; {REMEDY}");
    }
    Ok((value, ops::backward(loss)?))
}

/// Loss and gradients of a share of the batch of `step`, added up over parts of `micro_batch` images (0: in one).
pub fn accumulate(
    objective: &mut dyn Objective,
    step: u64,
    share: Share,
    micro_batch: usize,
) -> Result<(f64, Gradients)> {
    let sets = objective.shape(step).sets;
    let count = parts(objective, step, share, micro_batch);
    let (mut total, mut sum) = (0.0, None::<Gradients>);
    for part in (0..count).map(|index| share.part(index, count)).filter(|part| !part.range(sets).is_empty()) {
        let (value, gradients) = pass(objective, step, part)?;
        total += value;
        match &mut sum {
            None => sum = Some(gradients),
            Some(sum) => sum.add(gradients)?,
        }
    }
    objective.set_share(share);
    Ok((total, sum.context("a step without sets")?))
}

/// The held-out loss. If it is not finite, the update before it broke the weights: they are not worth saving.
fn validate(objective: &mut dyn Objective, optimizer: &Optimizer) -> Result<f64> {
    let value = objective.validate(&optimizer.averaged())?;
    if !value.is_finite() {
        bail!(
            "the held-out loss after {} steps is {value}; the last checkpoint stays as it was; {REMEDY}",
            optimizer.step()
        );
    }
    Ok(value)
}

/// What a checkpoint of this moment is made of.
fn snapshot(config: &TrainConfig, objective: &dyn Objective, optimizer: &Optimizer) -> Result<Snapshot> {
    if !optimizer.is_finite()? {
        bail!(
            "the weights after {} steps are not finite; the last checkpoint stays as it was; {REMEDY}",
            optimizer.step()
        );
    }
    let channel_order = match config.objective {
        ObjectiveKind::Joint => ["noisy", "mask", "reference"].map(String::from).to_vec(),
        ObjectiveKind::Autoencoder => vec![],
    };
    let info = CheckpointInfo {
        format_version: 1,
        trained_steps: optimizer.step(),
        image_size: config.data.size,
        channel_order,
        vae_hash: objective.vae_hash().map(String::from),
        config_hash: sha256_hex(toml::to_string(config)?.as_bytes()),
        hashes: None,
    };
    let state = if config.run.save_beside { optimizer.snapshot()? } else { optimizer.state() };
    Ok(Snapshot { info, model: averaged_in(&state), state, write_model: objective.writer()? })
}

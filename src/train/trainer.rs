//! The loop: loss, gradient, update; validation, checkpoint and preview now and then.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use image::RgbImage;
use serde::Serialize;

use super::checkpoints::{CheckpointInfo, SavedState, Snapshot};
use super::desk::Desk;
use super::objective::Objective;
use super::optimizer::{Optimizer, REMEDY, averaged_in, scalar};
use super::run_folder::RunFolder;
use super::settings::{ObjectiveKind, TrainConfig};
use super::share::Share;
use crate::invalid::invalid;
use crate::ops::{self, Gradients};
use crate::ranks::Ranks;
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
    pub fn curves(&self, images_per_step: usize) -> Vec<(String, f64)> {
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
pub fn train(config: &TrainConfig, objective: &mut dyn Objective, out: &Path, hooks: Hooks) -> Result<Outcome> {
    train_among(&Rc::new(Ranks::alone()), config, objective, out, hooks)
}

/// The same by many ranks, each with its share of every batch. The first one alone touches the folder and calls the hooks,
/// but for `is_interrupted`: whoever is interrupted, all stop. How it ends is the same on all ranks.
pub fn train_among(
    ranks: &Rc<Ranks>,
    config: &TrainConfig,
    objective: &mut dyn Objective,
    out: &Path,
    mut hooks: Hooks,
) -> Result<Outcome> {
    let own = ranks.all_succeed(own_share(ranks, objective))?;
    objective.set_rank_share(own);
    let folder = ranks.on_first(|| RunFolder::open(out, config))?;
    let saved = ranks.on_first(|| latest(first(folder.as_ref())?, objective, &mut hooks))?.flatten();
    let mut optimizer = ranks.all_succeed(Optimizer::among(ranks, config, objective.parameters()))?;
    let mut saved_step = restore(ranks, saved, &mut optimizer)?;
    let mut desk = ranks.on_first(|| Desk::open(first(folder)?, config, optimizer.step()))?;
    while optimizer.step() < config.run.steps {
        let (started, step) = (Instant::now(), optimizer.step());
        let mut report = match advance(ranks, config, objective, own, &mut optimizer) {
            Ok(report) => report,
            Err(error) => {
                // The parameters are still those before this step.
                let saved = ranks.on_first(|| first(desk.as_mut())?.finish()).and_then(|_| {
                    let is_new = saved_step != Some(step);
                    let snapshot = is_new.then(|| snapshot(ranks, config, objective, &optimizer)).transpose()?;
                    ranks.on_first(|| {
                        let desk = first(desk.as_mut())?;
                        snapshot.map_or(Ok(()), |snapshot| desk.start(snapshot).and_then(|()| desk.finish()))
                    })
                });
                let fate = match saved {
                    Ok(_) => format!("is saved in {}", out.display()),
                    Err(cause) => format!("could not be saved ({cause:#})"),
                };
                return Err(error.context(format!("training stopped at step {step}; the state before it {fate}")));
            }
        };
        report.images = (step + 1) * config.run.images_per_step as u64;
        let is_last = step + 1 == config.run.steps;
        if is_due(step + 1, config.run.validate_every) || is_last {
            report.validation_loss = Some(validate(ranks, objective, &optimizer)?);
            report.validation = held_out_parts(ranks, objective);
        }
        report.seconds = started.elapsed().as_secs_f64();
        ranks.on_first(|| {
            first(desk.as_mut())?.record(&report, config.run.images_per_step)?;
            (hooks.on_step)(&report);
            Ok(())
        })?;
        let is_interrupted = ranks.any((hooks.is_interrupted)());
        let is_over = is_last || is_interrupted;
        if is_due(step + 1, config.run.checkpoint_every) || is_over {
            // One at a time.
            ranks.on_first(|| first(desk.as_mut())?.wait(&mut hooks))?;
            let snapshot = snapshot(ranks, config, objective, &optimizer)?;
            ranks.on_first(|| first(desk.as_mut())?.start(snapshot))?;
            saved_step = Some(step + 1);
        }
        let is_awaited = is_over || !config.run.save_beside;
        ranks.on_first(|| {
            let desk = first(desk.as_mut())?;
            if is_awaited { desk.wait(&mut hooks) } else { desk.show_finished(&mut hooks) }
        })?;
        if is_interrupted && !is_last {
            return Ok(Outcome::Interrupted(step + 1));
        }
    }
    Ok(Outcome::Finished)
}

/// This rank's share of every batch; refuses more ranks than there are sets in a step.
pub fn own_share(ranks: &Ranks, objective: &dyn Objective) -> Result<Share> {
    let (count, sets) = (ranks.count(), objective.fewest_sets());
    if count > sets {
        return Err(invalid(format!(
            "run.images_per_step: leaves {sets} sets to a step, too few for {count} processes; raise it, or start fewer"
        )));
    }
    Ok(Share { index: ranks.rank(), count })
}

/// What the first rank has, for its own work.
fn first<T>(own: Option<T>) -> Result<T> {
    own.context("only the first rank has it")
}

/// The state that the run goes on from, if it is not new.
fn latest(run: &RunFolder, objective: &dyn Objective, hooks: &mut Hooks) -> Result<Option<SavedState>> {
    let saved = run.checkpoints().latest_state()?;
    if let Some(saved) = &saved {
        check_vae(saved, objective, run)?;
        for damaged in &saved.passed_over {
            (hooks.on_notice)(&format!("{damaged}; going on from step {}, the checkpoint before it", saved.step));
        }
    }
    Ok(saved)
}

/// Goes on from what the first rank has found, if anything: its number of updates.
fn restore(ranks: &Ranks, saved: Option<SavedState>, optimizer: &mut Optimizer) -> Result<Option<u64>> {
    if !ranks.any(saved.is_some()) {
        return Ok(None);
    }
    let step = ranks.sum(saved.as_ref().map_or(0.0, |saved| saved.step as f64)) as u64;
    let (tensors, path) = saved.map(|saved| (saved.tensors, saved.path)).unwrap_or_default();
    optimizer.restore(tensors, step).with_context(|| path.display().to_string())?;
    Ok(Some(step))
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

/// One step, on all ranks or on none.
fn advance(
    ranks: &Ranks,
    config: &TrainConfig,
    objective: &mut dyn Objective,
    own: Share,
    optimizer: &mut Optimizer,
) -> Result<StepReport> {
    let step = optimizer.step();
    let (value, gradients) = ranks.all_succeed(accumulate(objective, step, own, config.run.micro_batch))?;
    let loss = ranks.sum(value);
    let update = ranks.all_succeed(optimizer.update(gradients))?;
    Ok(StepReport {
        step,
        loss,
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
fn validate(ranks: &Ranks, objective: &mut dyn Objective, optimizer: &Optimizer) -> Result<f64> {
    let averaged = ranks.all_succeed(optimizer.averaged())?;
    let value = ranks.sum(ranks.all_succeed(objective.validate(&averaged))?);
    if !value.is_finite() {
        bail!(
            "the held-out loss after {} steps is {value}; the last checkpoint stays as it was; {REMEDY}",
            optimizer.step()
        );
    }
    Ok(value)
}

/// The last held-out loss by its parts.
fn held_out_parts(ranks: &Ranks, objective: &dyn Objective) -> BTreeMap<String, f64> {
    let parts = objective.held_out_parts();
    let own: Vec<f64> = parts.iter().flat_map(|(_, sum, sets)| [*sum, *sets as f64]).collect();
    let all = ranks.sums(&own);
    let means = parts.iter().zip(all.chunks(2)).filter(|(_, all)| all[1] > 0.0);
    means.map(|((name, ..), all)| (name.clone(), all[0] / all[1])).collect()
}

/// What a checkpoint of this moment is made of; on other ranks than the first without the weights.
fn snapshot(ranks: &Ranks, config: &TrainConfig, objective: &dyn Objective, optimizer: &Optimizer) -> Result<Snapshot> {
    ranks.all_succeed(check_finite(optimizer))?;
    let state = if config.run.save_beside { optimizer.snapshot() } else { optimizer.state() };
    let state = ranks.all_succeed(state)?;
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
    Ok(Snapshot { info, model: averaged_in(&state), state, write_model: objective.writer()? })
}

fn check_finite(optimizer: &Optimizer) -> Result<()> {
    if !optimizer.is_finite()? {
        bail!(
            "the weights after {} steps are not finite; the last checkpoint stays as it was; {REMEDY}",
            optimizer.step()
        );
    }
    Ok(())
}

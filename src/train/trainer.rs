//! The loop: loss, gradient, update; validation, checkpoint and preview now and then.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use image::RgbImage;
use serde::Serialize;

use super::events::EventFile;
use super::objective::Objective;
use super::optimizer::{Optimizer, REMEDY, scalar};
use super::run_folder::{CheckpointInfo, RunFolder, SavedState};
use super::settings::{ObjectiveKind, TrainConfig};
use crate::invalid::invalid;
use crate::ops;
use crate::sha256::sha256_hex;

/// What the caller does while training goes on.
pub struct Hooks<'a> {
    /// After every step.
    pub on_step: &'a mut dyn FnMut(&StepReport),
    /// After every checkpoint: the number of steps and the model folder. A picture that shows how far it is goes into the
    /// record.
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
}

impl StepReport {
    /// What is drawn as curves.
    fn curves(&self, images_per_step: usize) -> Vec<(&'static str, f64)> {
        let mut curves = vec![
            ("loss", self.loss),
            ("lr", self.lr),
            ("gradient_norm", self.gradient_norm),
            ("images_per_second", images_per_step as f64 / self.seconds),
        ];
        curves.extend(self.validation_loss.map(|loss| ("validation_loss", loss)));
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

/// Trains until `run.steps`, from the latest checkpoint of the folder where there is one.
pub fn train(config: &TrainConfig, objective: &mut dyn Objective, out: &Path, hooks: Hooks) -> Result<Outcome> {
    let run = RunFolder::open(out, config)?;
    let mut optimizer = Optimizer::new(config, objective.parameters())?;
    let mut saved_step = None;
    if let Some(saved) = run.latest_state()? {
        check_vae(&saved, objective, &run)?;
        optimizer.restore(saved.tensors, saved.step).with_context(|| saved.path.display().to_string())?;
        saved_step = Some(saved.step);
    }
    run.forget_from(optimizer.step())?;
    let mut events = EventFile::start(run.root(), optimizer.step())?;
    while optimizer.step() < config.run.steps {
        let (started, step) = (Instant::now(), optimizer.step());
        let mut report = match advance(objective, &mut optimizer) {
            Ok(report) => report,
            Err(error) => {
                // The parameters are still those before this step.
                let saved =
                    if saved_step == Some(step) { Ok(()) } else { save(config, objective, &optimizer, &run).map(drop) };
                let fate = match saved {
                    Ok(()) => format!("is saved in {}", run.root().display()),
                    Err(cause) => format!("could not be saved ({cause:#})"),
                };
                return Err(error.context(format!("training stopped at step {step}; the state before it {fate}")));
            }
        };
        report.images = (step + 1) * config.run.images_per_step as u64;
        let is_last = step + 1 == config.run.steps;
        if is_due(step + 1, config.run.validate_every) || is_last {
            report.validation_loss = Some(validate(objective, &optimizer)?);
        }
        report.seconds = started.elapsed().as_secs_f64();
        run.record(&report)?;
        events.numbers(step + 1, &report.curves(config.run.images_per_step))?;
        (hooks.on_step)(&report);
        let is_interrupted = (hooks.is_interrupted)();
        if is_due(step + 1, config.run.checkpoint_every) || is_last || is_interrupted {
            let folder = save(config, objective, &optimizer, &run)?;
            saved_step = Some(step + 1);
            if let Some(picture) = (hooks.on_checkpoint)(step + 1, &folder)? {
                events.picture(step + 1, "preview", &picture)?;
            }
        }
        if is_interrupted && !is_last {
            return Ok(Outcome::Interrupted(step + 1));
        }
    }
    Ok(Outcome::Finished)
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

fn advance(objective: &mut dyn Objective, optimizer: &mut Optimizer) -> Result<StepReport> {
    let step = optimizer.step();
    let loss = objective.loss(step)?;
    let value = scalar(&loss)?;
    if !value.is_finite() {
        bail!("the loss of step {step} is {value}; {REMEDY}");
    }
    let update = optimizer.update(ops::backward(loss)?)?;
    Ok(StepReport {
        step,
        loss: value,
        lr: update.lr,
        gradient_norm: update.gradient_norm,
        seconds: 0.0,
        images: 0,
        validation_loss: None,
    })
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

fn save(
    config: &TrainConfig,
    objective: &dyn Objective,
    optimizer: &Optimizer,
    run: &RunFolder,
) -> Result<std::path::PathBuf> {
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
    };
    let averaged = optimizer.averaged();
    run.write_checkpoint(&info, &optimizer.state(), config.run.keep_checkpoints, |folder| {
        objective.write(folder, &averaged)
    })
}

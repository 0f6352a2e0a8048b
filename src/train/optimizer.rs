//! AdamW over all parameters of an objective, with clipping and averaged weights; its whole state can be saved.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor, Var};

use super::objective::Weights;
use super::settings::{OptimizerConfig, TrainConfig};
use crate::model::params::NamedVars;
use crate::ops::{AdamW, Gradients, Moments, global_norm};

/// What to do about a run that diverges.
pub const REMEDY: &str = "a lower optimizer.lr or optimizer.clip_norm may help";

/// The state of training: parameters, their moments and averages.
pub struct Optimizer {
    settings: OptimizerConfig,
    total_steps: u64,
    slots: BTreeMap<String, Slot>,
    /// Updates made.
    step: u64,
}

struct Slot {
    parameter: Var,
    moments: Moments,
}

/// What an update did.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Learning rate of the update.
    pub lr: f64,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f64,
}

impl Optimizer {
    /// At step 0, the averages at the parameters as they are.
    pub fn new(config: &TrainConfig, parameters: &NamedVars) -> Result<Self> {
        let mut slots = BTreeMap::new();
        for (name, parameter) in parameters {
            let zeros = || Var::from_tensor(&parameter.zeros_like()?);
            let moments = Moments {
                first: zeros()?,
                second: zeros()?,
                ema: Var::from_tensor(&parameter.as_detached_tensor().copy()?)?,
            };
            slots.insert(name.clone(), Slot { parameter: parameter.clone(), moments });
        }
        Ok(Self { settings: config.optimizer.clone(), total_steps: config.run.steps, slots, step: 0 })
    }

    /// Updates made.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// One update. Every parameter must have a finite gradient: one without it would silently never train.
    pub fn update(&mut self, mut gradients: Gradients) -> Result<Update> {
        let mut own = Vec::with_capacity(self.slots.len());
        for (name, slot) in &self.slots {
            let gradient = gradients
                .remove(slot.parameter.as_tensor())
                .with_context(|| format!("parameter {name} got no gradient; the network does not use it"))?;
            own.push(gradient);
        }
        drop(gradients);
        let gradient_norm = global_norm(&own)?;
        if !gradient_norm.is_finite() {
            bail!("the gradient of step {} is not finite; {REMEDY}", self.step);
        }
        let clip = self.settings.clip_norm;
        let lr = self.settings.lr_at(self.step, self.total_steps);
        let adamw = AdamW {
            lr,
            betas: (self.settings.beta1, self.settings.beta2),
            eps: self.settings.eps,
            weight_decay: self.settings.weight_decay,
            step: self.step + 1,
            // torch.nn.utils.clip_grad_norm_ adds the same 1e-6.
            gradient_scale: if clip > 0.0 { (clip / (gradient_norm + 1e-6)).min(1.0) } else { 1.0 },
            ema_decay: self.settings.ema_decay_at(self.step),
        };
        for (slot, gradient) in self.slots.values().zip(own) {
            adamw.update(&slot.parameter, &gradient, &slot.moments)?;
        }
        self.step += 1;
        Ok(Update { lr, gradient_norm })
    }

    /// The averaged weights: what is validated, sampled from and written as the model.
    pub fn averaged(&self) -> Weights {
        self.slots.iter().map(|(name, slot)| (name.clone(), slot.moments.ema.as_detached_tensor())).collect()
    }

    /// Whether every parameter is still a number; a diverged run's state is not worth keeping.
    pub fn is_finite(&self) -> Result<bool> {
        for slot in self.slots.values() {
            let sum = slot.parameter.as_detached_tensor().abs()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            if !sum.is_finite() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Everything that the next update depends on: `parameter.`, `first.`, `second.` and `ema.` of each name.
    pub fn state(&self) -> Weights {
        let mut state = Weights::new();
        for (name, slot) in &self.slots {
            for (kind, var) in slot.parts() {
                state.insert(format!("{kind}.{name}"), var.as_detached_tensor());
            }
        }
        state
    }

    /// Continues from a saved [`Optimizer::state`] after `step` updates.
    pub fn restore(&mut self, mut state: Weights, step: u64) -> Result<()> {
        for (name, slot) in &self.slots {
            for (kind, var) in slot.parts() {
                let name = format!("{kind}.{name}");
                let saved = state.remove(&name).with_context(|| format!("tensor {name} is missing"))?;
                ensure!(
                    saved.dims() == var.dims(),
                    "tensor {name} has shape {:?}, this run needs {:?}",
                    saved.dims(),
                    var.dims()
                );
                ensure!(saved.dtype() == var.dtype(), "tensor {name} is {:?}, not {:?}", saved.dtype(), var.dtype());
                var.set(&saved.to_device(var.device())?)?;
            }
        }
        if let Some(extra) = state.keys().next() {
            bail!("tensor {extra} does not belong to this run");
        }
        self.step = step;
        Ok(())
    }
}

impl Slot {
    fn parts(&self) -> [(&'static str, &Var); 4] {
        let Moments { first, second, ema } = &self.moments;
        [("parameter", &self.parameter), ("first", first), ("second", second), ("ema", ema)]
    }
}

/// The value of a one-element loss.
pub fn scalar(loss: &Tensor) -> Result<f64> {
    Ok(loss.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

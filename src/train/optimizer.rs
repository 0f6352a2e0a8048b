//! AdamW over all parameters of an objective, with clipping and averaged weights; its whole state can be saved.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor, Var};

use super::objective::Weights;
use super::settings::{OptimizerConfig, TrainConfig};
use crate::model::params::NamedVars;
use crate::ops::{AdamW, Gradients, Moments, global_norm};

const EMA: &str = "ema";

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
                ema: match config.optimizer.ema_decay > 0.0 {
                    true => Some(Var::from_tensor(&parameter.as_detached_tensor().copy()?)?),
                    false => None,
                },
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

    /// The averaged weights (without averaging: the weights): what is validated, sampled from and written as the model.
    pub fn averaged(&self) -> Weights {
        let best = |slot: &Slot| slot.moments.ema.as_ref().unwrap_or(&slot.parameter).as_detached_tensor();
        self.slots.iter().map(|(name, slot)| (name.clone(), best(slot))).collect()
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

    /// Everything that the next update depends on: `parameter.`, `first.`, `second.` and, with averaging, `ema.` of each name.
    pub fn state(&self) -> Weights {
        let mut state = Weights::new();
        for (name, slot) in &self.slots {
            for (kind, var) in slot.parts() {
                state.insert(format!("{kind}.{name}"), var.as_detached_tensor());
            }
        }
        state
    }

    /// [`Optimizer::state`] as it is now, on the host: later updates do not change it. It takes as much memory once more.
    pub fn snapshot(&self) -> Result<Weights> {
        let copy = |tensor: Tensor| match tensor.device() {
            Device::Cpu => tensor.copy(),
            _ => tensor.to_device(&Device::Cpu),
        };
        self.state().into_iter().map(|(name, tensor)| Ok((name, copy(tensor)?.detach()))).collect()
    }

    /// Continues from a saved [`Optimizer::state`] after `step` updates. Averaging that the run had not before begins here.
    pub fn restore(&mut self, mut state: Weights, step: u64) -> Result<()> {
        for (name, slot) in &self.slots {
            for (kind, var) in slot.parts() {
                let own = format!("{kind}.{name}");
                let saved = match state.remove(&own) {
                    None if kind == EMA => slot.parameter.as_detached_tensor(),
                    saved => saved.with_context(|| format!("tensor {own} is missing"))?,
                };
                let name = own;
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
        let is_average = |name: &str| name.strip_prefix(EMA).is_some_and(|rest| rest.starts_with('.'));
        let is_averaged = self.settings.ema_decay > 0.0;
        if let Some(extra) = state.keys().find(|name| is_averaged || !is_average(name)) {
            bail!("tensor {extra} does not belong to this run");
        }
        self.step = step;
        Ok(())
    }
}

/// [`Optimizer::averaged`] in an [`Optimizer::state`].
pub fn averaged_in(state: &Weights) -> Weights {
    let of = |kind: &str| -> Weights {
        let own = |(name, tensor): (&String, &Tensor)| {
            Some((name.strip_prefix(kind)?.strip_prefix('.')?.to_owned(), tensor.clone()))
        };
        state.iter().filter_map(own).collect()
    };
    match of(EMA) {
        averaged if averaged.is_empty() => of("parameter"),
        averaged => averaged,
    }
}

impl Slot {
    fn parts(&self) -> impl Iterator<Item = (&'static str, &Var)> {
        let Moments { first, second, ema } = &self.moments;
        let ema = ema.as_ref().map(|ema| (EMA, ema));
        [("parameter", &self.parameter), ("first", first), ("second", second)].into_iter().chain(ema)
    }
}

/// The value of a one-element loss.
pub fn scalar(loss: &Tensor) -> Result<f64> {
    Ok(loss.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

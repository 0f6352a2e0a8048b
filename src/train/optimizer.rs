//! AdamW over all parameters of an objective, with clipping and averaged weights; its whole state can be saved.

use std::collections::BTreeMap;
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor, Var};

use super::objective::Weights;
use super::settings::{OnHost, OptimizerConfig, TrainConfig};
use super::team::Team;
use crate::model::params::NamedVars;
use crate::ops::{AdamW, Gradients, Moments, Parameter, global_norm};
use crate::ranks::Ranks;

const PARAMETER: &str = "parameter";
const EMA: &str = "ema";

/// What to do about a run that diverges.
pub const REMEDY: &str = "a lower optimizer.lr or optimizer.clip_norm may help";

/// The state of training: parameters, their moments and averages.
pub struct Optimizer {
    settings: OptimizerConfig,
    total_steps: u64,
    slots: BTreeMap<String, Slot>,
    /// At work on the slots in their order.
    team: Team,
    /// Updates made.
    step: u64,
}

struct Slot {
    parameter: Var,
    /// None: another rank has them.
    moments: Option<Moments>,
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
        Self::among(&Rc::new(Ranks::alone()), config, parameters)
    }

    /// The same on many ranks, which all have the same parameters and make every call together.
    pub fn among(ranks: &Rc<Ranks>, config: &TrainConfig, parameters: &NamedVars) -> Result<Self> {
        let lengths = parameters.values().map(|parameter| parameter.elem_count()).collect();
        let device = parameters.values().next().map_or(Device::Cpu, |parameter| parameter.device().clone());
        let team = Team::new(ranks, &device, lengths, config.run.shard_optimizer);
        let mut slots = BTreeMap::new();
        for (idx, (name, parameter)) in parameters.iter().enumerate() {
            let on_host = config.optimizer.on_host;
            let place = |is_on_host: bool| if is_on_host { Device::Cpu } else { device.clone() };
            let zeros = || Var::zeros(parameter.shape(), parameter.dtype(), &place(on_host == OnHost::All));
            let moments = || -> Result<Moments> {
                let start = parameter.as_detached_tensor();
                let average = || Var::from_tensor(&start.to_device(&place(on_host != OnHost::Nothing))?);
                let ema = (config.optimizer.ema_decay > 0.0).then(average).transpose()?;
                Ok(Moments { first: zeros()?, second: zeros()?, ema })
            };
            let moments = team.keeps(idx).then(moments).transpose()?;
            slots.insert(name.clone(), Slot { parameter: parameter.clone(), moments });
        }
        Ok(Self { settings: config.optimizer.clone(), total_steps: config.run.steps, slots, team, step: 0 })
    }

    /// Updates made.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// One update. Every parameter must have a finite gradient: one without it would silently never train. On many ranks
    /// each gives the gradients of its share of the batch.
    pub fn update(&mut self, mut gradients: Gradients) -> Result<Update> {
        let take = |(name, slot): (&String, &Slot)| {
            gradients
                .remove(slot.parameter.as_tensor())
                .with_context(|| format!("parameter {name} got no gradient; the network does not use it"))
        };
        let own = self.slots.iter().map(take).collect::<Result<Vec<Tensor>>>();
        let own = self.team.ranks().all_succeed(own)?;
        drop(gradients);
        let (own, gradient_norm) = match self.team.has_others() {
            true => self.team.added_up(own)?,
            false => {
                let norm = global_norm(&own)?;
                (own.into_iter().map(Some).collect(), norm)
            }
        };
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
        let here = self.slots.values().zip(&own).filter_map(|(slot, gradient)| {
            Some(Parameter { values: &slot.parameter, gradient: gradient.as_ref()?, moments: slot.moments.as_ref()? })
        });
        adamw.update(&here.collect::<Vec<_>>())?;
        drop(own);
        if self.team.is_sharded() {
            self.team.share_weights(&self.slots.values().map(|slot| &slot.parameter).collect::<Vec<_>>())?;
        }
        self.step += 1;
        Ok(Update { lr, gradient_norm })
    }

    /// The averaged weights (without averaging: the weights), where the parameters are: what is validated, sampled from and
    /// written as the model.
    pub fn averaged(&self) -> Result<Weights> {
        let named = |(idx, (name, slot)): (usize, (&String, &Slot))| {
            let average = match self.is_averaged() {
                true => self.part(idx, slot, slot.moments.as_ref().and_then(|moments| moments.ema.as_ref()))?,
                false => slot.parameter.as_detached_tensor(),
            };
            Ok((name.clone(), average))
        };
        self.slots.iter().enumerate().map(named).collect()
    }

    fn is_averaged(&self) -> bool {
        self.settings.ema_decay > 0.0
    }

    /// A part of the state that `own` holds here, or its owner elsewhere.
    fn part(&self, idx: usize, slot: &Slot, own: Option<&Var>) -> Result<Tensor> {
        match own {
            Some(own) if !self.team.is_sharded() => Ok(own.as_detached_tensor().to_device(slot.parameter.device())?),
            own => self.team.owners_tensor(idx, &slot.parameter, own),
        }
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

    /// Everything that the next update depends on, whoever has it: `parameter.`, `first.`, `second.` and, with averaging,
    /// `ema.` of each name. On many ranks the first one gets it, the others nothing.
    pub fn state(&self) -> Result<Weights> {
        self.state_by(Ok)
    }

    /// [`Optimizer::state`] as it is now, on the host: later updates do not change it. It takes as much memory once more.
    pub fn snapshot(&self) -> Result<Weights> {
        self.state_by(|tensor| {
            let copy = match tensor.device() {
                Device::Cpu => tensor.copy()?,
                _ => tensor.to_device(&Device::Cpu)?,
            };
            Ok(copy.detach())
        })
    }

    /// `hold` takes what is here; what comes from elsewhere is a copy already.
    fn state_by(&self, hold: impl Fn(Tensor) -> Result<Tensor>) -> Result<Weights> {
        let mut state = Weights::new();
        for (idx, (name, slot)) in self.slots.iter().enumerate() {
            for (kind, var) in self.parts(slot) {
                let is_everywhere = kind == PARAMETER || !self.team.is_sharded();
                let part = match var.filter(|_| is_everywhere) {
                    Some(_) if !self.team.ranks().is_first() => continue,
                    Some(var) => hold(var.as_detached_tensor())?,
                    None => self.team.owners_tensor(idx, &slot.parameter, var)?.to_device(&Device::Cpu)?,
                };
                if self.team.ranks().is_first() {
                    state.insert(format!("{kind}.{name}"), part);
                }
            }
        }
        Ok(state)
    }

    /// Continues from a saved [`Optimizer::state`] after `step` updates, whatever the number of ranks that saved it. On many
    /// ranks the first one has it. Averaging that the run had not before begins here.
    pub fn restore(&mut self, mut state: Weights, step: u64) -> Result<()> {
        self.team.ranks().on_first(|| self.check(&state))?;
        for (name, slot) in &self.slots {
            for (kind, var) in self.parts(slot) {
                let saved = match state.remove(&format!("{kind}.{name}")) {
                    None if kind == EMA => Some(slot.parameter.as_detached_tensor()),
                    saved => saved,
                };
                let saved = match (saved, self.team.has_others()) {
                    (Some(saved), false) => saved,
                    (saved, _) => self.team.first_ranks_tensor(&slot.parameter, saved.as_ref())?,
                };
                if let Some(var) = var {
                    var.set(&saved.to_device(var.device())?)?;
                }
            }
        }
        self.step = step;
        Ok(())
    }

    /// What is saved of a slot; None where another rank has it.
    fn parts<'a>(&self, slot: &'a Slot) -> impl Iterator<Item = (&'static str, Option<&'a Var>)> + use<'a> {
        let moments = slot.moments.as_ref();
        let own = [
            (PARAMETER, Some(&slot.parameter)),
            ("first", moments.map(|moments| &moments.first)),
            ("second", moments.map(|moments| &moments.second)),
        ];
        let ema = (EMA, moments.and_then(|moments| moments.ema.as_ref()));
        own.into_iter().chain(self.is_averaged().then_some(ema))
    }

    /// Refuses a state that is not of these parameters. Averages may be missing, and are passed over where the run has none.
    fn check(&self, state: &Weights) -> Result<()> {
        for (name, slot) in &self.slots {
            for (kind, _) in self.parts(slot) {
                let (name, like) = (format!("{kind}.{name}"), &slot.parameter);
                let Some(saved) = state.get(&name) else {
                    ensure!(kind == EMA, "tensor {name} is missing");
                    continue;
                };
                ensure!(
                    saved.dims() == like.dims(),
                    "tensor {name} has shape {:?}, this run needs {:?}",
                    saved.dims(),
                    like.dims()
                );
                ensure!(saved.dtype() == like.dtype(), "tensor {name} is {:?}, not {:?}", saved.dtype(), like.dtype());
            }
        }
        let is_of_run = |full: &str| {
            full.split_once('.').is_some_and(|(kind, name)| {
                let has_part = |slot| self.parts(slot).any(|(known, _)| known == kind);
                (kind == EMA && !self.is_averaged()) || self.slots.get(name).is_some_and(has_part)
            })
        };
        if let Some(extra) = state.keys().find(|name| !is_of_run(name)) {
            bail!("tensor {extra} does not belong to this run");
        }
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
        averaged if averaged.is_empty() => of(PARAMETER),
        averaged => averaged,
    }
}

/// The value of a one-element loss.
pub fn scalar(loss: &Tensor) -> Result<f64> {
    Ok(loss.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

//! Named parameters: handed to the layers while a network is built, from a checkpoint or freshly drawn.
//!
//! Names are the checkpoint's own. A network built from a checkpoint must use every tensor and find every tensor with
//! its shape; [`Params::finish`] says which were left over.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, bail};
use candle_core::{DType, Device, Tensor, Var};

use super::adapters::AdapterPlan;
use super::weights::Weights;
use crate::rng::Rng;

/// How a fresh parameter is drawn.
#[derive(Clone, Copy, Debug)]
pub enum Init {
    /// All 0: biases.
    Zeros,
    /// All 1: scales of norms.
    Ones,
    /// Uniform with variance 1/fan_in, so that a linear path keeps the size of its signal (PyTorch's default shrinks it by √3 a
    /// layer, and its random biases then drown it: the toybox VAE did not find colours). Biases start at zero.
    FanIn(usize),
    /// A hundredth of `FanIn`: the last layer of a residual branch, so that a fresh network starts as its shortcuts and signals
    /// pass from the first step on (not zero, so that every parameter learns from the first step on too).
    Residual(usize),
    /// Normal with this standard deviation (embeddings).
    Normal(f64),
}

/// Trainable parameters of a network by name, in sorted order.
pub type NamedVars = BTreeMap<String, Var>;

enum Source {
    /// Drawn from `Rng(seed, parameter name, 0)`: independent of the order of construction.
    Random {
        seed: u64,
    },
    Checkpoint(Weights),
}

struct Store {
    source: Source,
    device: Device,
    dtype: DType,
    trainable: bool,
    used: Mutex<BTreeSet<String>>,
    vars: Mutex<NamedVars>,
    /// Those that stay as they are in a network that is trained.
    frozen: Mutex<BTreeMap<String, Tensor>>,
}

/// Whether a parameter of this name stays as it is in a network that is trained.
type IsFrozen = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// A cursor into the parameters, at a name prefix.
#[derive(Clone)]
pub struct Params {
    store: Arc<Store>,
    prefix: String,
    is_frozen: Option<IsFrozen>,
    adapters: Option<AdapterPlan>,
}

impl Params {
    /// Fresh trainable parameters.
    pub fn random(seed: u64, device: &Device, dtype: DType) -> Self {
        Self::over(Source::Random { seed }, device, dtype, true)
    }

    /// Parameters from tensors in memory; `origin` (a path) is named in errors. `trainable` makes them `Var`s.
    pub fn checkpoint(
        tensors: BTreeMap<String, Tensor>,
        origin: impl Into<String>,
        device: &Device,
        dtype: DType,
        trainable: bool,
    ) -> Self {
        Self::stored(Weights::in_memory(origin, tensors), device, dtype, trainable)
    }

    /// Parameters from a checkpoint, each read when a layer asks for it.
    pub fn stored(weights: Weights, device: &Device, dtype: DType, trainable: bool) -> Self {
        Self::over(Source::Checkpoint(weights), device, dtype, trainable)
    }

    fn over(source: Source, device: &Device, dtype: DType, trainable: bool) -> Self {
        let (used, vars, frozen) = (Mutex::default(), Mutex::default(), Mutex::default());
        let store = Store { source, device: device.clone(), dtype, trainable, used, vars, frozen };
        Self { store: Arc::new(store), prefix: String::new(), is_frozen: None, adapters: None }
    }

    /// The same, but the parameters whose names `is_frozen` holds for are not trained.
    pub fn frozen_where(self, is_frozen: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self { is_frozen: Some(Arc::new(is_frozen)), ..self }
    }

    /// The same, and linear layers get adapters, which are trained.
    pub fn with_adapters(self, adapters: AdapterPlan) -> Self {
        Self { adapters: Some(adapters), ..self }
    }

    /// Which layers get adapters.
    pub fn adapters(&self) -> Option<&AdapterPlan> {
        self.adapters.as_ref()
    }

    /// A parameter that is trained and that no checkpoint holds, drawn from its own name.
    pub fn new_var(&self, seed: u64, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let name = self.pp(name).prefix;
        let var = Var::from_tensor(&draw(seed, &name, shape, init)?.to_device(&self.store.device)?)?;
        let tensor = var.as_tensor().clone();
        self.store.vars.lock().expect("no panic while held").insert(name, var);
        Ok(tensor)
    }

    /// The parameters asked for so far that are not trained in a network that is.
    pub fn frozen(&self) -> BTreeMap<String, Tensor> {
        self.store.frozen.lock().expect("no panic while held").clone()
    }

    /// The cursor at `name` below this one.
    pub fn pp(&self, name: impl std::fmt::Display) -> Self {
        let prefix = if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) };
        Self { prefix, ..self.clone() }
    }

    /// Where the cursor is.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Whether a checkpoint holds `name` here; always false for fresh parameters. For the two spellings of a layer.
    pub fn contains(&self, name: &str) -> bool {
        match &self.store.source {
            Source::Random { .. } => false,
            Source::Checkpoint(weights) => weights.tensors().contains_key(&self.pp(name).prefix),
        }
    }

    /// The parameter `name` of this shape.
    pub fn get(&self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let name = self.pp(name).prefix;
        let store = &self.store;
        let tensor = match &store.source {
            Source::Random { seed } => draw(*seed, &name, shape, init)?,
            Source::Checkpoint(weights) => {
                let origin = weights.origin();
                match weights.tensors().get(&name) {
                    None => bail!("{origin}: tensor {name} is missing; this network needs it with shape {shape:?}"),
                    Some(found) if found.shape() != shape => {
                        bail!("{origin}: tensor {name} has shape {:?}, this network needs {shape:?}", found.shape())
                    }
                    Some(found) => found.load(&store.device).with_context(|| format!("{origin}: tensor {name}"))?,
                }
            }
        };
        let tensor = tensor.to_device(&store.device)?.to_dtype(store.dtype)?;
        store.used.lock().expect("no panic while held").insert(name.clone());
        if !store.trainable {
            return Ok(tensor);
        }
        if self.is_frozen.as_ref().is_some_and(|is_frozen| is_frozen(&name)) {
            store.frozen.lock().expect("no panic while held").insert(name, tensor.clone());
            return Ok(tensor);
        }
        let var = Var::from_tensor(&tensor)?;
        let tensor = var.as_tensor().clone();
        store.vars.lock().expect("no panic while held").insert(name, var);
        Ok(tensor)
    }

    /// Call once the network is built: the trainable parameters (empty for a frozen network). Fails if the checkpoint
    /// has tensors that the network did not ask for.
    pub fn finish(self) -> Result<NamedVars> {
        let used = self.store.used.lock().expect("no panic while held");
        if let Source::Checkpoint(weights) = &self.store.source {
            let (tensors, origin) = (weights.tensors(), weights.origin());
            let extra: Vec<&String> = tensors.keys().filter(|name| !used.contains(*name)).collect();
            if let Some(first) = extra.first() {
                bail!("{origin}: {} tensors do not belong to this network, the first is {first}", extra.len());
            }
        }
        Ok(self.store.vars.lock().expect("no panic while held").clone())
    }
}

fn draw(seed: u64, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
    let cpu = Device::Cpu;
    let tensor = match init {
        Init::Zeros => Tensor::zeros(shape, DType::F32, &cpu)?,
        Init::Ones => Tensor::ones(shape, DType::F32, &cpu)?,
        Init::Normal(deviation) => (Rng::new(seed, name, 0).normal_tensor(shape)? * deviation)?,
        Init::FanIn(fan_in) | Init::Residual(fan_in) => {
            let share = if matches!(init, Init::Residual(_)) { 0.01 } else { 1.0 };
            let bound = share * (3.0 / fan_in.max(1) as f64).sqrt();
            let mut rng = Rng::new(seed, name, 0);
            let count = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|_| rng.between(-bound, bound) as f32).collect();
            Tensor::from_vec(values, shape, &cpu)?
        }
    };
    Ok(tensor)
}

//! What the trainer asks of an objective.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::model::params::{NamedVars, Params};

/// Weights by `component.parameter`, such as `unet.conv_in.weight`.
pub type Weights = BTreeMap<String, Tensor>;

/// A loss with the networks that it trains.
pub trait Objective {
    /// The trainable parameters by `component.parameter`.
    fn parameters(&self) -> &NamedVars;

    /// What the user should know of how it was set up, each to be shown once.
    fn notices(&self) -> &[String] {
        &[]
    }

    /// The fingerprint of the VAE that its latents come from, where it has one: a run that goes on must go on with it.
    fn vae_hash(&self) -> Option<&str> {
        None
    }

    /// The loss of the batch of `step` with history; a function of the parameters and `step` alone.
    fn loss(&mut self, step: u64) -> Result<Tensor>;

    /// The loss of held-out data with fixed noise, under `weights`.
    fn validate(&mut self, weights: &Weights) -> Result<f64>;

    /// Writes `weights` as a model folder.
    fn write(&self, folder: &Path, weights: &Weights) -> Result<()>;
}

/// Adds one component's parameters to `all`.
pub fn merge(all: &mut NamedVars, component: &str, vars: NamedVars) {
    all.extend(vars.into_iter().map(|(name, var)| (format!("{component}.{name}"), var)));
}

/// One component's weights under their own names.
pub fn component(weights: &Weights, component: &str) -> BTreeMap<String, Tensor> {
    let own = |(name, tensor): (&String, &Tensor)| {
        let rest = name.strip_prefix(component)?.strip_prefix('.')?;
        Some((rest.to_string(), tensor.clone()))
    };
    weights.iter().filter_map(own).collect()
}

/// Frozen parameters of a component.
pub fn frozen(weights: &Weights, name: &str, device: &Device) -> Params {
    Params::checkpoint(
        component(weights, name),
        format!("averaged weights of {name}"),
        device,
        candle_core::DType::F32,
        false,
    )
}

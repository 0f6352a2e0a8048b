//! What the trainer asks of an objective.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use candle_core::{Device, Tensor};

use super::held_out::PartLoss;
use super::plan::Footprint;
use super::share::Share;
use super::shared_feed::SharedFeed;
use crate::model::params::{NamedVars, Params};
use crate::shape::SetShape;

/// Weights by `component.parameter`, such as `unet.conv_in.weight`.
pub type Weights = BTreeMap<String, Tensor>;

/// Writes weights as a model folder, on whatever thread it is called.
pub type ModelWriter = Box<dyn FnOnce(&Path, &Weights) -> Result<()> + Send>;

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

    /// What it is fed with.
    fn fed(&self) -> &SharedFeed;

    /// The same.
    fn fed_mut(&mut self) -> &mut SharedFeed;

    /// Sets in the batch of `step`, and images in each.
    fn shape(&mut self, step: u64) -> SetShape {
        self.fed_mut().shape(step)
    }

    /// The fewest sets that a step can hold: no step can be shared among more.
    fn fewest_sets(&self) -> usize {
        self.fed().feed().fewest_sets()
    }

    /// Reads ahead for this share of every batch alone, and computes it: all shares that follow are parts of it.
    fn set_rank_share(&mut self, own: Share) {
        self.fed_mut().set_rank_share(own);
    }

    /// Computes no more than this share of every batch from now on; at first it is [`Share::WHOLE`].
    fn set_share(&mut self, share: Share) {
        self.fed_mut().set_share(share);
    }

    /// What the share adds to the loss of the batch of `step`, with history: the losses of all shares add up to that of the
    /// whole. A function of the parameters, `step` and the share alone.
    fn loss(&mut self, step: u64) -> Result<Tensor>;

    /// What the share adds to the loss of held-out data with fixed noise, under `weights`; 0 where it is empty.
    fn validate(&mut self, weights: &Weights) -> Result<f64>;

    /// What it holds and computes.
    fn footprint(&self) -> Footprint;

    /// A loss with history of that many of its largest sets, of nothing, at another side than its own: only its memory is
    /// of interest.
    fn trial_loss(&self, sets: usize, side: usize) -> Result<Tensor>;

    /// What is done to a set before it is trained on, to pictures of nothing with so many pixels a side.
    fn trial_preparation(&self, _side_px: usize) -> Result<()> {
        Ok(())
    }

    /// What writes its models; training may go on meanwhile.
    fn writer(&self) -> Result<ModelWriter>;

    /// The parts of the share's last held-out loss, alike for all shares; none where it is not told in parts.
    fn held_out_parts(&self) -> &[PartLoss] {
        &[]
    }

    /// Writes `weights` as a model folder.
    fn write(&self, folder: &Path, weights: &Weights) -> Result<()> {
        self.writer()?(folder, weights)
    }
}

/// Adds one component's parameters to `all`.
pub fn merge<T>(all: &mut BTreeMap<String, T>, component: &str, own: BTreeMap<String, T>) {
    all.extend(own.into_iter().map(|(name, var)| (format!("{component}.{name}"), var)));
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

//! `[lora]`: adapters that are trained in place of the network (see `model::adapters`).

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::objective::Weights;
use super::patterns::{any_matches, matches};
use super::settings::TrainConfig;
use crate::invalid::invalid;
use crate::model::adapters::{AdapterPlan, DOWN, merge_all};
use crate::model::lora_file::write_lora;
use crate::model::params::{NamedVars, Params};

/// Low-rank adapters of linear layers, trained alone; only for objective `joint`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Width of the adapters; 0: none, the network itself is trained.
    pub rank: usize,
    /// Adapters are multiplied by alpha/rank; 0: alpha is the rank.
    pub alpha: f64,
    /// Layers that get one, by patterns of their names in which `*` stands for anything.
    pub targets: Vec<String>,
    /// Parameters that are trained as a whole beside the adapters, by patterns: `unet.conv_in.*` when training starts from a
    /// model that does not yet see references. Files of adapters do not hold them, checkpoints do.
    pub train_fully: Vec<String>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        // The layers of diffusers' train_text_to_image_lora.py.
        let targets = ["to_q", "to_k", "to_v", "to_out.0"].map(|layer| format!("unet.*.{layer}")).to_vec();
        Self { rank: 0, alpha: 0.0, targets, train_fully: vec![] }
    }
}

/// Parameters of `component` as a run trains them: the adapters and what `lora.train_fully` says, or without adapters all; but
/// nothing that `model.freeze` says.
pub fn prepare(config: &TrainConfig, params: Params, component: &'static str) -> Params {
    let full = move |name: &str| format!("{component}.{name}");
    let (lora, freeze) = (config.lora.clone(), config.model.freeze.clone());
    let (rank, alpha, targets, fully) = (lora.rank, lora.alpha(), lora.targets, lora.train_fully);
    let params = params.frozen_where(move |name| {
        let name = full(name);
        any_matches(&freeze, &name) || rank > 0 && !any_matches(&fully, &name)
    });
    if rank == 0 {
        return params;
    }
    let is_target = Arc::new(move |layer: &str| any_matches(&targets, &full(layer)));
    params.with_adapters(AdapterPlan { rank, alpha, seed: config.seed, is_target })
}

impl LoraConfig {
    fn alpha(&self) -> f64 {
        if self.alpha == 0.0 { self.rank as f64 } else { self.alpha }
    }

    /// Refuses patterns that match nothing.
    pub fn check(&self, trained: &NamedVars) -> Result<()> {
        if self.rank == 0 {
            return Ok(());
        }
        let layers = || trained.keys().filter_map(|name| name.strip_suffix(DOWN)?.strip_suffix('.'));
        if let Some(idle) = self.targets.iter().find(|target| !layers().any(|layer| matches(target, layer))) {
            return Err(invalid(format!(
                "lora.targets: {idle} matches no linear layer; they are called such as \
                 unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
            )));
        }
        match self.train_fully.iter().find(|pattern| !trained.keys().any(|name| matches(pattern, name))) {
            Some(idle) => Err(invalid(format!("lora.train_fully: {idle} matches no parameter"))),
            None => Ok(()),
        }
    }

    /// The network's own weights with the adapters among them merged.
    pub fn merge(&self, weights: &mut Weights) -> Result<()> {
        match self.rank {
            0 => Ok(()),
            rank => merge_all(weights, self.alpha() / rank as f64),
        }
    }

    /// Writes the adapters by themselves, in the formats that other programs read.
    pub fn write(&self, checkpoint: &Path, weights: &Weights) -> Result<()> {
        match self.rank {
            0 => Ok(()),
            rank => write_lora(&checkpoint.join("lora"), weights, rank, self.alpha()),
        }
    }
}

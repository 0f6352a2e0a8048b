//! Sets as the joint objective sees them: latents and tokens, made when first asked for and kept.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::data::{SetSource, tensor_from_images};
use crate::model::{Tokenizer, Vae};

/// Latents and tokens of the sets seen so far, kept in memory without limit (4 kB a picture at 8×8×16).
pub struct LatentCache {
    source: Arc<dyn SetSource>,
    vae: Arc<Vae>,
    tokenizer: Arc<Tokenizer>,
    device: Device,
    sets: HashMap<usize, CachedSet>,
}

pub struct CachedSet {
    /// `[c, h, w]` a picture, on the host, without history.
    pub latents: Vec<Tensor>,
    /// The caption of each picture.
    pub tokens: Vec<Vec<u32>>,
}

impl LatentCache {
    pub fn new(source: Arc<dyn SetSource>, vae: &Arc<Vae>, tokenizer: &Arc<Tokenizer>, device: &Device) -> Self {
        let (vae, tokenizer) = (vae.clone(), tokenizer.clone());
        Self { source, vae, tokenizer, device: device.clone(), sets: HashMap::new() }
    }

    pub fn n_sets(&self) -> usize {
        self.source.n_sets()
    }

    /// Set number `set_idx`. It is encoded by itself: in a batch with others its last bits would depend on them, and a
    /// run that goes on, whose cache is empty, would not repeat what the uninterrupted one did.
    pub fn get(&mut self, set_idx: usize) -> Result<&CachedSet> {
        let entry = match self.sets.entry(set_idx) {
            Entry::Occupied(entry) => return Ok(entry.into_mut()),
            Entry::Vacant(entry) => entry,
        };
        let set = self.source.read(set_idx)?;
        let latents = self.vae.latents_from_images(&tensor_from_images(&set.images, &self.device)?)?;
        let latents = latents.detach().to_device(&Device::Cpu)?; // [n, c, h, w]
        let latents = (0..set.images.len()).map(|i| latents.get(i)?.copy()).collect::<candle_core::Result<_>>()?;
        let tokens = set.captions.iter().map(|c| Ok(self.tokenizer.encode(c)?.tokens)).collect::<Result<_>>()?;
        Ok(entry.insert(CachedSet { latents, tokens }))
    }

    /// The null text.
    pub fn empty_tokens(&self) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode("")?.tokens)
    }
}

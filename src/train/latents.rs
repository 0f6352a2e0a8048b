//! Sets as the joint objective sees them: latents and tokens, made when first asked for and kept while there is room.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::data::{SetSource, tensor_from_images};
use crate::model::{Tokenizer, Vae};

/// Latents and tokens of the sets seen so far (4 kB a picture at 8×8×16), up to a number of bytes; later sets are encoded
/// each time. What is given out does not depend on what is kept.
pub struct LatentCache {
    source: Arc<dyn SetSource>,
    vae: Arc<Vae>,
    tokenizer: Arc<Tokenizer>,
    device: Device,
    max_bytes: u64,
    kept_bytes: u64,
    sets: HashMap<usize, EncodedSet>,
    /// The last set that there was no room for.
    passing: Option<EncodedSet>,
}

/// A set as numbers.
pub struct EncodedSet {
    /// `[c, h, w]` a picture, on the host, without history.
    pub latents: Vec<Tensor>,
    /// The caption of each picture.
    pub tokens: Vec<Vec<u32>>,
}

impl EncodedSet {
    fn bytes(&self) -> u64 {
        let latents: usize = self.latents.iter().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum();
        (latents + self.tokens.iter().map(|tokens| size_of_val(&tokens[..])).sum::<usize>()) as u64
    }
}

impl LatentCache {
    /// Nothing is encoded yet; `max_gb` (10⁹ bytes) is what may be kept, 0: nothing.
    pub fn new(
        source: Arc<dyn SetSource>,
        vae: &Arc<Vae>,
        tokenizer: &Arc<Tokenizer>,
        device: &Device,
        max_gb: f64,
    ) -> Self {
        Self {
            source,
            vae: vae.clone(),
            tokenizer: tokenizer.clone(),
            device: device.clone(),
            max_bytes: (max_gb * 1e9) as u64,
            kept_bytes: 0,
            sets: HashMap::new(),
            passing: None,
        }
    }

    /// Sets in the source.
    pub fn n_sets(&self) -> usize {
        self.source.n_sets()
    }

    /// Set number `set_idx`.
    pub fn get(&mut self, set_idx: usize) -> Result<&EncodedSet> {
        if !self.sets.contains_key(&set_idx) {
            let set = self.encode(set_idx)?;
            let bytes = self.kept_bytes + set.bytes();
            if bytes > self.max_bytes {
                return Ok(self.passing.insert(set));
            }
            self.kept_bytes = bytes;
            self.sets.insert(set_idx, set);
        }
        Ok(&self.sets[&set_idx])
    }

    /// A set is encoded by itself: in a batch with others its last bits would depend on them, and a run that goes on, whose
    /// cache is empty, would not repeat what the uninterrupted one did.
    fn encode(&self, set_idx: usize) -> Result<EncodedSet> {
        let set = self.source.read(set_idx)?;
        let latents = self.vae.latents_from_images(&tensor_from_images(&set.images, &self.device)?)?;
        let latents = latents.detach().to_device(&Device::Cpu)?; // [n, c, h, w]
        let latents = (0..set.images.len()).map(|i| latents.get(i)?.copy()).collect::<candle_core::Result<_>>()?;
        let tokens = set.captions.iter().map(|c| Ok(self.tokenizer.encode(c)?.tokens)).collect::<Result<_>>()?;
        Ok(EncodedSet { latents, tokens })
    }

    /// The null text.
    pub fn empty_tokens(&self) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode("")?.tokens)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use candle_core::DType;
    use image::RgbImage;

    use super::*;
    use crate::data::ImageSet;
    use crate::model::params::Params;
    use crate::model::{Files, VaeConfig};
    use crate::rng::Rng;

    /// Four sets of two pictures of noise; counts how often one is read.
    #[derive(Default)]
    struct Noise(AtomicUsize);

    impl SetSource for Noise {
        fn n_sets(&self) -> usize {
            4
        }

        fn read(&self, set_idx: usize) -> Result<ImageSet> {
            self.0.fetch_add(1, Ordering::Relaxed);
            let mut rng = Rng::new(1, "noise pictures", set_idx as u64);
            let mut image = || RgbImage::from_fn(8, 8, |_, _| image::Rgb([0; 3].map(|_: u8| rng.below(256) as u8)));
            Ok(ImageSet {
                images: vec![image(), image()],
                captions: vec!["a".into(), "b".into()],
                ..Default::default()
            })
        }
    }

    /// Everything that a cache of so many bytes gives in twelve requests, and how many sets it read for them.
    fn given(max_bytes: u64) -> (Vec<Vec<f32>>, usize) {
        let config: VaeConfig = serde_json::from_value(serde_json::json!({
            "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"], "block_out_channels": [8, 8],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"], "norm_num_groups": 4,
        }))
        .unwrap();
        let vae = Arc::new(Vae::new(&config, Params::random(1, &Device::Cpu, DType::F32)).unwrap().0);
        let toybox = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/toybox/architecture");
        let tokenizer = Arc::new(Tokenizer::read(&Files::Folder(toybox), 10).unwrap());
        let source = Arc::new(Noise::default());
        let mut cache = LatentCache::new(source.clone(), &vae, &tokenizer, &Device::Cpu, max_bytes as f64 / 1e9);
        let mut values = vec![];
        for set_idx in [0, 1, 2, 3, 3, 2, 1, 0, 0, 3, 1, 2] {
            let set = cache.get(set_idx).unwrap();
            let latents = set.latents.iter().flat_map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            values.push(latents.chain(set.tokens.concat().into_iter().map(|token| token as f32)).collect());
        }
        assert!(cache.kept_bytes <= max_bytes);
        (values, source.0.load(Ordering::Relaxed))
    }

    #[test]
    fn what_is_given_does_not_depend_on_what_is_kept() {
        // Two pictures of 4×4×4 latents in f32 and 10 tokens.
        let set_bytes = 2 * (4 * 4 * 4 * 4 + 10 * 4);
        let (all, n_read) = given(4 * set_bytes);
        assert_eq!(n_read, 4);
        // Sets 0 and 1 are kept; 2 and 3 are read at each of their three requests.
        let (some, n_read) = given(3 * set_bytes - 1);
        assert_eq!(n_read, 2 + 2 * 3);
        let (none, n_read) = given(0);
        assert_eq!(n_read, 12);
        assert!(all == some && all == none);
    }
}

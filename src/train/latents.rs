//! Sets as the joint objective sees them: latents and tokens, made when first dealt, kept in memory while there is room and
//! on the disk where the run has a cache.

use std::collections::HashMap;
use std::sync::{Arc, RwLock};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use image::imageops::{self, FilterType};
use image::{GrayImage, RgbImage};

use super::stored::{bytes_from_tensor, tensor_from_bytes};
use crate::data::{Fed, Feed, Known, Slot, Store, tensor_from_images};
use crate::model::{Tokenizer, Vae};

/// What makes numbers of pictures and captions.
pub struct Encoder {
    /// Frozen.
    pub vae: Vae,
    /// Of the text encoder.
    pub tokenizer: Tokenizer,
    /// Where the VAE computes.
    pub device: Device,
}

impl Encoder {
    /// `[c, h, w]` a picture, on the host, without history. The pictures of a set are encoded by themselves: in a batch with
    /// others their last bits would depend on these, and a run that goes on, whose cache is empty, would not repeat what the
    /// uninterrupted one did.
    pub fn latents(&self, images: &[RgbImage]) -> Result<Vec<Tensor>> {
        let latents = self.vae.latents_from_images(&tensor_from_images(images, &self.device)?)?;
        let latents = latents.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?; // [n, c, h, w]
        Ok((0..images.len()).map(|i| latents.get(i)?.copy()).collect::<candle_core::Result<_>>()?)
    }

    /// The tokens of each caption.
    pub fn tokens(&self, captions: &[String]) -> Result<Vec<Vec<u32>>> {
        captions.iter().map(|caption| Ok(self.tokenizer.encode(caption)?.tokens)).collect()
    }

    /// The null text.
    pub fn empty_tokens(&self) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode("")?.tokens)
    }
}

/// Source, set and variant.
type SetId = (usize, usize, u64);

/// Latents and tokens of the sets seen so far (4 kB a picture at 8×8×16), up to a number of bytes; later sets are read from
/// the disk, or encoded, each time. What is given out does not depend on what is kept.
pub struct LatentCache {
    encoder: Encoder,
    store: Option<Arc<Store>>,
    max_bytes: u64,
    kept_bytes: u64,
    sets: HashMap<SetId, EncodedSet>,
    known: Arc<RwLock<HashMap<SetId, usize>>>,
    /// The last set that there was no room for.
    passing: Option<EncodedSet>,
}

/// A set as numbers.
pub struct EncodedSet {
    /// `[c, h, w]` a picture, on the host, without history.
    pub latents: Vec<Tensor>,
    /// The caption of each picture.
    pub tokens: Vec<Vec<u32>>,
    /// How much of each place of the latents the subject covers, `[1, h, w]` a picture; empty where nobody knows.
    pub subjects: Vec<Tensor>,
}

impl EncodedSet {
    fn bytes(&self) -> u64 {
        let latents: usize =
            self.latents.iter().chain(&self.subjects).map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum();
        (latents + self.tokens.iter().map(|tokens| size_of_val(&tokens[..])).sum::<usize>()) as u64
    }
}

impl LatentCache {
    /// Nothing is encoded yet; `max_gb` (10⁹ bytes) is what may be kept in memory, 0: nothing. `store` has the latents of this
    /// encoder.
    pub fn new(encoder: Encoder, max_gb: f64, store: Option<Arc<Store>>) -> Self {
        Self {
            encoder,
            store,
            max_bytes: (max_gb * 1e9) as u64,
            kept_bytes: 0,
            sets: HashMap::new(),
            known: Arc::default(),
            passing: None,
        }
    }

    /// What it encodes with.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// What need not be read or decoded for it, for the feed.
    pub fn known(&self) -> impl Known + use<> {
        let has_content =
            self.store.clone().map(|store| Box::new(move |content: &str| store.has(content)) as HasContent);
        KnownLatents { sets: self.known.clone(), has_content }
    }

    /// A dealt set of at least `n_images` pictures.
    pub fn encoded(&mut self, feed: &Feed, fed: Fed, n_images: usize) -> Result<&EncodedSet> {
        let id = (fed.slot.source, fed.slot.set_idx, fed.slot.variant);
        if !self.sets.contains_key(&id) {
            let (slot, is_kept) = (fed.slot, feed.comes_again(&fed.slot));
            let set = self.made(feed, fed, n_images)?;
            ensure!(set.latents.len() >= n_images, "set number {}: has lost pictures", slot.set_idx);
            let bytes = self.kept_bytes + set.bytes();
            if bytes > self.max_bytes || !is_kept {
                return Ok(self.passing.insert(set));
            }
            self.kept_bytes = bytes;
            self.known.write().expect("no panic under the lock").insert(id, set.latents.len());
            self.sets.insert(id, set);
        }
        Ok(&self.sets[&id])
    }

    fn made(&self, feed: &Feed, fed: Fed, n_images: usize) -> Result<EncodedSet> {
        let set = match fed.set {
            Some(set) => set,
            None => feed.decoded(&fed.slot, n_images)?,
        };
        let tokens = self.encoder.tokens(&set.captions)?;
        let kept = self.store.as_ref().filter(|_| !set.content.is_empty());
        // What the feed knows may have turned out damaged since.
        let known = kept.and_then(|store| latents_from_bytes(&store.get(&set.content)?).ok());
        let latents = match known.filter(|latents| latents.len() == tokens.len()) {
            Some(latents) => latents,
            None => {
                let images = match set.images {
                    Some(images) => images,
                    None => feed.decoded(&fed.slot, n_images)?.images.context("decoded pictures")?,
                };
                let latents = self.encoder.latents(&images)?;
                if let Some(store) = kept {
                    store.put(&set.content, &bytes_from_tensor(&Tensor::stack(&latents, 0)?)?); // [n, c, h, w]
                }
                latents
            }
        };
        let subjects = subjects(&set.masks, &latents)?;
        Ok(EncodedSet { latents, tokens, subjects })
    }
}

/// The share of each place of the latents that the masks mark.
///
/// # Shapes
/// - latents `[c, h, w]` a picture → `[1, h, w]` a picture
fn subjects(masks: &[GrayImage], latents: &[Tensor]) -> Result<Vec<Tensor>> {
    let share = |(mask, latents): (&GrayImage, &Tensor)| {
        let (_, h, w) = latents.dims3()?;
        let shares = imageops::resize(mask, w as u32, h as u32, FilterType::Triangle);
        let shares: Vec<f32> = shares.into_raw().into_iter().map(|value| f32::from(value) / 255.0).collect();
        Ok(Tensor::from_vec(shares, (1, h, w), &Device::Cpu)?)
    };
    masks.iter().zip(latents).map(share).collect()
}

type HasContent = Box<dyn Fn(&str) -> bool + Send + Sync>;

struct KnownLatents {
    sets: Arc<RwLock<HashMap<SetId, usize>>>,
    has_content: Option<HasContent>,
}

impl Known for KnownLatents {
    fn n_images(&self, slot: &Slot) -> Option<usize> {
        let id = (slot.source, slot.set_idx, slot.variant);
        self.sets.read().expect("no panic under the lock").get(&id).copied()
    }

    fn has_content(&self) -> Option<&dyn Fn(&str) -> bool> {
        self.has_content.as_ref().map(|has| has as &dyn Fn(&str) -> bool)
    }
}

fn latents_from_bytes(bytes: &[u8]) -> Result<Vec<Tensor>> {
    let all = tensor_from_bytes(bytes)?; // [n, c, h, w]
    Ok((0..all.dim(0)?).map(|i| all.get(i)?.copy()).collect::<candle_core::Result<_>>()?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use image::RgbImage;

    use super::*;
    use crate::data::{FeedSettings, ImageSet, Mixture, SetSource};
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

    fn encoder(seed: u64) -> Encoder {
        let config: VaeConfig = serde_json::from_value(serde_json::json!({
            "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"], "block_out_channels": [8, 8],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"], "norm_num_groups": 4,
        }))
        .unwrap();
        let vae = Vae::new(&config, Params::random(seed, &Device::Cpu, DType::F32)).unwrap().0;
        let toybox = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/toybox/architecture");
        let tokenizer = Tokenizer::read(&Files::Folder(toybox), 10).unwrap();
        Encoder { vae, tokenizer, device: Device::Cpu }
    }

    /// Everything that a cache of so many bytes gives in twelve steps, three epochs; how many sets were read for it; and what
    /// its store had to say.
    fn given(max_bytes: u64, folder: Option<&Path>, vae_seed: u64) -> (Vec<Vec<f32>>, usize, Vec<String>) {
        let told = Arc::new(std::sync::Mutex::new(vec![]));
        let heard = told.clone();
        let warn = Arc::new(move |message: &str| heard.lock().unwrap().push(message.to_owned()));
        let encoder_hash = crate::sha256::sha256_hex(&vae_seed.to_le_bytes());
        let store = folder.map(|folder| Arc::new(Store::open(folder, &encoder_hash, 0, warn).unwrap()));
        let source = Arc::new(Noise::default());
        let mut mixture = Mixture::from(source.clone());
        mixture.workers = 1;
        let loader = mixture.loader(1, 2, &[2]).unwrap();
        let mut cache = LatentCache::new(encoder(vae_seed), max_bytes as f64 / 1e9, store);
        let settings = FeedSettings { seed: 1, size: 8, masks: false };
        let mut feed = Feed::new(mixture, loader, settings, cache.known());
        let mut values = vec![];
        for step in 0..12 {
            // A feed that does not run ahead, so that the sets read can be counted.
            let fed = feed.sets(step, 0..1).unwrap().pop().unwrap();
            let set = cache.encoded(&feed, fed, 2).unwrap();
            let latents = set.latents.iter().flat_map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            values.push(latents.chain(set.tokens.concat().into_iter().map(|token| token as f32)).collect());
        }
        assert!(cache.kept_bytes <= max_bytes);
        drop(feed);
        let told = told.lock().unwrap().clone();
        (values, source.0.load(Ordering::Relaxed), told)
    }

    /// Two pictures of 4×4×4 latents in f32 and 10 tokens.
    const SET_BYTES: u64 = 2 * (4 * 4 * 4 * 4 + 10 * 4);

    #[test]
    fn what_is_given_does_not_depend_on_what_is_kept() {
        let (all, n_read_for_all, _) = given(4 * SET_BYTES, None, 1);
        let (some, ..) = given(3 * SET_BYTES - 1, None, 1);
        let (none, n_read_for_none, _) = given(0, None, 1);
        assert!(all == some && all == none);
        // The worker runs up to four sets ahead.
        assert!(n_read_for_all <= 4 + 4 && n_read_for_none >= 12, "{n_read_for_all} {n_read_for_none}");
    }

    #[test]
    fn a_cache_on_the_disk_gives_the_same_bits_and_is_found_stale() {
        let folder = tempfile::tempdir().unwrap();
        let (without, ..) = given(0, None, 1);
        for n_results in [0, 4, 4] {
            let store =
                Store::open(folder.path(), &crate::sha256::sha256_hex(&1u64.to_le_bytes()), 0, Arc::new(|_| {}));
            assert_eq!(store.unwrap().n_results(), n_results);
            assert_eq!(given(0, Some(folder.path()), 1).0, without);
        }
        // Another VAE: nothing of the old one is used.
        let (other, _, told) = given(0, Some(folder.path()), 2);
        assert_eq!((other == given(0, None, 2).0, other == without), (true, false));
        assert!(told.iter().any(|told| told.contains("of another encoder")), "{told:?}");
        // A damaged result is made anew.
        let part = folder.path().join("part-000000.bin");
        let mut bytes = std::fs::read(&part).unwrap();
        let end = bytes.len() - 9;
        bytes[end] ^= 4;
        std::fs::write(&part, bytes).unwrap();
        let (again, _, told) = given(0, Some(folder.path()), 1);
        assert!(again == without && told.iter().any(|told| told.contains("is damaged")), "{told:?}");
    }
}

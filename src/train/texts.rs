//! What a text encoder that is not trained makes of captions, kept on the disk.

use std::sync::Arc;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::stored::{bytes_from_tensor, tensor_from_bytes};
use crate::data::Store;
use crate::model::TextEncoder;
use crate::sha256::sha256_hex;

/// Embeddings of captions by one frozen encoder. Each is made by itself: in a batch its last bits could depend on the others.
pub struct TextCache {
    store: Arc<Store>,
    /// The one asked for last, which is often the null text.
    last: Option<(Vec<u32>, Tensor)>,
}

impl TextCache {
    /// `store` has the embeddings of this encoder alone.
    pub fn new(store: Arc<Store>) -> Self {
        Self { store, last: None }
    }

    /// The context of these captions, on the host.
    ///
    /// # Shapes
    /// - k captions of l tokens → `[k, l, d]`
    pub fn context(&mut self, text: &TextEncoder, tokens: &[Vec<u32>], device: &Device) -> Result<Tensor> {
        let contexts = tokens.iter().map(|tokens| self.one(text, tokens, device)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&contexts, 0)?) // [k, l, d]
    }

    fn one(&mut self, text: &TextEncoder, tokens: &[u32], device: &Device) -> Result<Tensor> {
        if let Some((last, context)) = &self.last
            && last == tokens
        {
            return Ok(context.clone());
        }
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let content = sha256_hex(&bytes);
        let dims = [tokens.len(), text.config().hidden_size];
        let known = self.store.get(&content).and_then(|bytes| tensor_from_bytes(&bytes).ok());
        let context = match known.filter(|known| known.dims() == dims) {
            Some(known) => known,
            None => {
                let made = text.forward(&Tensor::new(tokens, device)?.unsqueeze(0)?)?.detach(); // [1, l, d]
                let made = made.squeeze(0)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?; // [l, d]
                self.store.put(&content, &bytes_from_tensor(&made)?);
                made
            }
        };
        self.last = Some((tokens.to_vec(), context.clone()));
        Ok(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TextConfig;
    use crate::model::params::Params;

    fn encoder(seed: u64) -> TextEncoder {
        let config: TextConfig = serde_json::from_value(serde_json::json!({
            "vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 5, "hidden_act": "quick_gelu",
        }))
        .unwrap();
        TextEncoder::new(&config, Params::random(seed, &Device::Cpu, DType::F32)).unwrap().0
    }

    fn bits(tensor: &Tensor) -> Vec<u32> {
        tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn embeddings_are_those_of_the_encoder_and_are_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Arc::new(Store::open(folder.path(), &sha256_hex(b"1"), 0, Arc::new(|_| {})).unwrap());
        let text = encoder(1);
        let tokens = vec![vec![1, 2, 3], vec![4, 4, 4], vec![1, 2, 3], vec![4, 4, 4]];
        let store = open();
        let context = TextCache::new(store.clone()).context(&text, &tokens, &Device::Cpu).unwrap();
        assert_eq!((context.dims(), store.n_results()), (&[4, 3, 8][..], 2));
        for (idx, tokens) in tokens.iter().enumerate() {
            let alone = text.forward(&Tensor::new(&tokens[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap()).unwrap();
            assert_eq!(bits(&context.get(idx).unwrap()), bits(&alone));
        }
        // From the disk: another encoder is not even asked.
        let again = TextCache::new(open()).context(&encoder(2), &tokens, &Device::Cpu).unwrap();
        assert_eq!(bits(&again), bits(&context));
    }
}

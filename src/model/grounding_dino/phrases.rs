//! What the network makes of token ids: which tokens see each other (those of one phrase), where each stands in its
//! phrase, and which are padding.

use candle_core::{DType, Device, Result, Tensor, bail};

/// `[CLS]`, `[SEP]`, `.` and `?` of BERT's English vocabulary: they end phrases (transformers `SPECIAL_TOKENS`).
pub const PHRASE_ENDS: [u32; 4] = [101, 102, 1012, 1029];
/// `[PAD]` of the same.
const PAD: u32 = 0;

/// A batch of texts, each padded to the longest.
pub struct Phrases {
    /// `[b, t]` u32.
    pub tokens: Tensor,
    /// Place of each token in its phrase, b·t of them.
    pub places: Vec<u32>,
    /// 0 between tokens of one phrase, −∞ between others, `[b, t, t]`.
    pub within: Tensor,
    /// 0 for tokens, −∞ for padding, `[b, 1, t]`.
    pub tokens_alone: Tensor,
}

impl Phrases {
    /// Of the token ids of each text, `[CLS]` and `[SEP]` included.
    pub fn new(texts: &[Vec<u32>], dtype: DType, device: &Device) -> Result<Self> {
        let (b, t) = (texts.len(), texts.iter().map(Vec::len).max().unwrap_or(0));
        if t == 0 {
            bail!("texts without tokens");
        }
        let padded: Vec<u32> = texts.iter().flat_map(|text| padded(text, t)).collect();
        let (mut places, mut within) = (vec![0; b * t], vec![f32::NEG_INFINITY; b * t * t]);
        for ((tokens, places), within) in padded.chunks(t).zip(places.chunks_mut(t)).zip(within.chunks_mut(t * t)) {
            (0..t).for_each(|at| within[at * t + at] = 0.0);
            let mut previous = 0;
            for end in (0..t).filter(|&at| PHRASE_ENDS.contains(&tokens[at])) {
                // The first and the last token stand alone.
                if end > 0 && end + 1 < t {
                    for query in previous + 1..=end {
                        places[query] = (query - previous - 1) as u32;
                        within[query * t + previous + 1..=query * t + end].fill(0.0);
                    }
                }
                previous = end;
            }
        }
        let alone =
            texts.iter().flat_map(|text| (0..t).map(|at| if at < text.len() { 0.0 } else { f32::NEG_INFINITY }));
        let tensor =
            |values: Vec<f32>, shape: (usize, usize, usize)| Tensor::from_vec(values, shape, device)?.to_dtype(dtype);
        Ok(Self {
            tokens: Tensor::from_vec(padded, (b, t), device)?,
            places,
            within: tensor(within, (b, t, t))?,
            tokens_alone: tensor(alone.collect(), (b, 1, t))?,
        })
    }
}

fn padded(text: &[u32], length: usize) -> impl Iterator<Item = u32> {
    text.iter().copied().chain(std::iter::repeat(PAD)).take(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_a_phrase_see_each_other_and_count_from_its_start() {
        // "a toy . dog ." and "cat ."
        let texts = [vec![101, 7, 8, 1012, 9, 1012, 102], vec![101, 5, 1012, 102]];
        let phrases = Phrases::new(&texts, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(phrases.places, [0, 0, 1, 2, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]);
        let within: Vec<Vec<Vec<f32>>> = phrases.within.to_vec3().unwrap();
        let seen = |text: usize, query: usize| -> Vec<usize> {
            (0..7).filter(|&key| within[text][query][key] == 0.0).collect()
        };
        assert_eq!((seen(0, 0), seen(0, 1), seen(0, 3)), (vec![0], vec![1, 2, 3], vec![1, 2, 3]));
        assert_eq!((seen(0, 5), seen(0, 6)), (vec![4, 5], vec![6]));
        assert_eq!((seen(1, 2), seen(1, 3), seen(1, 5)), (vec![1, 2], vec![3], vec![5]));
        let alone: Vec<Vec<Vec<f32>>> = phrases.tokens_alone.to_vec3().unwrap();
        assert_eq!(alone[1][0].iter().filter(|bias| **bias == 0.0).count(), 4);
    }
}

//! Language models in GGUF files (Qwen3 and Llama), on candle-transformers' quantised networks: a question to an answer.
//!
//! `gguf` opens a file, `chat` lays a question out as the model was taught, `choose` draws the tokens.

pub mod chat;
mod choose;
mod gguf;

use anyhow::{Result, anyhow, ensure};
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::{quantized_llama, quantized_qwen3};

pub use choose::Choice;

use self::chat::Format;
use crate::rng::Rng;

/// Answers questions. It reads one at a time.
pub struct LanguageModel {
    network: Network,
    tokenizer: tokenizers::Tokenizer,
    format: Format,
    ends: Vec<u32>,
    n_context: usize,
    device: Device,
}

/// Boxed: the networks are of unlike sizes.
enum Network {
    Qwen3(Box<quantized_qwen3::ModelWeights>),
    Llama(Box<quantized_llama::ModelWeights>),
}

/// What a model said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Without the token that ends it.
    pub text: String,
    /// It had not come to its end.
    pub is_cut: bool,
}

impl LanguageModel {
    /// The tokens of a question behind an instruction, up to where the answer begins.
    pub fn question(&self, instruction: &str, question: &str) -> Result<Vec<u32>> {
        let text = self.format.text(instruction, question);
        let encoded = self.tokenizer.encode(text, false).map_err(|error| anyhow!("{error}"))?;
        Ok(encoded.get_ids().to_vec())
    }

    /// The answer to a question behind an instruction; the same for the same `choice` and `seed`.
    pub fn answer(&mut self, instruction: &str, question: &str, choice: Choice, seed: u64) -> Result<Answer> {
        let question = self.question(instruction, question)?;
        let ends = self.ends.clone();
        let mut tokens = self.tokens(&question, choice, &ends, seed)?;
        let has_ended = tokens.last().is_some_and(|token| ends.contains(token));
        if has_ended {
            tokens.pop();
        }
        let text = self.tokenizer.decode(&tokens, true).map_err(|error| anyhow!("{error}"))?;
        Ok(Answer { text, is_cut: !has_ended })
    }

    /// New tokens behind others, up to and with one of `ends`.
    pub fn tokens(&mut self, behind: &[u32], choice: Choice, ends: &[u32], seed: u64) -> Result<Vec<u32>> {
        ensure!(
            behind.len() + choice.max_tokens <= self.n_context,
            "a question of {} tokens and an answer of {} are more than this model's {}",
            behind.len(),
            choice.max_tokens,
            self.n_context
        );
        let mut rng = Rng::new(seed, "language", 0);
        let mut new: Vec<u32> = Vec::new();
        let mut scores = self.scores(behind, 0)?;
        loop {
            let token = choice.token(&scores, &mut rng)?;
            new.push(token);
            if ends.contains(&token) || new.len() == choice.max_tokens {
                return Ok(new);
            }
            scores = self.scores(&[token], behind.len() + new.len() - 1)?;
        }
    }

    /// Scores of the token behind these, which follow the `n_read` that were read before; 0 begins anew.
    pub fn scores(&mut self, tokens: &[u32], n_read: usize) -> Result<Vec<f32>> {
        let tokens = Tensor::new(tokens, &self.device)?.unsqueeze(0)?; // [1, l]
        let scores = match &mut self.network {
            Network::Qwen3(network) => {
                if n_read == 0 {
                    network.clear_kv_cache();
                }
                network.forward(&tokens, n_read)?
            }
            // It begins anew by itself.
            Network::Llama(network) => network.forward(&tokens, n_read)?,
        };
        Ok(scores.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    }

    /// Text of tokens, special ones left out.
    pub fn text(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens, true).map_err(|error| anyhow!("{error}"))
    }
}

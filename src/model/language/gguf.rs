//! Opening a GGUF file: which network it holds, its tokenizer, how it chats.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::tokenizer::TokenizerFromGguf as _;
use candle_transformers::models::{quantized_llama, quantized_qwen3};
use tokenizers::Tokenizer;

use super::chat::Format;
use super::{LanguageModel, Network};

/// Ways to split words that the reader of tokenizers knows, and what it calls them.
const SPLITS: [(&str, &str); 6] = [
    ("qwen2", "qwen2"),
    ("llama-bpe", "llama3"),
    ("llama3", "llama3"),
    ("smaug-bpe", "smaug-bpe"),
    ("gpt-2", "gpt-2"),
    ("default", "gpt-2"),
];
const SPLIT: &str = "tokenizer.ggml.pre";

impl LanguageModel {
    /// Opens a GGUF file. Its tokenizer is `tokenizer.json` beside it, or else the file's own.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        Self::read(path, device).with_context(|| path.display().to_string())
    }

    fn read(path: &Path, device: &Device) -> Result<Self> {
        // Each tensor is read into its place; the file is not held in memory beside them.
        let mut reader = BufReader::new(File::open(path)?);
        let mut content = Content::read(&mut reader).map_err(|error| anyhow!("is no readable GGUF file ({error})"))?;
        let tokenizer = tokenizer(path, &mut content)?;
        let has_token = |token: &str| tokenizer.token_to_id(token).is_some();
        let Some(format) = Format::of(has_token, text(&content, "tokenizer.chat_template")) else {
            bail!(
                "was not taught to chat in a way that is known (ChatML as Qwen, or Llama 3); take an instruct model such as \
                 Qwen/Qwen3-4B-GGUF"
            );
        };
        let named = number(&content, "tokenizer.ggml.eos_token_id");
        let ends = format.ends().iter().filter_map(|token| tokenizer.token_to_id(token)).chain(named).collect();
        let architecture = text(&content, "general.architecture").unwrap_or("nothing").to_owned();
        let n_told = number(&content, &format!("{architecture}.context_length")).unwrap_or(2048) as usize;
        let (network, n_context) = match architecture.as_str() {
            "qwen3" => {
                // The rotary angles would be computed in half precision otherwise.
                content.metadata.insert("general.dtype".into(), Value::U32(0));
                let network = quantized_qwen3::ModelWeights::from_gguf(content, &mut reader, device)?;
                (Network::Qwen3(Box::new(network)), n_told)
            }
            "llama" => {
                let network = quantized_llama::ModelWeights::from_gguf(content, &mut reader, device)?;
                (Network::Llama(Box::new(network)), n_told.min(quantized_llama::MAX_SEQ_LEN))
            }
            other => bail!("is a {other}; of GGUF files those of qwen3 and llama are read"),
        };
        Ok(Self { network, tokenizer, format, ends, n_context, device: device.clone() })
    }
}

fn tokenizer(path: &Path, content: &mut Content) -> Result<Tokenizer> {
    let beside = path.with_file_name("tokenizer.json");
    if beside.is_file() {
        return Tokenizer::from_file(&beside).map_err(|error| anyhow!("{}: {error}", beside.display()));
    }
    let kind = text(content, "tokenizer.ggml.model").unwrap_or("none").to_owned();
    let split = text(content, SPLIT).unwrap_or("default").to_owned();
    let known = SPLITS.iter().find(|(name, _)| *name == split).map(|(_, known)| *known);
    match known.filter(|_| kind == "gpt2") {
        Some(known) => {
            content.metadata.insert(SPLIT.into(), Value::String(known.into()));
            Ok(Tokenizer::from_gguf(content)?)
        }
        None => bail!(
            "has a tokenizer ({kind}, {split}) that cannot be read from it; put the tokenizer.json of the model that it was \
             made from beside it"
        ),
    }
}

fn text<'a>(content: &'a Content, key: &str) -> Option<&'a str> {
    // What is missing and what is no text are alike to all who ask.
    content.metadata.get(key)?.to_string().ok().map(String::as_str)
}

fn number(content: &Content, key: &str) -> Option<u32> {
    // As above.
    content.metadata.get(key)?.to_u32().ok()
}

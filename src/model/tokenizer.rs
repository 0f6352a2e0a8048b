//! CLIP's byte-level BPE tokenizer, from `vocab.json` + `merges.txt` or `tokenizer.json`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, ensure};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence, replace::ReplacePattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::files::Files;

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// Words of a prompt: special tokens, English contractions, letters, single digits, other signs (OpenAI CLIP's
/// `simple_tokenizer.py`).
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Text to tokens of one length.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    start: u32,
    end: u32,
    pad: u32,
    length: usize,
}

/// The tokens of a prompt, and what did not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Start, text, end, padding: always the encoder's length.
    pub tokens: Vec<u32>,
    /// The end of the text that was cut off.
    pub cut: Option<String>,
}

impl Tokenizer {
    /// Reads `tokenizer/` of a model; prompts are cut and padded to `length` tokens.
    pub fn read(files: &Files, length: usize) -> Result<Self> {
        Self::read_from(files, "tokenizer", length)
    }

    /// [`Tokenizer::read`] from another folder of the model, such as `tokenizer_2`.
    pub fn read_from(files: &Files, folder: &str, length: usize) -> Result<Self> {
        let name = |file: &str| format!("{folder}/{file}");
        ensure!(
            length > 2,
            "text encoder config: max_position_embeddings {length} leaves no room for text; at least 3"
        );
        let inner = if files.contains(&name("vocab.json")) {
            from_vocabulary(&files.text(&name("vocab.json"))?, &files.text(&name("merges.txt"))?)
        } else {
            let json = files.bytes(&name("tokenizer.json"))?;
            tokenizers::Tokenizer::from_bytes(&json).map_err(|error| anyhow!("{error}"))
        };
        let mut inner = inner.with_context(|| files.describe(folder))?;
        // Padding and truncation that a tokenizer.json may bring are ours to do.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| anyhow!("{error}"))?;
        let pad_token = read_pad_token(files, folder)?;
        // transformers makes a special token of it, which stands alone wherever it is in a text: where texts are padded with
        // `!`, a `!` in a text is that token and not the sign that ends a word.
        if pad_token != END && inner.token_to_id(&pad_token).is_some() {
            let special = AddedToken::from(pad_token.clone(), true);
            inner.add_special_tokens([special]).map_err(|error| anyhow!("{error}"))?;
        }
        let id = |token: &str| {
            inner.token_to_id(token).with_context(|| format!("{}: no token {token}", files.describe(folder)))
        };
        let (start, end, pad) = (id(START)?, id(END)?, id(&pad_token)?);
        Ok(Self { inner, start, end, pad, length })
    }

    /// Tokens of `prompt`; of a prompt that is too long the end is cut off and named.
    pub fn encode(&self, prompt: &str) -> Result<Prompt> {
        let encoding = self.inner.encode(prompt, false).map_err(|error| anyhow!("prompt {prompt:?}: {error}"))?;
        let room = self.length - 2;
        let ids = encoding.get_ids();
        let cut = (ids.len() > room).then(|| {
            // Offsets count from the normalised prompt's characters; decoding the rest shows what was really lost.
            self.inner.decode(&ids[room..], false).unwrap_or_default().replace("</w>", " ").trim().to_string()
        });
        let mut tokens = vec![self.start];
        tokens.extend(ids.iter().take(room));
        tokens.push(self.end);
        tokens.resize(self.length, self.pad);
        Ok(Prompt { tokens, cut })
    }
}

fn from_vocabulary(vocab: &str, merges: &str) -> Result<tokenizers::Tokenizer> {
    let vocab: BTreeMap<String, u32> = serde_json::from_str(vocab).context("vocab.json")?;
    let merges = merges
        .lines()
        .filter(|line| !line.starts_with("#version") && !line.trim().is_empty())
        .map(|line| match line.split_once(' ') {
            Some((a, b)) => Ok((a.to_string(), b.trim_end().to_string())),
            None => Err(anyhow!("merges.txt: line {line:?} is not a pair")),
        })
        .collect::<Result<Vec<_>>>()?;
    let bpe = BPE::builder()
        .vocab_and_merges(Vocab::from_iter(vocab), merges)
        .unk_token(END.into())
        .end_of_word_suffix("</w>".into())
        .build()
        .map_err(|error| anyhow!("{error}"))?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(|error| anyhow!("{error}"))?;
    tokenizer
        .with_normalizer(Some(Sequence::new(vec![NFC.into(), spaces.into(), Lowercase.into()])))
        .map_err(|error| anyhow!("{error}"))?;
    let words = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true)
        .map_err(|error| anyhow!("{error}"))?;
    let bytes = ByteLevel::new(false, true, false);
    tokenizer.with_pre_tokenizer(Some(PreSequence::new(vec![words.into(), bytes.into()])));
    tokenizer.with_decoder(Some(bytes));
    // As CLIP's own files have them: sought in the normalised text, so that capitals make no difference.
    tokenizer
        .add_special_tokens([START, END].map(|token| AddedToken::from(token, true).normalized(true)))
        .map_err(|error| anyhow!("{error}"))?;
    Ok(tokenizer)
}

/// `pad_token` of either file, a string or an object with `content`; SD1's is the end token, that of SD2 and of SDXL's second
/// tokenizer `!`. Folders without it are padded with the end token.
fn read_pad_token(files: &Files, folder: &str) -> Result<String> {
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let name = format!("{folder}/{name}");
        if !files.contains(&name) {
            continue;
        }
        let config: serde_json::Value = files.json(&name)?;
        let token = &config["pad_token"];
        if let Some(token) = token.as_str().or_else(|| token["content"].as_str()) {
            return Ok(token.to_owned());
        }
    }
    Ok(END.into())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// The toybox's words, with these files beside them.
    fn tokenizer(beside: &[(&str, &str)]) -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("tokenizer");
        std::fs::create_dir(&own).unwrap();
        let toybox = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/toybox/architecture/tokenizer");
        for name in ["vocab.json", "merges.txt"] {
            std::fs::copy(toybox.join(name), own.join(name)).unwrap();
        }
        for (name, text) in beside {
            std::fs::write(own.join(name), text).unwrap();
        }
        Tokenizer::read(&Files::Folder(folder.path().to_owned()), 20).unwrap()
    }

    #[test]
    fn the_padding_is_read_from_the_first_file_that_tells_it() {
        let last = |beside: &[(&str, &str)]| *tokenizer(beside).encode("a robot").unwrap().tokens.last().unwrap();
        let end = last(&[]);
        let sign = r#"{"pad_token": "!"}"#;
        let exclamation = last(&[("tokenizer_config.json", sign)]);
        assert_ne!(exclamation, end);
        assert_eq!(last(&[("tokenizer_config.json", r#"{"pad_token": {"content": "!"}}"#)]), exclamation);
        assert_eq!(last(&[("tokenizer_config.json", "{}"), ("special_tokens_map.json", sign)]), exclamation);
        let own = r#"{"pad_token": "<|endoftext|>"}"#;
        assert_eq!(last(&[("tokenizer_config.json", own), ("special_tokens_map.json", sign)]), end);
    }

    /// With `!` as padding it was once lost from what the user is shown.
    #[test]
    fn what_is_cut_off_is_named_with_its_exclamation_marks() {
        let long = format!("{} to the beach!", "a robot ".repeat(10));
        for beside in [&[][..], &[("tokenizer_config.json", r#"{"pad_token": "!"}"#)]] {
            let cut = tokenizer(beside).encode(&long).unwrap().cut.unwrap();
            assert!(cut.replace(' ', "").ends_with("beach!"), "{cut}");
        }
    }
}

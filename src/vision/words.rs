//! BERT's WordPiece tokenizer, from `tokenizer.json` or `vocab.txt`.

use anyhow::{Context as _, Result, anyhow};
use tokenizers::Tokenizer;
use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::bpe::Vocab;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;

use crate::model::Files;

/// Text to tokens and back.
pub struct Words(Tokenizer);

impl Words {
    /// Reads the tokenizer at the top of a model's folder.
    pub fn read(files: &Files) -> Result<Self> {
        let name = if files.contains("tokenizer.json") { "tokenizer.json" } else { "vocab.txt" };
        let tokenizer = match name {
            "vocab.txt" => from_vocabulary(&files.text(name)?),
            _ => Tokenizer::from_bytes(files.bytes(name)?).map_err(|error| anyhow!("{error}")),
        };
        let mut tokenizer = tokenizer.with_context(|| files.describe(name))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| anyhow!("{error}"))?;
        Ok(Self(tokenizer))
    }

    /// `[CLS]`, the text, `[SEP]`.
    pub fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.0.encode(text, true).map_err(|error| anyhow!("phrase {text:?}: {error}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of some tokens.
    pub fn text(&self, tokens: &[u32]) -> Result<String> {
        self.0.decode(tokens, false).map_err(|error| anyhow!("tokens {tokens:?}: {error}"))
    }
}

/// A token a line, numbered from 0; everything in lower case and without accents.
fn from_vocabulary(vocabulary: &str) -> Result<Tokenizer> {
    let vocab: Vocab = (0..).zip(vocabulary.lines()).map(|(id, token)| (token.trim_end().to_owned(), id)).collect();
    let model = WordPiece::builder().vocab(vocab).unk_token("[UNK]".into()).build();
    let mut tokenizer = Tokenizer::new(model.map_err(|error| anyhow!("{error}"))?);
    let id = |token: &str| {
        let id = tokenizer.token_to_id(token).with_context(|| format!("no token {token}; is it BERT's vocabulary?"))?;
        Ok::<_, anyhow::Error>((token.to_owned(), id))
    };
    let ends = BertProcessing::new(id("[SEP]")?, id("[CLS]")?);
    tokenizer.with_normalizer(Some(BertNormalizer::default())).map_err(|error| anyhow!("{error}"))?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer)).with_post_processor(Some(ends));
    tokenizer.with_decoder(Some(WordPieceDecoder::default()));
    let special = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"].map(|token| tokenizers::AddedToken::from(token, true));
    tokenizer.add_special_tokens(special).map_err(|error| anyhow!("{error}"))?;
    Ok(tokenizer)
}

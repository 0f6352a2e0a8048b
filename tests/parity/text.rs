//! CLIP's text encoder and tokenizer against transformers.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use jedi::model::{Files, TextConfig, TextEncoder, Tokenizer, text::HiddenAct};
use jedi::ops;
use serde::Deserialize;

use crate::compare::Comparison;
use crate::golden::{Golden, compare_digests, compare_gradients, gradients, path, pipeline_part};

/// The encoder's context and every gradient of mean(context·direction).
fn encode(case: &Golden, hidden_act: HiddenAct, comparison: &mut Comparison) -> BTreeMap<String, Tensor> {
    let (config, weights) = pipeline_part::<TextConfig>("text_encoder", "model");
    let config = TextConfig { hidden_act, ..config };
    let (text, vars) = TextEncoder::new(&config, weights.params("text_encoder")).unwrap();
    let context = text.forward(&case.tensor("tokens").to_dtype(DType::U32).unwrap()).unwrap();
    comparison.tensor("context", &context, case.tensor("context"), case.fact("tolerance"));
    let loss = ops::mean_all(&ops::mul(&context, case.tensor("direction")).unwrap()).unwrap();
    gradients(&vars, &ops::backward(loss).unwrap(), comparison)
}

#[test]
fn text_encoder_is_transformers() {
    let case = Golden::open("text-quick-gelu");
    let mut comparison = Comparison::default();
    let found = encode(&case, HiddenAct::QuickGelu, &mut comparison);
    compare_gradients(&mut comparison, &found, &case.below("grad."), case.fact("gradient_tolerance"));
    comparison.finish();
}

#[test]
fn text_encoder_with_exact_gelu_is_transformers() {
    let case = Golden::open("text-gelu");
    let mut comparison = Comparison::default();
    let found = encode(&case, HiddenAct::Gelu, &mut comparison);
    let tolerance = case.fact("gradient_tolerance");
    compare_digests(&mut comparison, "gelu", &found, case.tensor("gradients"), tolerance);
    comparison.finish();
}

#[derive(Deserialize)]
struct Tokens {
    text: String,
    /// Whether transformers' tokenizer in Python agrees with the one in Rust, whose ids these are.
    slow: bool,
    ids: Vec<u32>,
    /// Of a tokenizer that pads with `!`, which is then a token of its own inside texts too.
    ids_2: Vec<u32>,
}

fn check_tokens(tokenizer: &Tokenizer, expected: fn(&Tokens) -> &[u32]) {
    let cases = std::fs::read_to_string(path("tokens.json")).unwrap();
    let cases: Vec<Tokens> = serde_json::from_str(&cases).unwrap();
    let wrong: Vec<String> = cases
        .iter()
        .filter_map(|case| match tokenizer.encode(&case.text).unwrap().tokens {
            tokens if tokens == expected(case) => None,
            tokens => Some(format!("{:?} (slow agrees: {})\n{tokens:?}\n{:?}", case.text, case.slow, expected(case))),
        })
        .collect();
    assert!(cases.len() >= 30 && wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn token_ids_are_transformers() {
    check_tokens(&Tokenizer::read(&Files::Folder(path("tiny-pipeline")), 77).unwrap(), |case| &case.ids);
}

/// The story: `!` was read as the sign that ends a word, where transformers reads the padding token.
#[test]
fn token_ids_of_a_tokenizer_that_pads_with_a_sign_are_transformers() {
    let tokenizer = Tokenizer::read_from(&Files::Folder(path("tiny-xl")), "tokenizer_2", 77).unwrap();
    check_tokens(&tokenizer, |case| &case.ids_2);
}

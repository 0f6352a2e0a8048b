//! Language models in GGUF files against transformers: tokens of a chat, scores, what greed finds. Qwen3 in half precision,
//! Llama in eight bits.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use jedi::model::language::{Choice, LanguageModel};
use serde::Deserialize;

use crate::compare::{Comparison, values};
use crate::golden::{Golden, path};

#[derive(Deserialize)]
struct Facts {
    tolerance: f64,
    text: String,
}

fn check(kind: &str) {
    let golden = Golden::open("language");
    let facts: BTreeMap<String, Facts> = golden.fact("models");
    let (system, user): (String, String) = (golden.fact("system"), golden.fact("user"));
    let mut model = LanguageModel::open(&path(&format!("{kind}.gguf")), &Device::Cpu).unwrap();
    let integers = |name: &str| -> Vec<u32> {
        let tensor: &Tensor = golden.tensor(&format!("{kind}.{name}"));
        tensor.flatten_all().unwrap().to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect()
    };
    let question = model.question(&system, &user).unwrap();
    assert_eq!(question, integers("ids"));
    let mut comparison = Comparison::default();
    let expected = values(golden.tensor(&format!("{kind}.logits")));
    // Twice: what was read before must not matter.
    for time in ["first", "second"] {
        let scores: Vec<f64> = model.scores(&question, 0).unwrap().into_iter().map(f64::from).collect();
        comparison.values(&format!("{kind} scores, {time} time"), &scores, &expected, (facts[kind].tolerance, 0.0));
    }
    comparison.finish();
    let greedy = integers("greedy");
    let choice = Choice { temperature: 0.0, top_p: 1.0, max_tokens: greedy.len() };
    let found = model.tokens(&question, choice, &[], 0).unwrap();
    assert_eq!(found, greedy);
    assert_eq!(model.text(&found).unwrap(), facts[kind].text);
    let answer = model.answer(&system, &user, choice, 0).unwrap();
    assert_eq!((answer.text, answer.is_cut), (facts[kind].text.clone(), true));
    // Chance depends on the seed alone.
    let choice = Choice { temperature: 2.0, ..choice };
    let mut drawn = |seed| model.tokens(&question, choice, &[], seed).unwrap();
    assert_eq!(drawn(1), drawn(1));
    assert_ne!(drawn(1), drawn(2));
    let error = model.answer(&system, &user, Choice { max_tokens: 2040, ..choice }, 0).unwrap_err().to_string();
    assert!(error.contains("more than this model's 2048"), "{error}");
}

#[test]
fn qwen3_is_transformers() {
    check("qwen3");
}

#[test]
fn llama_is_transformers() {
    check("llama");
}

#[test]
fn files_that_are_no_language_model_are_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let message = |name: &str| {
        let error = LanguageModel::open(&folder.path().join(name), &Device::Cpu).err().expect("a refusal");
        format!("{error:#}")
    };
    std::fs::write(folder.path().join("text.gguf"), "hello, this is no model").unwrap();
    assert!(message("text.gguf").contains("text.gguf: is no readable GGUF file"));
    let whole = std::fs::read(path("qwen3.gguf")).unwrap();
    std::fs::write(folder.path().join("cut.gguf"), &whole[..whole.len() / 2]).unwrap();
    assert!(message("cut.gguf").starts_with(&folder.path().display().to_string()));
    for (name, from, to, part) in [
        ("other.gguf", "llama-bpe", "lamma-bpe", "put the tokenizer.json"),
        ("mute.gguf", "<|eot_id|>", "<|eat_id|>", "was not taught to chat"),
    ] {
        let bytes = std::fs::read(path("llama.gguf")).unwrap();
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let changed = [&bytes[..at], to.as_bytes(), &bytes[at + to.len()..]].concat();
        std::fs::write(folder.path().join(name), changed).unwrap();
        assert!(message(name).contains(part), "{}", message(name));
    }
}

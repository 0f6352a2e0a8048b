//! Reading the files in `tests/golden/`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use jedi::model::params::{NamedVars, Params};
use jedi::ops::Gradients;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::compare::{Comparison, values};

/// One file: tensors by name, and the facts in its metadata.
pub struct Golden {
    pub tensors: BTreeMap<String, Tensor>,
    facts: Map<String, Value>,
}

pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

impl Golden {
    /// Opens `tests/golden/<name>.safetensors`.
    pub fn open(name: &str) -> Self {
        let bytes = std::fs::read(path(name).with_extension("safetensors")).expect(name);
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect(name);
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).expect(name);
        // Only what the script wrote has facts, not the networks' weights.
        let facts = header.metadata().as_ref().and_then(|metadata| metadata.get("facts"));
        let facts = facts.map(|facts| serde_json::from_str(facts).expect(name)).unwrap_or_default();
        Self { tensors: tensors.into_iter().collect(), facts }
    }

    pub fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// The tensors below `prefix`, by the rest of their names.
    pub fn below(&self, prefix: &str) -> BTreeMap<String, Tensor> {
        let tensors = self.tensors.iter();
        tensors.filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_owned(), tensor.clone()))).collect()
    }

    /// One of the facts in the metadata.
    pub fn fact<T: DeserializeOwned>(&self, name: &str) -> T {
        serde_json::from_value(self.facts[name].clone()).expect(name)
    }

    /// The tensors as trainable parameters of a network.
    pub fn params(&self, origin: &str) -> Params {
        params(self.tensors.clone(), origin)
    }
}

pub fn params(tensors: BTreeMap<String, Tensor>, origin: &str) -> Params {
    Params::checkpoint(tensors, origin, &Device::Cpu, candle_core::DType::F32, true)
}

/// A part of the pipeline folder: its `config.json` and its weights.
pub fn pipeline_part<T: DeserializeOwned>(part: &str, file: &str) -> (T, Golden) {
    part_of("tiny-pipeline", part, file)
}

/// [`pipeline_part`] of another pipeline folder.
pub fn part_of<T: DeserializeOwned>(pipeline: &str, part: &str, file: &str) -> (T, Golden) {
    let folder = format!("{pipeline}/{part}");
    let config = std::fs::read_to_string(path(&folder).join("config.json")).expect(part);
    (serde_json::from_str(&config).expect(part), Golden::open(&format!("{folder}/{file}")))
}

/// Every trainable parameter's gradient.
pub fn gradients(vars: &NamedVars, store: &Gradients, comparison: &mut Comparison) -> BTreeMap<String, Tensor> {
    let mut found = BTreeMap::new();
    for (name, var) in vars {
        match store.get(var) {
            Some(gradient) => drop(found.insert(name.clone(), gradient.clone())),
            None => comparison.fail(format!("{name}: no gradient")),
        }
    }
    found
}

/// Whole gradients, each within `tolerance` of its own largest magnitude.
pub fn compare_gradients(
    comparison: &mut Comparison,
    found: &BTreeMap<String, Tensor>,
    expected: &BTreeMap<String, Tensor>,
    tolerance: f64,
) {
    comparison.names("gradients", found, expected);
    for (name, expected_gradient) in expected {
        let Some(gradient) = found.get(name) else { continue };
        let scale = query_of(name).map_or(0.0, |query| {
            values(&expected[&query]).into_iter().fold(0.0, |scale: f64, value| scale.max(value.abs()))
        });
        comparison.tensor_at_scale(name, gradient, expected_gradient, tolerance, scale);
    }
}

/// The name of the query's bias for that of a key. A key's bias adds the same to all scores of a query, so its gradient
/// is zero but for rounding; it is held to the scale of the query's.
fn query_of(key: &str) -> Option<String> {
    let pairs = [("to_k.bias", "to_q.bias"), ("key.bias", "query.bias"), ("k_proj.bias", "q_proj.bias")];
    pairs.iter().find_map(|(key_end, query_end)| Some(format!("{}{query_end}", key.strip_suffix(key_end)?)))
}

/// Gradients against `digest` of `scripts/golden/files.py`: rows of norm, sum and first values, by sorted name.
pub fn compare_digests(
    comparison: &mut Comparison,
    case: &str,
    found: &BTreeMap<String, Tensor>,
    expected: &Tensor,
    tolerance: f64,
) {
    let expected: Vec<Vec<f32>> = expected.to_vec2().expect("a matrix");
    assert_eq!(found.len(), expected.len(), "{case}: number of gradients");
    let norms: BTreeMap<&str, f64> =
        found.keys().map(String::as_str).zip(expected.iter().map(|row| row[0] as f64)).collect();
    for ((name, gradient), row) in found.iter().zip(&expected) {
        let row: Vec<f64> = row.iter().map(|&v| v as f64).collect();
        let scale = query_of(name).map_or(row[0], |query| norms[query.as_str()]);
        let gradient = values(gradient);
        let norm = gradient.iter().map(|v| v * v).sum::<f64>().sqrt();
        let sum = gradient.iter().sum::<f64>();
        let first: Vec<f64> = (2..row.len()).map(|i| gradient.get(i - 2).copied().unwrap_or(0.0)).collect();
        let count = gradient.len() as f64;
        comparison.values(&format!("{case}.{name} norm"), &[norm], &row[..1], (tolerance, scale));
        // A sum of n values with independent errors of up to tolerance·norm/√n each.
        comparison.values(&format!("{case}.{name} sum"), &[sum], &row[1..2], (tolerance, scale * count.sqrt()));
        comparison.values(&format!("{case}.{name} first values"), &first, &row[2..], (tolerance, scale / count.sqrt()));
    }
}

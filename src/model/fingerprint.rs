//! What tells one set of weights from another, whatever files they lie in.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::Tensor;
use safetensors::View;
use serde::Serialize;

use crate::sha256::sha256_hex;

/// SHA-256 of a component's config and of the names, types, shapes and values of its tensors. Splitting a file into shards,
/// or other metadata in it, changes nothing.
pub fn fingerprint(config: &impl Serialize, tensors: &BTreeMap<String, Tensor>) -> Result<String> {
    let mut list = serde_json::to_string(config)?;
    for (name, tensor) in tensors {
        let (dtype, shape) = (tensor.dtype(), tensor.dims());
        list += &format!("\n{name} {dtype:?} {shape:?} {}", sha256_hex(&View::data(&tensor)));
    }
    Ok(sha256_hex(list.as_bytes()))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn every_difference_counts() {
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let of = |config: &str, name: &str, tensor: Tensor| {
            fingerprint(&config, &[(name.to_owned(), tensor)].into()).unwrap()
        };
        let same = of("c", "a", tensor(&[1.0, 2.0]));
        assert_eq!(same, of("c", "a", tensor(&[1.0, 2.0])));
        let others = [
            of("d", "a", tensor(&[1.0, 2.0])),
            of("c", "b", tensor(&[1.0, 2.0])),
            of("c", "a", tensor(&[1.0, 2.0000002])),
            of("c", "a", tensor(&[1.0, 2.0]).reshape((1, 2)).unwrap()),
        ];
        assert!(others.iter().all(|other| *other != same));
    }
}

//! Files of low-rank adapters as they are passed around: kohya's names (`lora_unet_….lora_down.weight`, with `alpha`), and
//! diffusers' and peft's (`unet.….lora_A.weight`, `….lora.down.weight`, `….processor.to_q_lora.down.weight`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::{DType, Tensor};

use super::adapters::{DOWN, UP, merged};
use super::files::read_safetensors;
use super::weights::Weights;
use super::write::write_tensors;
use crate::invalid::invalid;

/// Ways to say A, and the same for B.
const PAIRS: [(&str, &str); 5] = [
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
];

/// How kohya's names of a component begin.
const KOHYA: [(&str, &str); 4] = [
    ("lora_unet_", "unet"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
];

/// The adapters in a file.
#[derive(Debug)]
pub struct LoraFile {
    path: PathBuf,
    /// By component and layer, the layer's dots as underscores (kohya's names do not tell the two apart).
    adapters: BTreeMap<(String, String), Change>,
}

#[derive(Debug)]
struct Change {
    /// As the file calls it.
    name: String,
    down: Tensor,
    up: Tensor,
    /// alpha/rank.
    scale: f64,
}

impl LoraFile {
    /// Reads a file; what is no low-rank adapter of a known kind is refused.
    pub fn open(path: &Path) -> Result<Self> {
        let mut tensors = read_safetensors(path)?;
        let file = path.display();
        let names: Vec<(String, &str, &str)> = tensors
            .keys()
            .filter_map(|name| {
                PAIRS.iter().find_map(|(down, up)| Some((name.strip_suffix(down)?.to_owned(), *down, *up)))
            })
            .collect();
        let mut adapters = BTreeMap::new();
        for (name, down, up) in names {
            let mut take = |suffix: &str| {
                let tensor = tensors.remove(&format!("{name}{suffix}"));
                tensor.with_context(|| format!("{file}: tensor {name}{suffix} is missing"))
            };
            let (down, up) = (take(down)?, take(up)?);
            ensure!(down.rank() >= 2 && up.rank() >= 2, "{file}: {name}: an adapter has two matrices");
            let rank = down.dim(0)? as f64;
            let alpha = match tensors.remove(&format!("{name}.alpha")) {
                Some(alpha) => alpha.to_dtype(DType::F64)?.flatten_all()?.get(0)?.to_scalar::<f64>()?,
                None => rank,
            };
            let key = place(&name).ok_or_else(|| {
                invalid(format!("{file}: {name} is of no known part (unet, text_encoder, lora_unet_, lora_te_)"))
            })?;
            adapters.insert(key, Change { name, down, up, scale: alpha / rank });
        }
        if let Some(other) = tensors.keys().next() {
            return Err(invalid(format!(
                "{file}: tensor {other} belongs to no low-rank adapter; DoRA, LoHa, LoKr and embeddings are not supported"
            )));
        }
        if adapters.is_empty() {
            return Err(invalid(format!("{file}: holds no low-rank adapters (LoRA)")));
        }
        Ok(Self { path: path.to_owned(), adapters })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Merges what belongs to this component into its weights, `strength` times.
    pub fn merge_into(&self, weights: &mut Weights, component: &str, strength: f64) -> Result<()> {
        for (layer, change) in self.of(weights, component) {
            let Some(change) = change else { continue };
            let weight = weights.load(&layer)?;
            let merged = merged(&weight, &change.down, &change.up, strength * change.scale)
                .with_context(|| format!("{}: {}", self.path.display(), change.name))?;
            weights.insert(layer, merged);
        }
        Ok(())
    }

    /// Refuses a file with an adapter for a layer that none of these components has.
    pub fn check(&self, components: &[(&str, Weights)]) -> Result<()> {
        let mut known: Vec<&str> = vec![];
        for (component, weights) in components {
            known.extend(self.of(weights, component).into_iter().filter_map(|(_, change)| Some(&*change?.name)));
        }
        let strangers: Vec<&str> =
            self.adapters.values().map(|change| &*change.name).filter(|name| !known.contains(name)).collect();
        match strangers.first() {
            None => Ok(()),
            Some(first) => bail!(
                "{}: {} of its {} adapters are for layers that this model does not have, the first is {first}; it was made \
                 for another kind of model",
                self.path.display(),
                strangers.len(),
                self.adapters.len()
            ),
        }
    }

    /// The weights of a component with their adapters.
    fn of(&self, weights: &Weights, component: &str) -> Vec<(String, Option<&Change>)> {
        let layers = weights.tensors().keys().filter_map(|name| Some((name, name.strip_suffix(".weight")?)));
        let change = |layer: &str| self.adapters.get(&(component.to_owned(), layer.replace('.', "_")));
        layers.map(|(name, layer)| (name.clone(), change(layer))).collect()
    }
}

/// Component and layer of an adapter's name, dots as underscores.
fn place(name: &str) -> Option<(String, String)> {
    for (start, component) in KOHYA {
        if let Some(layer) = name.strip_prefix(start) {
            return Some((component.to_owned(), layer.to_owned()));
        }
    }
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    let (component, layer) = name.split_once('.')?;
    if !["unet", "text_encoder", "text_encoder_2"].contains(&component) {
        return None;
    }
    // Old diffusers: `attn1.processor.to_out` stands for `attn1.to_out.0`.
    let layer = match layer.split_once(".processor.") {
        Some((block, "to_out")) => format!("{block}.to_out.0"),
        Some((block, own)) => format!("{block}.{own}"),
        None => layer.to_owned(),
    };
    Some((component.to_owned(), layer.replace('.', "_")))
}

/// Writes adapters (by `component.layer.lora_A.weight` and `…lora_B.weight`) in both ways: `pytorch_lora_weights.safetensors`
/// as diffusers' `load_lora_weights` takes it, alpha/rank inside B; and `kohya.safetensors`.
pub fn write_lora(folder: &Path, adapters: &BTreeMap<String, Tensor>, rank: usize, alpha: f64) -> Result<()> {
    let (mut ours, mut kohya) = (BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in adapters {
        let Some((layer, is_down)) = name
            .strip_suffix(DOWN)
            .map(|layer| (layer, true))
            .or_else(|| name.strip_suffix(UP).map(|layer| (layer, false)))
        else {
            continue;
        };
        let own = if is_down { tensor.clone() } else { (tensor * (alpha / rank as f64))? };
        ours.insert(name.clone(), own);
        let (component, layer) = layer.trim_end_matches('.').split_once('.').context("a component and a layer")?;
        let start = KOHYA.iter().find(|(_, known)| *known == component).context("a known component")?.0;
        let layer = format!("{start}{}", layer.replace('.', "_"));
        kohya.insert(format!("{layer}.lora_{}.weight", if is_down { "down" } else { "up" }), tensor.clone());
        kohya.insert(format!("{layer}.alpha"), Tensor::new(alpha as f32, tensor.device())?);
    }
    write_tensors(&folder.join("pytorch_lora_weights.safetensors"), &ours, &[])?;
    let metadata = [
        ("ss_network_module", "networks.lora".to_owned()),
        ("ss_network_dim", rank.to_string()),
        ("ss_network_alpha", alpha.to_string()),
    ];
    write_tensors(&folder.join("kohya.safetensors"), &kohya, &metadata)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::invalid::is_invalid;
    use crate::rng::Rng;

    const LAYER: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0";

    fn tensor(shape: &[usize]) -> Tensor {
        Rng::new(1, "lora", shape[0] as u64).normal_tensor(shape).unwrap()
    }

    fn weights() -> Weights {
        Weights::in_memory("unet", [(format!("{LAYER}.weight"), tensor(&[6, 4]))].into())
    }

    fn open(names: &[(String, Tensor)]) -> Result<LoraFile> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lora.safetensors");
        write_tensors(&path, &names.iter().cloned().collect(), &[]).unwrap();
        LoraFile::open(&path)
    }

    fn merged_by(file: &LoraFile, strength: f64) -> Vec<f32> {
        let mut weights = weights();
        file.check(&[("unet", weights.clone())]).unwrap();
        file.merge_into(&mut weights, "unet", strength).unwrap();
        weights.load(&format!("{LAYER}.weight")).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn all_ways_to_name_an_adapter_mean_the_same() {
        let (down, up) = (tensor(&[2, 4]), tensor(&[6, 2]));
        let kohya = format!("lora_unet_{}", LAYER.replace('.', "_"));
        let old = format!("unet.{}.processor.to_out", LAYER.strip_suffix(".to_out.0").unwrap());
        let mut all = vec![];
        for (start, pair) in [
            (kohya, 0),
            (format!("unet.{LAYER}"), 1),
            (format!("base_model.model.unet.{LAYER}"), 1),
            (format!("unet.{LAYER}"), 2),
            (old, 4),
        ] {
            let names = [
                (format!("{start}{}", PAIRS[pair].0), down.clone()),
                (format!("{start}{}", PAIRS[pair].1), up.clone()),
            ];
            all.push(merged_by(&open(&names).unwrap(), 0.5));
        }
        let expected: Vec<f32> =
            merged(&tensor(&[6, 4]), &down, &up, 0.5).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert!(all.iter().all(|found| *found == expected));
    }

    #[test]
    fn what_is_written_reads_back_as_the_same_change() {
        let (down, up) = (tensor(&[2, 4]), tensor(&[6, 2]));
        let adapters = [(format!("unet.{LAYER}.{DOWN}"), down.clone()), (format!("unet.{LAYER}.{UP}"), up.clone())];
        let folder = tempfile::tempdir().unwrap();
        write_lora(folder.path(), &adapters.into(), 2, 3.0).unwrap();
        let expected: Vec<f32> =
            merged(&tensor(&[6, 4]), &down, &up, 1.5).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        for name in ["pytorch_lora_weights.safetensors", "kohya.safetensors"] {
            let found = merged_by(&LoraFile::open(&folder.path().join(name)).unwrap(), 1.0);
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{name}");
        }
    }

    #[test]
    fn files_that_are_no_adapters_of_this_model_are_refused_by_name() {
        let pair = |start: &str| {
            [(format!("{start}.lora_A.weight"), tensor(&[2, 4])), (format!("{start}.lora_B.weight"), tensor(&[6, 2]))]
        };
        let file = open(&pair("unet.no_such.layer")).unwrap();
        let error = format!("{:#}", file.check(&[("unet", weights())]).unwrap_err());
        assert!(error.contains("1 of its 1 adapters") && error.contains("unet.no_such.layer"), "{error}");
        let scalar = Tensor::new(1f32, &Device::Cpu).unwrap();
        let with = |name: &str| [&pair("unet.a")[..], &[(name.to_owned(), scalar.clone())]].concat();
        for (names, part) in [
            (with("unet.a.dora_scale"), "dora_scale"),
            (vec![("x".to_owned(), tensor(&[2, 2]))], "tensor x"),
            (pair("transformer.a").to_vec(), "transformer.a"),
        ] {
            let error = open(&names).unwrap_err();
            assert!(is_invalid(&error) && error.to_string().contains(part), "{error:#}");
        }
        let half = [("unet.a.lora_A.weight".to_owned(), tensor(&[2, 4]))];
        assert!(format!("{:#}", open(&half).unwrap_err()).contains("unet.a.lora_B.weight is missing"));
    }
}

//! The text encoders in LDM. Stable Diffusion 1's, and the first of XL, has transformers' names; Stable Diffusion 2's, and the
//! second of XL, is OpenCLIP's, with query, key and value in one matrix.

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Device, Tensor};

use super::names::Names;
use super::text_kind::TextKind;
use super::{Tensors, is_left_over, known};
use crate::model::text::TextConfig;
use crate::model::weights::Stored;

const FUSED: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

/// The projection of the pooled text. OpenCLIP multiplies by it from the right, transformers keeps a linear layer's weight.
const PROJECTION: &str = "text_projection";

const LAYER: [(&str, &str); 5] = [
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
];

/// CLIP's tensors under transformers' names. Some older files lack the `text_model.` in them.
pub fn from_clip<'a>(tensors: impl Iterator<Item = (&'a str, &'a Stored)>) -> Tensors {
    const ROOT: &str = "text_model.";
    let own = tensors.filter(|(name, _)| !is_left_over(name));
    own.map(|(name, tensor)| (format!("{ROOT}{}", name.strip_prefix(ROOT).unwrap_or(name)), tensor.clone())).collect()
}

fn names(n_layers: usize) -> Names {
    let mut names = Names::default();
    names.pair("text_model.embeddings.token_embedding", "token_embedding");
    names.pair("text_model.embeddings.position_embedding.weight", "positional_embedding");
    names.pair("text_model.final_layer_norm", "ln_final");
    for layer in 0..n_layers {
        names.pairs(&layer_name(layer), &format!("transformer.resblocks.{layer}"), &LAYER);
    }
    names
}

fn layer_name(layer: usize) -> String {
    format!("text_model.encoder.layers.{layer}")
}

/// OpenCLIP's tensors under transformers' names. Layers behind those of the config are left out.
pub fn from_open_clip<'a>(
    tensors: impl Iterator<Item = (&'a str, &'a Stored)>,
    kind: TextKind,
    config: &TextConfig,
) -> Result<Tensors> {
    let names = names(config.num_hidden_layers);
    let mut found = Tensors::new();
    for (name, tensor) in tensors {
        if name == PROJECTION && config.pooled_width().is_some() {
            found.insert(format!("{PROJECTION}.weight"), tensor.transposed()?);
            continue;
        }
        if is_left_over(name) {
            continue;
        }
        let layer = name.strip_prefix("transformer.resblocks.").and_then(|rest| rest.split_once('.'));
        let layer = layer.and_then(|(layer, rest)| Some((layer.parse::<usize>().ok()?, rest)));
        match layer {
            Some((layer, _)) if layer >= config.num_hidden_layers => {}
            Some((layer, "attn.in_proj_weight")) => split(&mut found, layer, "weight", tensor)?,
            Some((layer, "attn.in_proj_bias")) => split(&mut found, layer, "bias", tensor)?,
            _ => drop(found.insert(known(kind.prefix(), name, names.diffusers(name))?, tensor.clone())),
        }
    }
    Ok(found)
}

fn split(found: &mut Tensors, layer: usize, kind: &str, fused: &Stored) -> Result<()> {
    let width = fused.shape().first().copied().unwrap_or(0) / FUSED.len();
    for (index, part) in FUSED.iter().enumerate() {
        let rows = fused.rows(index * width..(index + 1) * width)?;
        found.insert(format!("{}.self_attn.{part}.{kind}", layer_name(layer)), rows);
    }
    Ok(())
}

/// The tensors under OpenCLIP's names. The network's last layer, which Stable Diffusion 2 does not use and diffusers leaves
/// out, is put back as zeros, which pass their input on: programs that build all of OpenCLIP find all of it.
pub fn to_open_clip(tensors: &Tensors, kind: TextKind, config: &TextConfig) -> Result<Tensors> {
    let n_layers = config.num_hidden_layers;
    let (prefix, component) = (kind.prefix(), kind.component());
    let names = names(n_layers);
    let mut written = Tensors::new();
    for (name, tensor) in tensors {
        if name == "text_projection.weight" {
            written.insert(format!("{prefix}{PROJECTION}"), tensor.transposed()?);
        } else if !FUSED.iter().any(|part| name.contains(&format!(".{part}."))) {
            written.insert(prefix.to_owned() + &known("", name, names.ldm(name))?, tensor.clone());
        }
    }
    let resblock = |layer: usize| format!("{prefix}transformer.resblocks.{layer}");
    for layer in 0..n_layers {
        for kind in ["weight", "bias"] {
            let part = |part| {
                let name = format!("{}.self_attn.{part}.{kind}", layer_name(layer));
                tensors.get(&name).cloned().with_context(|| format!("{component}: tensor {name} is missing"))
            };
            let parts = FUSED.iter().map(part).collect::<Result<Vec<_>>>()?;
            written.insert(format!("{}.attn.in_proj_{kind}", resblock(layer)), Stored::stacked(parts)?);
        }
    }
    ensure!(n_layers > 0, "{component}: has no layers");
    if kind == TextKind::OpenClip {
        let first = resblock(0);
        let of_first = written.iter().filter_map(|(name, tensor)| {
            Some((name.strip_prefix(&first)?.strip_prefix('.')?.to_owned(), tensor.clone()))
        });
        for (name, like) in of_first.collect::<Vec<_>>() {
            let zeros = Tensor::zeros(like.shape(), DType::try_from(like.dtype())?, &Device::Cpu)?;
            written.insert(format!("{}.{name}", resblock(n_layers)), zeros.into());
        }
    }
    Ok(written)
}

//! `jedi inspect`: the openings through which other programs check the networks.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use super::models::{self, Part};
use super::{
    inspect_attention, inspect_caption, inspect_checkpoint, inspect_dataset, inspect_eps, inspect_objects,
    inspect_prompts, inspect_similarity,
};
use crate::cli::{InspectCommand, InspectTextArgs, InspectVaeArgs};
use crate::data::{decode, tensor_from_images};
use crate::device::Runtime;
use crate::invalid::invalid;
use crate::model::write::write_tensors;
use crate::model::{PromptEncoder, Vae, VaeConfig};
use crate::report;

pub fn run(command: InspectCommand) -> Result<()> {
    match command {
        InspectCommand::Eps(args) => inspect_eps::run(args),
        InspectCommand::Text(args) => text(args),
        InspectCommand::Vae(args) => vae(args),
        InspectCommand::Caption(args) => inspect_caption::run(&args),
        InspectCommand::Prompts(args) => inspect_prompts::run(args),
        InspectCommand::Attention(args) => inspect_attention::run(&args),
        InspectCommand::Objects(args) => inspect_objects::run(&args),
        InspectCommand::Similarity(args) => inspect_similarity::run(&args),
        InspectCommand::Checkpoint(args) => inspect_checkpoint::run(args),
        InspectCommand::Dataset(args) => inspect_dataset::run(&args),
    }
}

fn text(args: InspectTextArgs) -> Result<()> {
    let files = models::open_parts(&args.model, args.tokenizer.as_deref(), &[Part::TextEncoder, Part::Tokenizer])?;
    let prompts = PromptEncoder::load(&files, &Runtime::cpu())?;
    let encoded = prompts.encode(&[&args.prompt])?;
    let mut outputs = BTreeMap::from([("context".to_owned(), encoded.context)]);
    outputs.extend(encoded.pooled.map(|pooled| ("text_embeds".to_owned(), pooled)));
    for (name, prompt) in ["tokens", "tokens_2"].into_iter().zip(prompts.tokens(&args.prompt)?) {
        let (length, tokens) = (prompt.tokens.len(), prompt.tokens);
        let tokens = Tensor::from_vec(tokens, (1, length), &Device::Cpu)?; // [1, l]
        outputs.insert(name.to_owned(), tokens.to_dtype(DType::I64)?);
    }
    if let Some(cut) = prompts.tokenizer().encode(&args.prompt)?.cut {
        report::warn(format!("--prompt: too long for this model, its end is not used: {cut:?}"));
    }
    write_tensors(&args.outputs, &outputs, &[])?;
    Ok(report::result(args.outputs.display().to_string())?)
}

/// The picture goes in as it is, not cropped nor resized, so that both programs see the same pixels.
fn vae(args: InspectVaeArgs) -> Result<()> {
    let picture = read_picture(&args.image)?;
    let files = models::open_parts(&args.model, None, &[Part::Vae])?;
    let config: VaeConfig = files.json("vae/config.json")?;
    let (width, height) = picture.dimensions();
    let multiple = config.downscale() as u32;
    if width % multiple != 0 || height % multiple != 0 {
        return Err(invalid(format!(
            "--image {}: {width}×{height}, but this model takes multiples of {multiple} pixels; crop or resize it",
            args.image.display()
        )));
    }
    let (vae, _) = Vae::new(&config, files.params("vae", &Runtime::cpu(), false)?)?;
    let pixels = tensor_from_images(&[picture], &Device::Cpu)?; // [1, 3, H, W]
    let latents = vae.latents_from_images(&pixels)?;
    let outputs = [("decoded".to_owned(), vae.decode(&latents)?), ("latents".to_owned(), latents)];
    write_tensors(&args.outputs, &outputs.into(), &[])?;
    Ok(report::result(args.outputs.display().to_string())?)
}

/// The picture of `--image` as it is.
pub fn read_picture(path: &Path) -> Result<RgbImage> {
    let name = path.display().to_string();
    if !path.is_file() {
        return Err(invalid(format!("--image {name}: no such file; check the path")));
    }
    let decoded = std::fs::read(path).map_err(Into::into).and_then(|bytes| decode(&bytes));
    let decoded = decoded.with_context(|| name.clone())?;
    for notice in decoded.notices {
        report::warn(format!("{name}: {notice}"));
    }
    Ok(decoded.image)
}

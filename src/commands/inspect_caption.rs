//! `jedi inspect caption`: what BLIP or BLIP-2 says of pictures.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::models;
use crate::cli::InspectCaptionArgs;
use crate::data::decode;
use crate::device::Runtime;
use crate::invalid::invalid;
use crate::model::blip::Search;
use crate::model::write::write_tensors;
use crate::report;
use crate::synth::BlipCaptioner;

pub fn run(args: &InspectCaptionArgs) -> Result<()> {
    if let Some(missing) = args.images.iter().find(|image| !image.is_file()) {
        return Err(invalid(format!("--image {}: no such file; check the path", missing.display())));
    }
    let runtime = Runtime::open(args.device.name())?;
    let files = models::open_network("--model", &args.model)?;
    let captioner = BlipCaptioner::load(&files, &runtime)?;
    let search = Search { beams: args.beams, max_new_tokens: args.max_tokens, length_exponent: args.length_exponent };
    let mut stages = BTreeMap::new();
    for (number, path) in args.images.iter().enumerate() {
        let name = path.display().to_string();
        let decoded = std::fs::read(path).map_err(Into::into).and_then(|bytes| decode(&bytes));
        let decoded = decoded.with_context(|| name.clone())?;
        for notice in decoded.notices {
            report::warn(format!("{name}: {notice}"));
        }
        let text = if args.outputs.is_some() {
            let (text, of_picture) = captioner.stages(&decoded.image, &args.prompt, search)?;
            stages.extend(of_picture.into_iter().map(|(name, tensor)| (format!("{name}.{number}"), tensor)));
            text
        } else {
            captioner.text(&decoded.image, &args.prompt, search)?
        };
        report::result(if args.json { json!({"image": name, "caption": text}).to_string() } else { text })?;
    }
    args.outputs.iter().try_for_each(|outputs| write_tensors(outputs, &stages, &[]))
}

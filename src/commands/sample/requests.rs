//! Flags to what the library is asked for.

use anyhow::Result;

use super::references::Shown;
use crate::cli::{self, SampleArgs};
use crate::commands::models;
use crate::data;
use crate::diffusion::Guidance;
use crate::invalid::invalid;
use crate::model::Files;
use crate::sample::{Reference, SetRequest};

/// The guidance that the flags ask for.
pub fn guidance(args: &SampleArgs, files: &Files) -> Result<Guidance> {
    let scale = models::guidance_scale(args.scale, files)?;
    let text_scale = args.text_scale.unwrap_or(scale);
    let image_scale = args.image_scale.unwrap_or(scale);
    let has_one_scale = matches!(args.guidance, cli::Guidance::Joint | cli::Guidance::TextOnly);
    for (flag, value) in [("--text-scale", args.text_scale), ("--image-scale", args.image_scale)] {
        if let Some(value) = value.filter(|_| has_one_scale) {
            return Err(invalid(format!(
                "{flag} {value}: works with --guidance text-first or image-first; the other ways take --scale"
            )));
        }
    }
    Ok(match args.guidance {
        cli::Guidance::Joint => Guidance::Joint { scale },
        cli::Guidance::TextOnly => Guidance::TextOnly { scale },
        cli::Guidance::TextFirst => Guidance::TextFirst { text_scale, image_scale },
        cli::Guidance::ImageFirst => Guidance::ImageFirst { text_scale, image_scale },
    })
}

/// One set a picture, or all pictures in one; each picture has its own seed.
pub fn requests(args: &SampleArgs, shown: &[Shown], size: usize) -> Vec<SetRequest> {
    let known = |shown: &Shown| Reference {
        image: data::resized(&shown.image, size as u32),
        caption: shown.caption.clone().unwrap_or_default(),
    };
    let references: Vec<Reference> = shown.iter().map(known).collect();
    let each = args.prompts.iter().flat_map(|prompt| (0..args.num_images as u64).map(move |j| (prompt.clone(), j)));
    let set = |prompts, seeds| SetRequest { references: references.clone(), prompts, seeds };
    if args.joint {
        let prompts: Vec<String> = each.map(|(prompt, _)| prompt).collect();
        let seeds = (0..prompts.len() as u64).map(|j| args.seed.wrapping_add(j)).collect();
        return vec![set(prompts, seeds)];
    }
    each.map(|(prompt, j)| set(vec![prompt], vec![args.seed.wrapping_add(j)])).collect()
}

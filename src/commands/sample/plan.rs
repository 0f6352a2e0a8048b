//! What a run is to make: flags, prompts file and earlier picture put together, nothing read yet but text.

use std::path::PathBuf;

use anyhow::Result;

use super::asked::{Asked, AskedMask, AskedReference};
use super::prompts_file;
use super::record::{Record, RecordedLora, RecordedNoise, RecordedSet};
use crate::cli::{Dtype, Fit, SampleArgs};
use crate::invalid::invalid;

/// What holds for all pictures of a run.
pub struct Run {
    pub model: String,
    /// Hashes are empty where they come from the flags.
    pub loras: Vec<RecordedLora>,
    pub fit: Fit,
    pub is_coupled: bool,
    pub dtype: Dtype,
    pub is_frugal: bool,
    /// None: not said.
    pub vae_tile: Option<usize>,
    pub noise: Option<NoiseFile>,
}

/// Where the noise comes from, in place of the seeds.
pub struct NoiseFile {
    pub path: PathBuf,
    /// Of the earlier picture's noise.
    pub sha256: Option<String>,
    /// The first of the file's targets that is used.
    pub first: usize,
}

/// Pictures of one prompt.
#[derive(Clone, Debug)]
pub struct Wish {
    pub asked: Asked,
    /// Where it is written, for messages; None: on the command line.
    pub origin: Option<String>,
}

/// The sets of a run.
pub enum Sets {
    /// Each picture its own set.
    Each(Vec<Wish>),
    /// All pictures in one; of a set that is repeated for one picture, the number of that one.
    Joint { wish: Box<Wish>, set: RecordedSet, only: Option<usize> },
}

impl Sets {
    /// Pictures that are written.
    pub fn n_pictures(&self) -> usize {
        match self {
            Self::Each(wishes) => wishes.iter().map(|wish| wish.asked.n_pictures()).sum(),
            Self::Joint { only: Some(_), .. } => 1,
            Self::Joint { set, .. } => set.prompts.len() * set.num_images,
        }
    }

    /// Every wish there is.
    pub fn wishes(&self) -> &[Wish] {
        match self {
            Self::Each(wishes) => wishes,
            Self::Joint { wish, .. } => std::slice::from_ref(&**wish),
        }
    }
}

impl Run {
    /// By the flags, else by the earlier picture, else as always.
    pub fn new(args: &SampleArgs, made: Option<&Record>) -> Self {
        let of = |noise: &RecordedNoise| NoiseFile {
            path: noise.path.clone(),
            sha256: Some(noise.sha256.clone()),
            first: noise.first,
        };
        let by_flag = |path: &PathBuf| NoiseFile { path: path.clone(), sha256: None, first: 0 };
        Self {
            model: args.model.clone().or(made.map(|made| made.model.clone())).unwrap_or("toybox".into()),
            loras: match made {
                Some(made) if args.loras.is_empty() => made.loras.clone(),
                _ => args.loras.iter().map(RecordedLora::by_flag).collect(),
            },
            fit: args.fit.or(made.map(|made| made.fit)).unwrap_or_default(),
            is_coupled: args.uncoupled.map(|uncoupled| !uncoupled).or(made.map(|made| made.coupled)).unwrap_or(true),
            dtype: args.dtype.or(made.map(|made| made.dtype)).unwrap_or_default(),
            is_frugal: args.low_memory.or(made.map(|made| made.low_memory)).unwrap_or(false),
            // A picture that was not in tiles stays so, whatever the memory.
            vae_tile: args.vae_tile.or(made.map(|made| made.vae_tile.unwrap_or(0))),
            noise: args.noise.as_ref().map(by_flag).or(made.and_then(|made| made.noise.as_ref()).map(of)),
        }
    }
}

/// The sets that are asked for.
pub fn sets(args: &SampleArgs, made: Option<&Record>) -> Result<Sets> {
    let flags = Asked::by_flags(args, references(args)?);
    if let Some(path) = &args.prompts_file {
        return Ok(Sets::Each(prompts_file::read(path, &flags)?));
    }
    let asked = match made {
        Some(made) => flags.clone().or(Asked::by_record(made, &flags)),
        None => flags.clone(),
    };
    let wish = |asked| Wish { asked, origin: None };
    if let Some(set) = made.and_then(|made| made.set.as_ref()).filter(|_| !args.joint) {
        for (flag, is_given) in [
            ("--prompt", !args.prompts.is_empty()),
            ("--seed", args.seed.is_some()),
            ("--num-images", args.num_images.is_some()),
        ] {
            if is_given {
                return Err(invalid(format!(
                    "{flag}: the picture of --from is one of a set made with --joint, which is repeated as a whole; add \
                     --joint to ask for another set"
                )));
            }
        }
        let number = made.map_or(0, |made| made.seed.wrapping_sub(set.seed)) as usize;
        return Ok(Sets::Joint { wish: Box::new(wish(asked)), set: set.clone(), only: Some(number) });
    }
    let prompts = match (args.prompts.as_slice(), made) {
        ([], Some(made)) => vec![made.prompt.clone()],
        (prompts, _) => prompts.to_vec(),
    };
    if args.joint {
        let (num_images, seed) = (asked.n_pictures(), asked.seed.unwrap_or(0));
        let set = RecordedSet { prompts, num_images, seed };
        return Ok(Sets::Joint { wish: Box::new(wish(asked)), set, only: None });
    }
    let each = prompts.into_iter().map(|prompt| wish(Asked { prompt: Some(prompt), ..asked.clone() }));
    Ok(Sets::Each(each.collect()))
}

/// The references of the flags, each with its caption.
fn references(args: &SampleArgs) -> Result<Vec<AskedReference>> {
    let mut references: Vec<AskedReference> = args.references.iter().map(AskedReference::from).collect();
    for (flag, what, count) in [
        ("--ref-caption", "captions", args.captions.len()),
        ("--ref-weight", "weights", args.weights.len()),
        ("--ref-mask", "masks", args.masks.len()),
    ] {
        if count > references.len() {
            return Err(invalid(format!(
                "{flag}: {count} {what} for {} references; give each --ref at most one",
                references.len()
            )));
        }
    }
    for (reference, weight) in references.iter_mut().zip(&args.weights) {
        reference.weight = Some(*weight);
    }
    for (reference, mask) in references.iter_mut().zip(&args.masks) {
        reference.mask = (mask.as_os_str() != "none").then(|| AskedMask::at(mask.clone()));
    }
    for (reference, caption) in references.iter_mut().zip(&args.captions) {
        if let Some(own) = &reference.caption {
            return Err(invalid(format!(
                "--ref-caption {caption:?}: {} has the caption {own:?} already; give one of the two",
                reference.image.display()
            )));
        }
        reference.caption = Some(caption.clone());
    }
    Ok(references)
}

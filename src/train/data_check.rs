//! Looks through the data before the first step, so that a run does not stumble over a set when it is first dealt, hours
//! later. Headers, captions and JSON are read; a picture that is broken behind its header is still found only then.

use anyhow::{Error, Result, anyhow, ensure};
use rayon::prelude::*;

use crate::data::{SetOutline, SetSource};
use crate::model::Tokenizer;

/// Of larger sources every second, third … set is looked at: a start may take seconds, not an hour.
const MAX_CHECKED: usize = 200_000;
/// Cut captions that are told one by one.
const MAX_TOLD: usize = 10;

/// How many pictures a set must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pictures {
    /// The largest of `joint.set_sizes`.
    AtLeast(usize),
    /// As many as the first set.
    Exactly(usize),
}

/// Refuses a source with a set that cannot be trained on, by name; returns what the user should know about captions that
/// `tokenizer` cuts.
pub fn check_sets(source: &dyn SetSource, pictures: Pictures, tokenizer: Option<&Tokenizer>) -> Result<Vec<String>> {
    if let Ok(None) = source.outline(0) {
        return Ok(vec![]);
    }
    let stride = source.n_sets().div_ceil(MAX_CHECKED).max(1);
    let checked: Vec<Result<Vec<String>>> = (0..source.n_sets())
        .into_par_iter()
        .step_by(stride)
        .map(|set_idx| match source.outline(set_idx)? {
            Some(set) => check_set(&set, pictures, tokenizer),
            None => Ok(vec![]),
        })
        .collect();
    let n_checked = checked.len();
    let (mut cuts, mut wrong): (Vec<String>, Vec<Error>) = (vec![], vec![]);
    for each in checked {
        match each {
            Ok(some) => cuts.extend(some),
            Err(error) => wrong.push(error),
        }
    }
    let n_wrong = wrong.len();
    match wrong.into_iter().next() {
        Some(first) if n_wrong == 1 => return Err(first),
        Some(first) => return Err(anyhow!("{first:#} (the first of {n_wrong} broken sets among {n_checked})")),
        None => {}
    }
    let rest = cuts.len().saturating_sub(MAX_TOLD);
    cuts.truncate(MAX_TOLD);
    if rest > 0 {
        cuts.push(format!("{rest} more captions are too long for the text encoder and lose their ends"));
    }
    Ok(cuts)
}

/// The captions of a set that are cut.
fn check_set(set: &SetOutline, pictures: Pictures, tokenizer: Option<&Tokenizer>) -> Result<Vec<String>> {
    let SetOutline { label, n_images, captions } = set;
    match pictures {
        Pictures::AtLeast(n) => {
            ensure!(*n_images >= n, "{label}: holds {n_images} pictures, joint.set_sizes asks for {n}")
        }
        Pictures::Exactly(n) => ensure!(
            *n_images == n,
            "{label}: has {n_images} pictures, the first set has {n}; the autoencoder wants sets of one size"
        ),
    }
    let mut cuts = vec![];
    for (idx, caption) in captions.iter().enumerate() {
        let cut = tokenizer.map(|tokenizer| tokenizer.encode(caption)).transpose()?.and_then(|prompt| prompt.cut);
        cuts.extend(cut.map(|cut| {
            format!("{label}: caption {idx} is too long for the text encoder, its end is not used: {cut:?}")
        }));
    }
    Ok(cuts)
}

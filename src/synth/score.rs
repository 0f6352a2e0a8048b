//! Stage 8: how alike the final pictures of a set are, as whole pictures (the paper's Table 8). Nothing is rejected by it but
//! what the model cannot read.

use anyhow::Result;
use image::{GrayImage, Luma};
use serde::{Deserialize, Serialize};

use super::affinity::{Similarities, similarities};
use super::draft::{Draft, Pair};
use super::patience::Patience;
use super::settings::Common;
use super::stage::{Cutout, Stage};
use super::tool::Tools;

/// Goes up when this stage answers otherwise from the same models.
pub const VERSION: u32 = 1;

/// The score's settings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScoreSettings {
    /// Compares subjects, as `affinity.model` does; empty: that model (Table 8's CLIP-I: `openai/clip-vit-base-patch32`).
    pub model: String,
    /// Compares them otherwise, as `affinity.copies_model` does; empty: that model (Table 8's DINO: `facebook/dino-vits16`).
    pub copies_model: String,
}

/// Compares the pictures of each set.
pub fn run(common: &Common, tools: &mut Tools, drafts: &mut [Draft]) -> Result<()> {
    let patience = Patience::with(common, drafts);
    let mut sets: Vec<((usize, usize), Vec<Cutout>)> = vec![];
    for (draft_idx, draft) in drafts.iter().enumerate().filter(|(_, draft)| draft.is_alive()) {
        for (set_idx, pictures) in draft.pictures.iter().enumerate() {
            let whole = |(width, height)| GrayImage::from_pixel(width, height, Luma([255]));
            let pictures = pictures
                .iter()
                .map(|picture| Cutout { image: picture.image.clone(), mask: whole(picture.image.dimensions()) });
            sets.push(((draft_idx, set_idx), pictures.collect()));
        }
    }
    let groups: Vec<&[Cutout]> = sets.iter().map(|(_, pictures)| pictures.as_slice()).collect();
    let identity = similarities(tools.score_identity.as_mut().unwrap_or(&mut tools.identity), patience, &groups)?;
    let copies = match tools.score_copies.as_mut().or(tools.copies.as_mut()) {
        Some(tool) => Some(similarities(tool, patience, &groups)?),
        None => None,
    };
    let mut copies = copies.map(Vec::into_iter);
    for (((draft_idx, set_idx), _), identity) in sets.into_iter().zip(identity) {
        let copy = copies.as_mut().and_then(Iterator::next).transpose();
        let draft = &mut drafts[draft_idx];
        match (identity, copy) {
            (Ok(identity), Ok(copy)) => {
                let copy: Option<Similarities> = copy;
                let pair = |(at, (of, identity)): (usize, _)| Pair {
                    of,
                    identity,
                    copy: copy.as_ref().map(|copy| copy[at].1),
                };
                draft.record.sets[set_idx].pairs = identity.into_iter().enumerate().map(pair).collect();
            }
            (Err(error), _) | (_, Err(error)) => {
                draft.reject(Stage::Score, "the model failed", Some(format!("{error:#}")));
            }
        }
    }
    Ok(())
}

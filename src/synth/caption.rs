//! Stage 7: a caption a picture.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::draft::{Draft, pictures_of};
use super::patience::{Patience, answers};
use super::settings::Common;
use super::stage::{CaptionAsk, Stage};
use super::tool::Tools;
use crate::model::blip::Search;

/// Goes up when this stage answers otherwise from the same models.
pub const VERSION: u32 = 1;

/// The captions' settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaptionSettings {
    /// `prompt`: the scene that the picture was painted from, with its style; else a model that describes pictures: BLIP or
    /// BLIP-2, a folder or its name on the hub.
    pub model: String,
    /// Of such a model: words that each caption begins with.
    pub starts_with: String,
    /// Likewise: captions followed side by side, 1: greedy.
    pub beams: usize,
    /// Likewise: tokens of the longest caption.
    pub max_tokens: usize,
    /// Likewise, with beams: above 0 long captions gain, below they lose.
    pub length_exponent: f64,
}

impl Default for CaptionSettings {
    fn default() -> Self {
        let Search { beams, max_new_tokens, length_exponent } = Search::default();
        Self { model: "prompt".into(), starts_with: String::new(), beams, max_tokens: max_new_tokens, length_exponent }
    }
}

/// Describes the pictures.
pub fn run(common: &Common, tools: &mut Tools, drafts: &mut [Draft]) -> Result<()> {
    let patience = Patience::with(common, drafts);
    let name = tools.caption.model.name.clone();
    let tool = tools.caption.get()?;
    let places = pictures_of(drafts);
    let asks: Vec<CaptionAsk> = places
        .iter()
        .map(|&(draft_idx, set_idx, picture_idx)| {
            let draft = &drafts[draft_idx];
            let record = &draft.record.sets[set_idx].pictures[picture_idx];
            CaptionAsk {
                image: &draft.pictures[set_idx][picture_idx].image,
                object: &draft.record.object,
                prompt: &record.prompt,
                style: record.style.as_deref(),
                seed: draft.rng(&format!("synth caption {set_idx} {picture_idx}")).next_u64(),
            }
        })
        .collect();
    let captions = answers(&name, patience, &asks, &mut |asks| tool.captions(asks))?;
    for ((draft_idx, set_idx, picture_idx), answer) in places.into_iter().zip(captions) {
        let draft = &mut drafts[draft_idx];
        match answer.as_deref().map(str::trim) {
            Ok("") => draft.reject(Stage::Caption, "an empty caption", None),
            // It stands between the captions of a set on disk.
            Ok(caption) if caption.contains("<|") => {
                draft.reject(Stage::Caption, "markup in the caption", Some(caption.to_owned()));
            }
            Ok(caption) => draft.record.sets[set_idx].pictures[picture_idx].caption = caption.to_owned(),
            Err(error) => draft.reject(Stage::Caption, "the model failed", Some(format!("{error:#}"))),
        }
    }
    Ok(())
}

//! Stage 7: a caption a picture.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::draft::{Draft, pictures_of};
use super::patience::{Patience, answers};
use super::settings::Common;
use super::stage::{CaptionAsk, Stage};
use super::tool::Tools;

/// Goes up when this stage answers otherwise from the same models.
pub const VERSION: u32 = 1;

/// The captions' settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaptionSettings {
    /// `prompt`: the scene that the picture was painted from, with its style; else a model that describes pictures.
    pub model: String,
}

impl Default for CaptionSettings {
    fn default() -> Self {
        Self { model: "prompt".into() }
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

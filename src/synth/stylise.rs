//! Stage 6: some of the pictures in another style, so that a set is not of one style alone.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::draft::{Draft, pictures_of};
use super::patience::{Patience, answers};
use super::settings::Common;
use super::stage::{Stage, StyleAsk};
use super::tool::Tools;

/// Goes up when this stage answers otherwise from the same models.
pub const VERSION: u32 = 1;

/// The styles' settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StyliseSettings {
    /// `filter`: colour and texture filters; else a model that edits by instruction.
    pub model: String,
    /// Of a picture to be changed (the paper: 0.5).
    pub probability: f64,
}

impl Default for StyliseSettings {
    fn default() -> Self {
        Self { model: "filter".into(), probability: 0.5 }
    }
}

/// Changes the style of some pictures.
pub fn run(settings: &StyliseSettings, common: &Common, tools: &mut Tools, drafts: &mut [Draft]) -> Result<()> {
    let patience = Patience::with(common, drafts);
    let name = tools.stylise.model.name.clone();
    let tool = tools.stylise.get()?;
    let styles = tool.styles();
    ensure!(!styles.is_empty(), "{name}: knows no styles");
    let mut chosen = vec![];
    for (draft_idx, set_idx, picture_idx) in pictures_of(drafts) {
        let mut rng = drafts[draft_idx].rng(&format!("synth stylise {set_idx} {picture_idx}"));
        if rng.chance(settings.probability) {
            chosen.push(((draft_idx, set_idx, picture_idx), rng.pick(&styles).clone(), rng.next_u64()));
        }
    }
    let asks: Vec<StyleAsk> = chosen
        .iter()
        .map(|((draft_idx, set_idx, picture_idx), style, seed)| {
            let image = &drafts[*draft_idx].pictures[*set_idx][*picture_idx].image;
            StyleAsk { image, style, seed: *seed }
        })
        .collect();
    let styled = answers(&name, patience, &asks, &mut |asks| tool.styled(asks))?;
    for (((draft_idx, set_idx, picture_idx), style, _), answer) in chosen.into_iter().zip(styled) {
        let draft = &mut drafts[draft_idx];
        match answer {
            Ok(image) => {
                draft.pictures[set_idx][picture_idx].image = image;
                draft.record.sets[set_idx].pictures[picture_idx].style = Some(style);
            }
            Err(error) => draft.reject(Stage::Stylise, "the model failed", Some(format!("{error:#}"))),
        }
    }
    Ok(())
}

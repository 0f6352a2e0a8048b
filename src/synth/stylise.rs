//! Stage 6: some of the pictures in another style, so that a set is not of one style alone.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::draft::{Draft, pictures_of};
use super::painting::SamplerName;
use super::patience::{Patience, answers};
use super::settings::Common;
use super::stage::{Stage, StyleAsk};
use super::tool::Tools;
use crate::invalid::invalid;

/// Goes up when this stage answers otherwise from the same models.
pub const VERSION: u32 = 1;

/// The styles' settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StyliseSettings {
    /// `filter`: colour and texture filters; else InstructPix2Pix: a folder, a single file or its name on the hub.
    pub model: String,
    /// Of a picture to be changed (the paper: 0.5).
    pub probability: f64,
    /// Each as likely as any other, as captions call them; empty: all that the model knows by itself.
    pub styles: Vec<String>,
    /// Of InstructPix2Pix: what it is told; `{style}` stands for the style.
    pub instruction: String,
    /// Likewise: denoising steps.
    pub steps: usize,
    /// Likewise: how far the picture follows the instruction.
    pub text_guidance: f64,
    /// Likewise: how far it stays what it was.
    pub image_guidance: f64,
    /// Likewise: how one noise level follows another.
    pub sampler: SamplerName,
    /// Likewise: side at which pictures are changed, in pixels, to be resized there and back; 0: their own.
    pub size: usize,
}

impl Default for StyliseSettings {
    fn default() -> Self {
        Self {
            model: "filter".into(),
            probability: 0.5,
            styles: vec![],
            instruction: "turn it into {style}".into(),
            steps: 20,
            text_guidance: 7.5,
            image_guidance: 1.5,
            sampler: SamplerName::default(),
            size: 0,
        }
    }
}

impl StyliseSettings {
    /// The styles to draw from, of those that a model knows.
    pub fn styles_among(&self, known: Vec<String>) -> Result<Vec<String>> {
        if self.styles.is_empty() {
            return Ok(known);
        }
        match self.styles.iter().find(|style| !known.contains(style)) {
            Some(style) => {
                let (model, known) = (&self.model, known.join(", "));
                Err(invalid(format!("stylise.styles: {style:?} is no style of {model}; it knows: {known}")))
            }
            None => Ok(self.styles.clone()),
        }
    }
}

/// Changes the style of some pictures.
pub fn run(settings: &StyliseSettings, common: &Common, tools: &mut Tools, drafts: &mut [Draft]) -> Result<()> {
    let patience = Patience::with(common, drafts);
    let name = tools.stylise.model.name.clone();
    let tool = tools.stylise.get()?;
    let styles = settings.styles_among(tool.styles())?;
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

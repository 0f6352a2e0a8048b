//! Stage 2: the collage, one picture that shows the same thing many times.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::draft::Draft;
use super::painting::SamplerName;
use super::patience::{Patience, answers};
use super::settings::Common;
use super::stage::{CollageAsk, Stage};
use super::tool::Tools;

/// Goes up when this stage answers otherwise from the same models.
pub const VERSION: u32 = 1;

/// The collages' settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CollageSettings {
    /// `toybox`: drawn sheets of toys; else a text-to-image model, Stable Diffusion 1, 2 or XL: a folder, a single file or its
    /// name on the hub.
    pub model: String,
    /// The prompt; `{prompt}` stands for the object's description, `{object}` for its name.
    pub prompt: String,
    /// Of such a model: side of the collages in pixels; 0: what it was made for.
    pub size: usize,
    /// Likewise: denoising steps.
    pub steps: usize,
    /// Likewise: guidance scale.
    pub guidance: f64,
    /// Likewise: how one noise level follows another.
    pub sampler: SamplerName,
}

impl Default for CollageSettings {
    fn default() -> Self {
        Self {
            model: "toybox".into(),
            prompt: "photos of the same {prompt}, on a plain background".into(),
            size: 0,
            steps: 30,
            guidance: 5.0,
            sampler: SamplerName::default(),
        }
    }
}

/// Paints the collages.
pub fn run(settings: &CollageSettings, common: &Common, tools: &mut Tools, drafts: &mut [Draft]) -> Result<()> {
    let patience = Patience::with(common, drafts);
    let mut alive: Vec<&mut Draft> = drafts.iter_mut().filter(|draft| draft.is_alive()).collect();
    let prompts: Vec<String> = alive
        .iter()
        .map(|draft| {
            let description = draft.record.prompts.as_ref().map_or("", |prompts| &prompts.object);
            settings.prompt.replace("{prompt}", description).replace("{object}", &draft.record.object)
        })
        .collect();
    let asks: Vec<CollageAsk> = alive
        .iter()
        .zip(&prompts)
        .map(|(draft, prompt)| {
            let seed = draft.rng("synth collage").next_u64();
            CollageAsk { object: &draft.record.object, prompt, seed }
        })
        .collect();
    let name = tools.collage.model.name.clone();
    let tool = tools.collage.get()?;
    let found = answers(&name, patience, &asks, &mut |asks| tool.collages(asks))?;
    for (draft, answer) in alive.iter_mut().zip(found) {
        match answer {
            Ok(collage) => {
                draft.set_truth(collage.truth);
                draft.collage = Some(collage.image);
            }
            Err(error) => draft.reject(Stage::Collage, "the model failed", Some(format!("{error:#}"))),
        }
    }
    Ok(())
}

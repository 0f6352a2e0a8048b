//! Stage 1: which object, and what is said of it. The objects go round in an order drawn anew each time, so that each comes as
//! often as any other.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::draft::Draft;
use super::patience::{Patience, answers};
use super::settings::Common;
use super::stage::{PromptAsk, Stage};
use super::tool::Tools;
use crate::rng::Rng;

/// Goes up when this stage answers otherwise from the same models.
pub const VERSION: u32 = 1;

/// The prompts' settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PromptSettings {
    /// `grammar`; `endpoint`, the one of the table `[endpoint]`; else a language model: a .gguf file, a folder with one, or its
    /// name on the hub.
    pub model: String,
    /// `nouns`: about 2,000 that ship with the program; `toybox`: the twelve kinds of toys; else a file, a name a line.
    pub objects: String,
    /// Of the grammar: `any`, or `toybox`: the twelve places and the wordings that the embedded model knows.
    pub scenes: String,
    /// Of a language model or an endpoint: how freely words are drawn, 0 to 2.
    pub temperature: f64,
    /// Likewise: tokens of the longest answer.
    pub max_tokens: usize,
    /// Likewise: questions an object, until an answer is what was asked for.
    pub tries: usize,
    /// Likewise: folder where answers are kept, so that nothing is asked twice; empty: `answers` among the unfinished work.
    pub answers: String,
}

impl Default for PromptSettings {
    fn default() -> Self {
        Self {
            model: "grammar".into(),
            objects: "nouns".into(),
            scenes: "any".into(),
            temperature: 0.8,
            max_tokens: 800,
            tries: 3,
            answers: String::new(),
        }
    }
}

/// The object of set `number`.
pub fn object_of(seed: u64, number: u64, objects: &[String]) -> String {
    let n_objects = objects.len() as u64;
    let mut order: Vec<usize> = (0..objects.len()).collect();
    Rng::new(seed, "synth object order", number / n_objects).shuffle(&mut order);
    objects[order[(number % n_objects) as usize]].clone()
}

/// Asks for the prompts of all drafts.
pub fn run(common: &Common, tools: &mut Tools, drafts: &mut [Draft]) -> Result<()> {
    let patience = Patience::with(common, drafts);
    let n_scenes = common.max_images * common.sets_per_collage;
    let asks: Vec<PromptAsk> = drafts
        .iter()
        .map(|draft| PromptAsk { object: &draft.record.object, n_scenes, seed: draft.rng("synth prompts").next_u64() })
        .collect();
    let name = tools.prompts.model.name.clone();
    let tool = tools.prompts.get()?;
    let found = answers(&name, patience, &asks, &mut |asks| tool.prompts(asks))?;
    for (draft, answer) in drafts.iter_mut().zip(found) {
        match answer {
            Ok(prompts) if prompts.scenes.len() >= n_scenes => draft.record.prompts = Some(prompts),
            Ok(prompts) => {
                let detail = format!("{} of {n_scenes}", prompts.scenes.len());
                draft.reject(Stage::Prompts, "too few scenes", Some(detail));
            }
            Err(error) => draft.reject(Stage::Prompts, "the model failed", Some(format!("{error:#}"))),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_come_equally_often_in_changing_order() {
        let objects: Vec<String> = ["a", "b", "c", "d", "e"].map(String::from).to_vec();
        let round = |round: u64| -> Vec<String> { (0..5).map(|i| object_of(3, round * 5 + i, &objects)).collect() };
        for number in 0..4 {
            let mut sorted = round(number);
            sorted.sort();
            assert_eq!(sorted, objects);
        }
        assert!((1..4).any(|number| round(number) != round(0)));
    }
}

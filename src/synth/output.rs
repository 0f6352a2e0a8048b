//! Drafts that came through as sets for training: strips with their captions, masks and everything that is known.

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::draft::{Draft, Pair};
use super::stage::Stage;
use super::tool::Tools;
use super::toybox::key;
use crate::data::ImageSet;

/// The sets of a draft; none where it was rejected.
pub fn sets(draft: &Draft, masks: bool, models: &Value) -> Result<Vec<ImageSet>> {
    if !draft.is_alive() {
        return Ok(vec![]);
    }
    let record = &draft.record;
    let set = |(set_idx, pictures): (usize, &Vec<_>)| -> Result<ImageSet> {
        let pictures: &Vec<super::draft::Picture> = pictures;
        let made = record.sets.get(set_idx).context("a set without a record")?;
        let number = key(usize::try_from(record.number)?);
        Ok(ImageSet {
            // The first set of a collage has its number alone, so that numbers without a letter count collages.
            key: if set_idx == 0 { number } else { format!("{number}-{set_idx}") },
            images: pictures.iter().map(|picture| picture.image.clone()).collect(),
            captions: made.pictures.iter().map(|picture| picture.caption.clone()).collect(),
            masks: if masks { pictures.iter().map(|picture| picture.mask.clone()).collect() } else { vec![] },
            metadata: metadata(draft, set_idx, models),
        })
    };
    draft.pictures.iter().enumerate().map(set).collect()
}

fn metadata(draft: &Draft, set_idx: usize, models: &Value) -> Value {
    let record = &draft.record;
    let made = &record.sets[set_idx];
    let pictures: Vec<Value> = made
        .pictures
        .iter()
        .map(|picture| {
            let found = &record.instances[picture.instance];
            json!({
                "prompt": picture.prompt,
                "caption": picture.caption,
                "style": picture.style,
                "seed": picture.seed,
                "box": picture.area,
                "box_in_collage": found.area,
                "detection": {"phrase": found.phrase, "score": found.score, "mask_score": found.mask_score},
            })
        })
        .collect();
    let place = |instance: usize| made.pictures.iter().position(|picture| picture.instance == instance);
    let instance_scores = record.pairs.iter().filter_map(|pair| {
        let (a, b) = (place(pair.of[0])?, place(pair.of[1])?);
        Some(score(&Pair { of: [a.min(b), a.max(b)], ..*pair }))
    });
    json!({
        "source": "synth",
        "object": record.object,
        "class": record.object,
        "number": record.number,
        "attempt": record.attempt,
        "seed": record.seed,
        "object_prompt": record.prompts.as_ref().map(|prompts| &prompts.object),
        "pictures": pictures,
        "instance_scores": instance_scores.collect::<Vec<_>>(),
        "picture_scores": made.pairs.iter().map(score).collect::<Vec<_>>(),
        "stages": models,
    })
}

fn score(pair: &Pair) -> Value {
    json!({"pictures": pair.of, "identity": pair.identity, "copy": pair.copy})
}

/// Version and models of every stage, for the sets' JSON and the manifest.
pub fn stage_models(tools: &Tools, versions: &dyn Fn(Stage) -> u32) -> Value {
    let models = |stage: Stage| -> Vec<Value> {
        let model =
            |model: &super::tool::Model| json!({"name": model.name, "version": model.version, "sha256": model.hash});
        tools.models(stage).into_iter().map(model).collect()
    };
    let entry = |stage: Stage| (stage.name().to_owned(), json!({"version": versions(stage), "models": models(stage)}));
    Value::Object(Stage::ALL.into_iter().map(entry).collect::<Map<String, Value>>())
}

//! The toybox protocol's trials on a model: what `eval` measures and what `train` shows at every checkpoint.

use image::RgbImage;

use crate::eval::{Label, Trial, World};
use crate::rng::Rng;
use crate::sample::{Reference, SetRequest};
use crate::synth::toybox::{EVAL_SUBJECTS, Kind, Scene, Subject, WORDINGS, caption, draw};

/// The 64 evaluation toys in the twelve scenes.
pub fn world() -> World {
    World {
        kinds: EVAL_SUBJECTS.map(|seed| Subject::from_seed(seed).kind as usize).collect(),
        scenes: Scene::ALL.iter().map(|scene| scene.phrase().to_string()).collect(),
        n_wordings: WORDINGS,
    }
}

/// The toy of `label` in its scene; every variation has another pose.
pub fn picture(label: Label, variation: u64, size: u32) -> RgbImage {
    let subject = Subject::from_seed(EVAL_SUBJECTS.start + label.toy as u64);
    let index = (label.toy * Scene::ALL.len() + label.scene) as u64;
    draw(&subject, Scene::ALL[label.scene], &mut Rng::new(variation, "toybox evaluation", index), size).image
}

/// The one reference of a trial.
pub fn reference(trial: &Trial, size: usize) -> RgbImage {
    picture(trial.reference(), trial.seed, size as u32)
}

/// What a model is asked to paint in these trials; without references the prompt is all it has.
pub fn requests(trials: &[Trial], size: usize, has_references: bool) -> Vec<SetRequest> {
    let request = |trial: &Trial| {
        let reference = || Reference::new(reference(trial, size), "");
        SetRequest {
            references: has_references.then(reference).into_iter().collect(),
            prompts: vec![caption(Kind::ALL[trial.kind], Scene::ALL[trial.prompt_scene], trial.wording)],
            negative_prompt: String::new(),
            seeds: vec![trial.seed],
        }
    };
    trials.iter().map(request).collect()
}

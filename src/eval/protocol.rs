//! The toybox protocol: every toy is shown once, in one scene, and asked for in another; the judge says what came out.

use anyhow::{Result, ensure};
use image::RgbImage;
use rayon::prelude::*;

use super::judge::{Judge, Verdict};
use super::metrics::{Share, confusions};
use super::report::{NamedConfusion, Row};
use super::soften::{Softness, soften};
use super::world::{Label, Labelled, World};
use crate::rng::Rng;

/// How many of a row's commonest scene mistakes are told.
const TOLD_CONFUSIONS: usize = 5;

/// One picture asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    /// Its number among the toys of the world.
    pub toy: usize,
    /// Its kind, which the prompt names.
    pub kind: usize,
    /// The scene of the one reference picture.
    pub reference_scene: usize,
    /// The scene that the prompt names, never the reference's.
    pub prompt_scene: usize,
    /// Which of the wordings the prompt has.
    pub wording: usize,
    /// Of the reference picture (its variation) and of the sampler's noise.
    pub seed: u64,
}

impl Trial {
    /// What the reference picture shows.
    pub fn reference(&self) -> Label {
        Label { toy: self.toy, scene: self.reference_scene }
    }

    /// What a perfect picture shows.
    pub fn wanted(&self) -> Label {
        Label { toy: self.toy, scene: self.prompt_scene }
    }
}

/// The pictures of one condition and how they were judged.
pub struct Outcome {
    /// The counts.
    pub row: Row,
    /// One a trial.
    pub images: Vec<RgbImage>,
}

/// `per_toy` trials of every toy, a function of `seed`. All scenes are asked for equally often (to within one).
pub fn trials(world: &World, per_toy: usize, seed: u64) -> Result<Vec<Trial>> {
    world.check()?;
    let mut deck_rng = Rng::new(seed, "eval prompt scenes", 0);
    let mut deck = Vec::new();
    let mut trials = Vec::with_capacity(world.n_toys() * per_toy);
    for index in 0..world.n_toys() * per_toy {
        if deck.is_empty() {
            deck = (0..world.n_scenes()).collect();
            deck_rng.shuffle(&mut deck);
        }
        let prompt_scene = deck.pop().unwrap_or(0);
        let mut rng = Rng::new(seed, "eval trial", index as u64);
        // One of the others: those from the prompt's on move up by one.
        let other = rng.below(world.n_scenes() - 1);
        let toy = index % world.n_toys();
        trials.push(Trial {
            toy,
            kind: world.kinds[toy],
            reference_scene: other + (other >= prompt_scene) as usize,
            prompt_scene,
            wording: rng.below(world.n_wordings),
            seed: rng.next_u64(),
        });
    }
    Ok(trials)
}

/// Has `paint` make one picture a trial and judges them as one row of the report, named `condition`.
pub fn run(
    condition: &str,
    trials: &[Trial],
    judge: &Judge,
    paint: &mut dyn FnMut(&[Trial]) -> Result<Vec<RgbImage>>,
) -> Result<Outcome> {
    let images = paint(trials)?;
    let wanted: Vec<Label> = trials.iter().map(Trial::wanted).collect();
    Ok(Outcome { row: judge_pictures(condition, judge, &images, &wanted)?, images })
}

/// How good the judge itself is: rows for real pictures (which must not be those it was fitted to), as they are and softened
/// about as much as a small VAE softens them.
pub fn oracle(judge: &Judge, real: &[Labelled], seed: u64) -> Result<Vec<Row>> {
    const SOFTNESS: Softness = Softness { sigma_px: 0.7, noise: 8.0 };
    let wanted: Vec<Label> = real.iter().map(|sample| sample.label).collect();
    let sharp: Vec<RgbImage> = real.iter().map(|sample| sample.image.clone()).collect();
    let soft: Vec<RgbImage> = sharp
        .par_iter()
        .enumerate()
        .map(|(index, image)| soften(image, SOFTNESS, &mut Rng::new(seed, "eval soften", index as u64)))
        .collect();
    let soft_name = format!("real pictures, blur {} px, noise {}", SOFTNESS.sigma_px, SOFTNESS.noise);
    Ok(vec![
        judge_pictures("real pictures", judge, &sharp, &wanted)?,
        judge_pictures(&soft_name, judge, &soft, &wanted)?,
    ])
}

/// Judges `images`, each of which should show what its entry of `wanted` says.
pub fn judge_pictures(condition: &str, judge: &Judge, images: &[RgbImage], wanted: &[Label]) -> Result<Row> {
    let (found, asked) = (images.len(), wanted.len());
    ensure!(found == asked, "{condition}: {found} pictures came back for {asked} trials; one a trial is needed");
    Ok(row(condition, judge.world(), &judge.verdicts(images)?, wanted))
}

fn row(condition: &str, world: &World, verdicts: &[Verdict], wanted: &[Label]) -> Row {
    let share = |right: &dyn Fn(&Verdict, Label) -> bool| {
        Share::of(verdicts.iter().zip(wanted).map(|(verdict, label)| right(verdict, *label)))
    };
    let scene_pairs = verdicts.iter().zip(wanted).map(|(verdict, label)| (label.scene, verdict.scene()));
    let scene_confusions = confusions(scene_pairs).into_iter().take(TOLD_CONFUSIONS).map(|c| NamedConfusion {
        asked: world.scenes[c.asked].clone(),
        seen: world.scenes[c.seen].clone(),
        count: c.count,
    });
    let kind = |toy: usize| world.kinds[toy];
    Row {
        condition: condition.to_string(),
        n_pictures: verdicts.len(),
        toy: share(&|verdict, label| verdict.toy() == label.toy),
        toy_of_kind: share(&|verdict, label| verdict.toy_among(world.toys_of_kind(kind(label.toy))) == label.toy),
        kind: share(&|verdict, label| kind(verdict.toy()) == kind(label.toy)),
        scene: share(&|verdict, label| verdict.scene() == label.scene),
        toy_and_scene: share(&|verdict, label| verdict.toy() == label.toy && verdict.scene() == label.scene),
        scene_confusions: scene_confusions.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world() -> World {
        let scenes = ["beach", "snow", "space", "rain", "forest"].map(String::from).to_vec();
        World { kinds: vec![0, 1, 2, 0, 1, 2, 0, 1], scenes, n_wordings: 6 }
    }

    fn verdict(toy: usize, scene: usize) -> Verdict {
        let one_hot = |n: usize, at: usize| (0..n).map(|i| if i == at { 1.0 } else { 0.1 * i as f32 }).collect();
        Verdict { toy_scores: one_hot(8, toy), scene_scores: one_hot(5, scene) }
    }

    #[test]
    fn trials_are_a_function_of_the_seed() {
        assert_eq!(trials(&world(), 2, 7).unwrap(), trials(&world(), 2, 7).unwrap());
        assert_ne!(trials(&world(), 2, 7).unwrap(), trials(&world(), 2, 8).unwrap());
    }

    #[test]
    fn the_prompt_never_names_the_references_scene() {
        for trial in trials(&world(), 50, 1).unwrap() {
            assert_ne!(trial.reference_scene, trial.prompt_scene);
            assert!(trial.reference_scene < 5 && trial.prompt_scene < 5 && trial.wording < 6);
            assert_eq!(trial.kind, world().kinds[trial.toy]);
        }
    }

    #[test]
    fn toys_and_scenes_are_asked_for_equally_often() {
        let (mut toys, mut scenes, mut references) = ([0; 8], [0; 5], [0; 5]);
        for trial in trials(&world(), 5, 3).unwrap() {
            toys[trial.toy] += 1;
            scenes[trial.prompt_scene] += 1;
            references[trial.reference_scene] += 1;
        }
        assert_eq!((toys, scenes), ([5; 8], [8; 5]));
        assert!(references.iter().all(|&count| count > 0), "{references:?}");
    }

    #[test]
    fn rows_count_toys_kinds_and_scenes() {
        let wanted = [(0, 1), (0, 1), (3, 2), (4, 0)].map(|(toy, scene)| Label { toy, scene });
        // All right; right toy, wrong scene; another toy of the same kind; another kind (and of its kind toy 7 scores most).
        let verdicts = [verdict(0, 1), verdict(0, 2), verdict(6, 2), verdict(5, 0)];
        let row = row("test", &world(), &verdicts, &wanted);
        assert_eq!((row.toy.hits, row.kind.hits, row.scene.hits, row.toy_and_scene.hits), (2, 3, 3, 1));
        assert_eq!((row.toy_of_kind.hits, row.n_pictures), (2, 4));
        assert_eq!(row.scene_confusions.len(), 1);
        assert_eq!((&*row.scene_confusions[0].asked, &*row.scene_confusions[0].seen), ("snow", "space"));
    }

    #[test]
    fn fails_when_the_world_has_one_scene() {
        let world = World { scenes: vec!["beach".into()], ..world() };
        assert!(trials(&world, 1, 0).unwrap_err().to_string().contains("8 toys in 1 scenes"));
    }
}

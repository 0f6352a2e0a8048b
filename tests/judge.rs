//! The judge of `jedi eval` on the toybox: it must see what real pictures show, and by the toy alone.

use image::RgbImage;
use jedi::eval::{self, Judge, JudgeSettings, Label, Labelled, Row, Trial, World};
use jedi::rng::Rng;
use jedi::synth::toybox::{EVAL_SUBJECTS, Scene, Subject, WORDINGS, draw};

/// The world of the evaluation toys with these seeds.
fn world(seeds: &[u64]) -> World {
    let kinds = seeds.iter().map(|&seed| Subject::from_seed(seed).kind as usize).collect();
    let scenes = Scene::ALL.iter().map(|scene| scene.phrase().to_string()).collect();
    World { kinds, scenes, n_wordings: WORDINGS }
}

fn picture(seeds: &[u64], label: Label, variation: u64) -> RgbImage {
    let place = (label.toy * Scene::ALL.len() + label.scene) as u64;
    let mut rng = Rng::new(variation, "judge test", place);
    draw(&Subject::from_seed(seeds[label.toy]), Scene::ALL[label.scene], &mut rng, 64).image
}

/// Eight toys of two kinds, the kinds' looks as near to one another as the toybox has them.
const FEW: [u64; 8] = [0, 12, 24, 36, 1, 13, 25, 37];
const SETTINGS: JudgeSettings = JudgeSettings { seed: 1, n_filters: 100, variations: 5 };

fn draw_few(variations: std::ops::Range<u64>) -> Vec<Labelled> {
    world(&FEW).draw_all(variations, &|label, variation| picture(&FEW, label, variation))
}

fn assert_above(row: &Row, toy: f64, scene: f64) {
    let (seen_toy, seen_kin, seen_scene) = (row.toy.rate, row.toy_of_kind.rate, row.scene.rate);
    let rates = format!("{}: toy {seen_toy}, of its kind {seen_kin}, scene {seen_scene}", row.condition);
    assert!(seen_toy >= toy && seen_kin >= toy && seen_scene >= scene, "{rates}");
}

#[test]
fn a_judge_of_few_toys_knows_them_and_their_scenes() {
    let judge = Judge::fit(&world(&FEW), &draw_few(0..SETTINGS.variations), &SETTINGS).unwrap();
    for row in eval::oracle(&judge, &draw_few(100..102), 0).unwrap() {
        assert_above(&row, 0.95, 0.95);
    }
}

#[test]
fn a_toy_is_known_in_scenes_where_it_was_never_seen() {
    // Each toy is kept from a quarter of the scenes in fitting. A judge that went by the background would fail there: of
    // those scenes it has seen only other toys.
    let unseen = |label: Label| (label.toy + label.scene).is_multiple_of(4);
    let split = |samples: Vec<Labelled>, keep: bool| -> Vec<Labelled> {
        samples.into_iter().filter(|sample| unseen(sample.label) == keep).collect()
    };
    let judge = Judge::fit(&world(&FEW), &split(draw_few(0..7), false), &SETTINGS).unwrap();
    for row in eval::oracle(&judge, &split(draw_few(100..104), true), 0).unwrap() {
        assert_above(&row, 0.95, 0.95);
    }
}

#[test]
fn the_protocol_rewards_obedience_and_sees_through_copies() {
    let world = world(&FEW);
    let judge = Judge::fit(&world, &draw_few(0..SETTINGS.variations), &SETTINGS).unwrap();
    let trials = eval::trials(&world, 6, 3).unwrap();
    let row = |condition: &str, label: fn(&Trial) -> Label| {
        let mut paint = |trials: &[Trial]| Ok(trials.iter().map(|t| picture(&FEW, label(t), t.seed)).collect());
        eval::run(condition, &trials, &judge, &mut paint).unwrap().row
    };
    let obedient = row("as asked", Trial::wanted);
    assert_above(&obedient, 0.9, 0.9);
    let copied = row("the reference again", Trial::reference);
    assert!(copied.toy.rate >= 0.9 && copied.scene.rate <= 0.1, "{copied:?}");
    let wrong =
        row("another toy of the kind", |t| Label { toy: t.toy / 4 * 4 + (t.toy + 1) % 4, scene: t.prompt_scene });
    assert!(wrong.toy_of_kind.rate <= 0.1 && wrong.kind.rate >= 0.9 && wrong.scene.rate >= 0.9, "{wrong:?}");
}

#[test]
fn the_same_settings_make_the_same_judge() {
    let (samples, test) = (draw_few(0..2), draw_few(9..10));
    let images: Vec<RgbImage> = test.into_iter().map(|sample| sample.image).collect();
    let scores = |settings: &JudgeSettings| {
        let judge = Judge::fit(&world(&FEW), &samples, settings).unwrap();
        judge.verdicts(&images).unwrap().into_iter().flat_map(|v| v.toy_scores).collect::<Vec<f32>>()
    };
    let settings = JudgeSettings { n_filters: 20, ..SETTINGS };
    assert_eq!(scores(&settings), scores(&settings));
    assert_ne!(scores(&settings), scores(&JudgeSettings { seed: 2, ..settings }));
}

#[test]
fn fails_when_a_label_is_outside_the_world() {
    let samples = [Labelled { image: RgbImage::new(64, 64), label: Label { toy: 8, scene: 0 } }];
    let error = Judge::fit(&world(&FEW), &samples, &SETTINGS).err().unwrap();
    assert!(error.to_string().contains("world of 8 toys and 12 scenes"), "{error}");
}

/// What `jedi eval --protocol toybox` prints as its instrument's own accuracy.
#[test]
fn the_full_judge_names_toys_and_scenes_of_real_pictures() {
    let seeds: Vec<u64> = EVAL_SUBJECTS.collect();
    let (world, settings) = (world(&seeds), JudgeSettings::default());
    let real = |variations| world.draw_all(variations, &|label, variation| picture(&seeds, label, variation));
    let judge = Judge::fit(&world, &real(0..settings.variations), &settings).unwrap();
    for row in eval::oracle(&judge, &real(100..101), 0).unwrap() {
        assert_above(&row, 0.98, 0.98);
    }
}

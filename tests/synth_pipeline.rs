//! `jedi synth-data --config configs/synth-toybox.toml` from outside: the embedded pipeline as users have it, what it says of
//! itself against what really is in its collages, and training on what it made.

mod harness;
#[path = "harness/room.rs"]
mod room;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use harness::{Outcome, jedi};
use image::{GrayImage, RgbImage};
use jedi::data::{Dataset, Layout};
use jedi::folder_lock;
use jedi::rng::Rng;
use jedi::synth::toybox::{Scene, Subject, draw};
use room::Room;
use serde_json::Value;

const CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/synth-toybox.toml");

impl Room {
    fn synth(&self, out: &str, flags: &[&str]) -> Outcome {
        let out = self.path(out);
        jedi(["synth-data", "--config", CONFIG, "--device", "cpu", "--out", &out].iter().chain(flags))
    }

    fn json(&self, file: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(file)).expect("a file")).expect("JSON")
    }
}

/// `hits` of `of`, both numbers of the report.
fn share(truth: &Value, hits: &str, of: &str) -> f64 {
    let number = |name: &str| truth[name].as_f64().expect("a number");
    number(hits) / number(of)
}

#[test]
fn twenty_sets_are_what_the_report_says_and_train_a_model() {
    let room = Room::new();
    // Roughly painted: what the scenes look like is the next test's.
    let mut flags = vec!["--sets", "20", "--keep-rejected"];
    ["sets.masks=true", "compose.steps=2", "compose.rounds=1"]
        .iter()
        .for_each(|setting| flags.extend(["--set", setting]));
    let outcome = room.synth("sets", &flags);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(outcome.stdout.trim(), room.path("sets"));
    for expected in ["sets: ", "instances found (IoU > 0.8): ", "pairs put right: ", "sets a minute", "report.html"] {
        assert!(outcome.stderr.contains(expected), "{expected} is not in\n{}", outcome.stderr);
    }

    // The figures; the collages' painter knows what it drew.
    let yields = &room.json("sets/report/00000.json")["yields"];
    let truth = &yields["truth"];
    assert!(share(truth, "things_found", "things") >= 0.98, "{truth}");
    assert!(share(truth, "instances_false", "instances") <= 0.02, "{truth}");
    assert!(share(truth, "pairs_right", "pairs") >= 0.98, "{truth}");
    assert!(truth["pairs_of_two"].as_u64() > Some(10), "hardly a stranger, so that nothing was shown: {truth}");
    assert!(share(truth, "pairs_of_two_parted", "pairs_of_two") >= 0.98, "{truth}");
    assert_eq!(truth["sets_pure"], truth["sets"]);

    let dataset = Dataset::open(&room.path("sets"), Layout::Sets).expect("a dataset");
    assert_eq!(dataset.n_samples() as u64, yields["sets"].as_u64().expect("a number"));
    assert!(dataset.n_samples() >= 19, "{yields}");
    let (mut n_styled, mut n_pictures) = (0, 0);
    for idx in 0..dataset.n_samples() {
        let set = dataset.read(idx).expect("a set");
        assert_eq!((set.images.len(), set.masks.len(), set.images[0].dimensions()), (4, 4, (64, 64)));
        let pictures = set.metadata["pictures"].as_array().expect("a list");
        n_pictures += pictures.len();
        n_styled += pictures.iter().filter(|picture| !picture["style"].is_null()).count();
        // Half of the thing's pixels and more differ from the grey that stands for the unknown before the scene is painted.
        for image in &set.images {
            let grey = image.pixels().filter(|pixel| pixel.0 == [127; 3]).count();
            assert!(grey < 200, "{}: {grey} pixels were not painted", set.key);
        }
    }
    assert!((0.3..0.7).contains(&(n_styled as f64 / n_pictures as f64)), "{n_styled} of {n_pictures}");
    let html = fs::read_to_string(room.path("sets/report.html")).expect("the report");
    let shown: Vec<&str> = html.split("src=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert!(shown.len() >= 12);
    assert!(shown.iter().all(|file| Path::new(&room.path("sets")).join(file).is_file()), "{shown:?}");

    // One step of joint training on the sets as they are.
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/toybox");
    let source = format!("data.source={}", room.path("sets"));
    let architecture = format!("model.architecture={}", configs.join("architecture").display());
    let vae = format!("model.vae={}", configs.join("model").display());
    let (config, out) = (configs.join("joint.toml").display().to_string(), room.path("run"));
    let mut flags = vec!["train", "--config", &config, "--out", &out, "--device", "cpu"];
    for setting in [&source, &architecture, &vae, "run.steps=1", "run.images_per_step=12", "run.validate_every=0"] {
        flags.extend(["--set", setting]);
    }
    let trained = jedi(flags);
    assert_eq!(trained.code, Some(0), "{}", trained.stderr);
}

/// Of colours that no picture of a scene has but those of its toy: the smallest distance that counts.
const STRANGE: i32 = 36;

/// Colours around the toys in drawn pictures of each scene, in steps of 8.
fn scene_colours(scene: Scene) -> BTreeSet<[u8; 3]> {
    let mut rng = Rng::new(5, "scene colours", scene as u64);
    let mut colours = BTreeSet::new();
    for seed in 0..40 {
        let drawn = draw(&Subject::from_seed(1_000_000 + seed), scene, &mut rng, 64);
        let around = drawn.image.pixels().zip(drawn.mask.pixels()).filter(|(_, mask)| mask.0[0] == 0);
        colours.extend(around.map(|(pixel, _)| pixel.0.map(|value| value / 8 * 8 + 4)));
    }
    colours
}

/// Share of the picture more than three pixels from the thing whose colours are none of the scene's.
fn strange_share(image: &RgbImage, mask: &GrayImage, colours: &BTreeSet<[u8; 3]>) -> f64 {
    let far = |pixel: [u8; 3]| {
        let squares = |known: &[u8; 3]| (0..3).map(|c| (i32::from(known[c]) - i32::from(pixel[c])).pow(2)).sum::<i32>();
        !colours.iter().any(|known| squares(known) <= STRANGE * STRANGE)
    };
    let near_thing = |x: u32, y: u32| {
        let (columns, rows) = (x.saturating_sub(3)..=(x + 3).min(63), y.saturating_sub(3)..=(y + 3).min(63));
        rows.flat_map(|y| columns.clone().map(move |x| (x, y))).any(|(x, y)| mask.get_pixel(x, y).0[0] > 0)
    };
    let strange = image.enumerate_pixels().filter(|(x, y, pixel)| !near_thing(*x, *y) && far(pixel.0));
    strange.count() as f64 / f64::from(64 * 64)
}

#[test]
fn scenes_are_painted_around_the_thing_without_a_second_one() {
    let room = Room::new();
    let mut flags = vec!["--sets", "3"];
    ["sets.masks=true", "stylise.probability=0", "sets.attempts=1"]
        .iter()
        .for_each(|setting| flags.extend(["--set", setting]));
    let outcome = room.synth("sets", &flags);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let dataset = Dataset::open(&room.path("sets"), Layout::Sets).expect("a dataset");
    let mut shares = vec![];
    for set in (0..dataset.n_samples()).map(|idx| dataset.read(idx).expect("a set")) {
        for ((image, mask), caption) in set.images.iter().zip(&set.masks).zip(&set.captions) {
            let scene = Scene::ALL.into_iter().find(|scene| caption.contains(scene.phrase())).expect("a scene");
            shares.push(strange_share(image, mask, &scene_colours(scene)));
        }
    }
    let mean = shares.iter().sum::<f64>() / shares.len() as f64;
    assert!(shares.len() >= 12 && mean < 0.012, "{mean}: {shares:?}");
}

#[test]
fn the_same_command_leaves_what_is_there_and_other_settings_are_refused() {
    let room = Room::new();
    let flags = ["--sets", "2", "--set", "compose.steps=2"];
    let first = room.synth("sets", &flags);
    assert_eq!(first.code, Some(0), "{}", first.stderr);
    let before = fs::read(room.path("sets/00000.tar")).expect("a shard");
    let again = room.synth("sets", &flags);
    assert!(again.code == Some(0) && again.stderr.contains("0 shards written, 1 were there"), "{}", again.stderr);
    assert!(fs::read(room.path("sets/00000.tar")).expect("a shard") == before);
    let other = room.synth("sets", &["--sets", "2", "--set", "compose.steps=3"]);
    assert!(other.code == Some(1) && other.stderr.contains("compose.steps is 2 there, 3 now"), "{}", other.stderr);
    let held = folder_lock::hold(Path::new(&room.path("sets")), "part-0-of-1.lock", "test").expect("nobody else");
    let second = room.synth("sets", &flags);
    assert!(
        second.code == Some(1) && second.stderr.contains("another jedi synth-data is at work"),
        "{}",
        second.stderr
    );
    drop(held);
    assert_eq!(room.synth("sets", &flags).code, Some(0));
}

#[test]
fn what_is_wrong_is_told_by_name() {
    let room = Room::new();
    for (flags, message) in [
        (["--set", "affinity.threshold=2"], "affinity.threshold = 2: must lie in [0, 1]"),
        (["--set", "collage.model=sdxl-huge"], "collage.model sdxl-huge: is no model that this stage knows"),
        (
            ["--set", "instances.detector=plain"],
            "instances.detector plain: is no model that this stage knows; use plain-ground",
        ),
        (["--set", "prompts.objects=nouns"], "the toybox has no "),
        (["--set", "collage.colour=red"], "unknown field `colour`"),
        (["--stage", "paint"], "invalid value 'paint'"),
        (["--images", "3"], "cannot be used with"),
    ] {
        let outcome = room.synth("wrong", &["--sets", "3"].iter().chain(&flags).copied().collect::<Vec<_>>());
        assert_eq!(outcome.code, Some(2), "{flags:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(message), "{flags:?}: {}", outcome.stderr);
    }
    let outcome = jedi(["synth-data", "--sets", "3", "--limit", "2", "--out", &room.path("wrong")]);
    assert!(outcome.code == Some(2) && outcome.stderr.contains("--config"), "{}", outcome.stderr);
}

#[test]
fn a_dry_run_tells_what_is_needed_and_makes_nothing() {
    let room = Room::new();
    let outcome = room.synth("sets", &["--sets", "1000", "--dry-run"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    for expected in
        ["compose: toybox", "models: 0.0 GB to be downloaded", "1000 set numbers in 10 shards", "disk: about", "time: "]
    {
        assert!(outcome.stderr.contains(expected), "{expected} is not in\n{}", outcome.stderr);
    }
    assert!(outcome.stdout.contains("[affinity]") && outcome.stdout.contains("threshold = 0.96"), "{}", outcome.stdout);
    assert!(!Path::new(&room.path("sets")).exists());
}

//! What `jedi train` finds in its data before the first step.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use jedi::data::set::write_strip;
use jedi::data::shards::ShardWriter;
use jedi::data::{DatasetSource, ImageSet, Layout, Mixture, SetSource, members_from_set};
use jedi::device::Runtime;
use jedi::invalid::is_invalid;
use jedi::synth::toybox::ToyboxSource;
use jedi::train::ObjectiveKind::Joint;
use jedi::train::data_check::{Pictures, check_mixture};
use jedi::train::{JointObjective, Objective};

use super::harness::{Outcome, jedi};
use super::world::World;

const SETS: ToyboxSource = ToyboxSource { seed: 3, sets: 8, images: 4, size: 16 };

/// Eight sets of four pictures, the one at `at` changed.
fn sets(at: usize, change: impl Fn(&mut ImageSet)) -> Vec<ImageSet> {
    let mut sets: Vec<ImageSet> = (0..SETS.sets).map(|idx| SETS.read(idx).expect("a set")).collect();
    change(&mut sets[at]);
    sets
}

fn written(world: &World, sets: &[ImageSet]) -> PathBuf {
    let folder = world.path("strips");
    fs::create_dir_all(&folder).expect("a folder");
    sets.iter().for_each(|set| write_strip(set, &folder).expect("files"));
    folder
}

/// One step of `jedi train` on this data.
fn start(world: &World, data: &Path, settings: &[&str]) -> Outcome {
    let text = |path: &Path| path.display().to_string();
    let (config, out) = (text(&world.config_file(Joint)), text(&world.path("run")));
    let source = format!("data.source={}", data.display());
    let mut arguments = vec!["train", "--device", "cpu", "--config", &config, "--out", &out];
    arguments.extend(["--set", "run.steps=1", "--set", &source]);
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    jedi(arguments)
}

#[test]
fn a_set_that_is_broken_is_named_though_no_step_would_deal_it() {
    let world = World::new();
    let folder = written(&world, &sets(0, |_| {}));
    let captions = folder.join("00000006.txt");
    fs::write(&captions, "a<|split|>b").unwrap();
    let ended = start(&world, &folder, &["run.images_per_step=12"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("strips/00000006: .txt: 2 captions for 4 pictures"), "{}", ended.stderr);
    assert!(!world.path("run").exists());
    fs::write(folder.join("00000007.json"), "{").unwrap();
    let ended = start(&world, &folder, &[]);
    assert!(ended.stderr.contains("the first of 2 broken sets among 8"), "{}", ended.stderr);
}

#[test]
fn sets_in_tars_are_checked_too() {
    let world = World::new();
    let tar = world.path("sets.tar");
    let mut writer = ShardWriter::create(&tar).unwrap();
    for (idx, set) in sets(0, |_| {}).iter().enumerate() {
        let mut members = members_from_set(set).unwrap();
        if idx == 5 {
            let picture = image::RgbImage::new(16, 40);
            let mut png = std::io::Cursor::new(vec![]);
            picture.write_to(&mut png, image::ImageFormat::Png).unwrap();
            members.insert("png".into(), png.into_inner());
        }
        writer.push(&set.key, &members).unwrap();
    }
    writer.finish().unwrap();
    let ended = start(&world, &tar, &[]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    let expected = "sets.tar: sample 00000005: .png: a strip 16 wide and 40 high";
    assert!(ended.stderr.contains(expected), "{}", ended.stderr);
}

#[test]
fn a_set_with_too_few_pictures_is_dealt_to_small_sets_alone_and_told() {
    let world = World::new();
    let few = |set: &mut ImageSet| {
        set.images.truncate(3);
        set.captions.truncate(3);
        set.masks.truncate(3);
    };
    let folder = written(&world, &sets(4, few));
    let ended = world.diverge(&[&format!("data.source={}", folder.display())]);
    let told = "1 of 8 sets hold fewer than 4 pictures and are dealt in smaller sets alone";
    assert!(ended.stderr.contains(told), "{}", ended.stderr);
    let source = DatasetSource::open(folder.to_str().unwrap(), Layout::Sets, 16).unwrap();
    let mixture = Mixture::from(Arc::new(source));
    let check = |sizes: &[usize]| check_mixture(&mixture, |_| Pictures::of(sizes), None);
    assert!(check(&[3, 2]).unwrap().is_empty());
    let notices = check(&[4]).unwrap();
    assert!(notices[0].contains("1 of 8 sets hold fewer than 4 pictures and are not dealt"), "{notices:?}");
    assert!(notices[0].ends_with("strips/00000004 holds 3"), "{notices:?}");
    let error = check(&[5]).unwrap_err().to_string();
    assert!(error.contains("no set holds 5 pictures") && error.contains("strips/00000000 holds 4"), "{error}");
}

#[test]
fn a_caption_that_is_too_long_is_told_once_with_what_is_cut() {
    let world = World::new();
    let long = format!("a robot {} tail", "in the snow ".repeat(30));
    let folder = written(&world, &sets(2, |set| set.captions[1] = long.clone()));
    let ended = world.diverge(&[&format!("data.source={}", folder.display())]);
    let told: Vec<&str> = ended.stderr.lines().filter(|line| line.contains("too long")).collect();
    assert_eq!(told.len(), 1, "{}", ended.stderr);
    assert!(told[0].contains("strips/00000002: caption 1 is too long") && told[0].ends_with("tail\""), "{}", told[0]);
}

#[test]
fn an_outline_promises_what_reading_gives_without_decoding() {
    let world = World::new();
    let folder = written(&world, &sets(0, |_| {}));
    let source = DatasetSource::open(folder.to_str().unwrap(), Layout::Sets, 16).unwrap();
    for idx in 0..source.n_sets() {
        let (outline, set) = (source.outline(idx).unwrap().expect("an outline"), source.read(idx).unwrap());
        assert_eq!((outline.n_images, outline.captions), (set.images.len(), set.captions));
    }
    // Behind its header the picture is gone: only decoding can tell.
    let picture = folder.join("00000003.png");
    let bytes = fs::read(&picture).unwrap();
    fs::write(&picture, &bytes[..bytes.len() / 2]).unwrap();
    assert!(source.outline(3).is_ok() && source.read(3).is_err());
}

#[test]
fn subjects_weigh_alike_however_their_masks_come() {
    let world = World::new();
    let folder = written(&world, &sets(0, |_| {}));
    let cache = format!("data.cache={}", world.path("cache").display());
    let first_loss = |source: Mixture, settings: &[&str]| -> Result<f32> {
        let mut objective = JointObjective::new(&world.config(Joint, settings), &Runtime::cpu(), source, vec![])?;
        Ok(objective.loss(0)?.to_scalar()?)
    };
    let drawn = || Mixture::from(Arc::new(SETS));
    let strips = || Mixture::from(Arc::new(DatasetSource::open(folder.to_str().unwrap(), Layout::Sets, 16).unwrap()));
    let plain = first_loss(drawn(), &[]).unwrap();
    let weighted = first_loss(drawn(), &["joint.subject_weight=4"]).unwrap();
    assert!((weighted - plain).abs() > 1e-4 * plain, "{weighted} {plain}");
    assert_eq!(first_loss(strips(), &[]).unwrap(), plain);
    // Twice with a cache: when it is empty, and when all latents are known.
    for cache in [&cache, &cache] {
        assert_eq!(first_loss(strips(), &[cache, "joint.subject_weight=4"]).unwrap(), weighted);
    }
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.to_str().unwrap().ends_with(".mask.png") {
            fs::remove_file(path).unwrap();
        }
    }
    let error = first_loss(strips(), &["joint.subject_weight=4"]).unwrap_err();
    assert!(
        is_invalid(&error) && error.to_string().contains("joint.subject_weight: the data have no masks"),
        "{error}"
    );
}

//! The configs that are shipped.

use std::fs;
use std::path::{Path, PathBuf};

use jedi::config;
use jedi::synth::settings::SynthConfig;
use jedi::train::{ObjectiveKind, TrainConfig};

/// Those of training below `configs/`, but for what belongs to a model.
fn configs() -> Vec<PathBuf> {
    all().into_iter().filter(|path| !is_of_synth_data(path)).collect()
}

fn all() -> Vec<PathBuf> {
    let (mut folders, mut found) = (vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")], vec![]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|suffix| suffix == "toml") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn is_of_synth_data(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("synth-"))
}

#[test]
fn every_config_is_one_that_can_be_trained_with_and_says_what_it_costs() {
    let configs = configs();
    assert!(configs.len() >= 6, "{configs:?}");
    for path in configs {
        let settings: TrainConfig = config::load(&path, &[]).unwrap_or_else(|error| panic!("{error:#}"));
        settings.validate().unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
        let images = settings.run.images_per_step;
        if settings.objective == ObjectiveKind::Joint {
            assert!(settings.joint.set_sizes.iter().all(|n| images.is_multiple_of(*n)), "{}", path.display());
        }
        let text = fs::read_to_string(&path).expect("a file");
        assert!(text.starts_with("# ") && text.contains("jedi train --config configs/"), "{}", path.display());
        let is_recipe_of_record = path.iter().any(|part| part == "toybox");
        for part in ["# Cost: ", "# Expected: "] {
            assert!(is_recipe_of_record || text.contains(part), "{}: {part}", path.display());
        }
    }
}

#[test]
fn the_papers_config_has_the_papers_numbers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/sd14.toml");
    let settings: TrainConfig = config::load(&path, &[]).expect("a config");
    // §4: batch size 2048, learning rate 5e-5, 140K steps, set size 2 to 4; 2048 does not divide by 3.
    assert_eq!((settings.optimizer.lr, settings.run.steps), (5e-5, 140_000));
    assert!(settings.run.images_per_step.abs_diff(2048) < 12);
    assert_eq!(settings.joint.set_sizes, [2, 3, 4]);
}

#[test]
fn every_config_of_synth_data_is_one_and_says_how_it_is_used() {
    let configs: Vec<PathBuf> = all().into_iter().filter(|path| is_of_synth_data(path)).collect();
    assert!(configs.len() >= 2, "{configs:?}");
    for path in configs {
        let settings: SynthConfig = config::load(&path, &[]).unwrap_or_else(|error| panic!("{error:#}"));
        settings.validate().unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
        let text = fs::read_to_string(&path).expect("a file");
        let file = path.file_name().expect("a name").to_string_lossy();
        assert!(
            text.starts_with("# ") && text.contains(&format!("jedi synth-data --config configs/{file} ")),
            "{file}"
        );
    }
}

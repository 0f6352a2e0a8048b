//! The held-out loss, by source and by timestep.

use jedi::data::SetSource;
use jedi::data::set::write_strip;
use jedi::synth::toybox::ToyboxSource;
use jedi::train::ObjectiveKind::Joint;
use jedi::train::Share;

use super::harness::jedi;
use super::world::{World, metrics, weights};

#[test]
fn the_held_out_loss_is_told_by_source_and_timestep_and_repeats() {
    let world = World::new();
    // Sets of single pictures beside the sets of four.
    let folder = world.path("held-out");
    std::fs::create_dir_all(&folder).unwrap();
    let source = ToyboxSource { seed: 77, sets: 8, images: 4, size: 16 };
    for set in (0..8).map(|idx| source.read(idx).unwrap()) {
        write_strip(&set, &folder).unwrap();
    }
    let mut text = world.config_text(Joint);
    for name in ["strips", "again"] {
        text += &format!("[[validation]]\nname = \"{name}\"\nsource = \"{}\"\n", folder.display());
    }
    let config = world.path("two.toml");
    std::fs::write(&config, text).unwrap();
    let out = world.path("run");
    let ended = jedi([
        "train",
        "--device",
        "cpu",
        "--config",
        config.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--set",
        "run.preview_images=0",
        "--set",
        "run.steps=2",
    ]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("memory plan: ") && ended.stderr.contains(" left, held-out loss "),
        "{}",
        ended.stderr
    );
    let lines = metrics(&out);
    let parts = lines[1]["validation"].as_object().unwrap();
    let of = |name: &str| parts[name].as_f64().unwrap_or_else(|| panic!("{name} is not in {parts:?}"));
    let buckets = ["t000-249", "t250-499", "t500-749", "t750-999"];
    assert_eq!(parts.len(), 2 * (1 + buckets.len()));
    // Eight sets, two in each range: the mean of the ranges is the mean.
    let mean = buckets.iter().map(|bucket| of(&format!("strips/{bucket}"))).sum::<f64>() / 4.0;
    assert!((mean - of("strips")).abs() < 1e-9 && (of("strips") - of("again")).abs() < 1e-12);
    let total = lines[1]["validation_loss"].as_f64().unwrap();
    assert!((total - mean).abs() < 1e-9, "{total} {mean}");
}

#[test]
fn shares_of_the_parts_add_up_whatever_goes_through_at_a_time() {
    let world = World::new();
    let parts = |micro_batch: usize, count: usize| {
        let config = world.config(Joint, &[&format!("run.micro_batch={micro_batch}")]);
        let mut objective = world.objective(&config).unwrap();
        let own = weights(objective.as_ref());
        let mut sums = vec![];
        for index in 0..count {
            objective.set_share(Share { index, count });
            objective.validate(&own).unwrap();
            for (i, (name, sum, sets)) in objective.held_out_parts().iter().enumerate() {
                if index == 0 {
                    sums.push((name.clone(), 0.0, 0));
                }
                assert_eq!(sums[i].0, *name);
                (sums[i].1, sums[i].2) = (sums[i].1 + sum, sums[i].2 + sets);
            }
        }
        sums
    };
    let whole = parts(0, 1);
    for other in [parts(3, 1), parts(0, 2)] {
        for ((name, sum, sets), (same_name, same_sum, same_sets)) in whole.iter().zip(&other) {
            assert_eq!((name, sets), (same_name, same_sets));
            assert!((sum - same_sum).abs() <= 1e-5 * sum, "{name}: {sum} {same_sum}");
        }
    }
}

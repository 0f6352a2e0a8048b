//! `jedi inspect attention` from outside, on the model inside the program.

#[allow(dead_code)] // A command that is not yet started; here all run to their end.
mod harness;

use std::path::{Path, PathBuf};

use harness::jedi;

const ROBOT: &str = "configs/toybox/examples/robot.png";
const PROMPT: &str = "a photo of a robot on the beach";

#[test]
fn a_layer_gives_a_heat_map_correspondences_and_shares_that_sum_to_one() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("seen").display().to_string();
    let args = ["inspect", "attention", "--ref", ROBOT, "--prompt", PROMPT, "--steps", "4", "--out", &out, "--json"];
    let outcome = jedi(args.iter().chain(&["--layer", "up_blocks", "--point", "30,34"]));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let layers: Vec<serde_json::Value> =
        outcome.stdout.lines().map(|line| serde_json::from_str(line).expect("a JSON object a line")).collect();
    assert_eq!(layers.len(), 4, "the toybox has four self-attentions on its way up");
    for layer in layers {
        let shares: Vec<f64> = layer["shares"].as_array().expect("a list").iter().filter_map(|v| v.as_f64()).collect();
        assert_eq!(shares.len(), 2, "the reference and the new picture");
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-4, "{shares:?}");
        assert!(shares[0] > 0.02, "the new picture looks at its reference: {shares:?}");
        for (key, size) in [("heat", (514, 256)), ("matches", (514, 256))] {
            let path = PathBuf::from(layer[key].as_str().expect("a path"));
            assert_eq!(image::open(&path).expect("a picture").into_rgb8().dimensions(), size, "{}", path.display());
        }
    }
}

#[test]
fn what_is_not_there_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().display().to_string();
    let asked = ["inspect", "attention", "--ref", ROBOT, "--prompt", PROMPT, "--steps", "1", "--out", &out];
    for (flags, message) in [
        (&["--layer", "nowhere"][..], "--layer nowhere: no self-attention of this model has that in its name"),
        (&["--point", "64,3"], "--point 64,3: the pictures have 64×64 pixels"),
        (&["--image", "3"], "--image 3: the set has 2 pictures"),
        (&["--at-step", "2"], "--at-step 2: there are 1 steps"),
        (&["--point", "a"], "use X,Y in whole pixels"),
    ] {
        let outcome = jedi(asked.iter().chain(flags));
        assert_eq!(outcome.code, Some(2), "{flags:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(message), "{flags:?}: {}", outcome.stderr);
    }
    assert_eq!(Path::new(&out).read_dir().expect("the folder").count(), 0, "nothing is written");
}

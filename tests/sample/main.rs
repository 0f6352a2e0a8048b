//! `jedi sample` from outside, on a model of random weights: files, seeds and streams; `method` has the formulas, `ways` the
//! samplers and outputs, `repeat` the same picture again, `refusals` what it does not take, or takes with a word.

mod attended;
#[path = "../harness/mod.rs"]
mod harness;
mod method;
mod refusals;
mod repeat;
#[path = "../harness/room.rs"]
mod room;
#[path = "../tiny_model/mod.rs"]
mod tiny_model;
mod ways;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use harness::{Outcome, command, jedi};
use image::{Rgb, RgbImage};
use jedi::model::files::read_safetensors;
use jedi::model::write::write_tensors;
use jedi::rng::Rng;
use room::Room;
use serde_json::Value;
use tempfile::TempDir;
use tiny_model::Family;

/// Both models and a reference, written once for all tests.
static MODELS: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    tiny_model::write(&folder.path().join("joint"), Family::Joint);
    tiny_model::write(&folder.path().join("plain"), Family::Plain);
    toy(32, 32).save(folder.path().join("toy.png")).expect("a writable folder");
    folder
});

fn toy(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([(x * 7) as u8, (y * 5) as u8, if x > y { 200 } else { 30 }]))
}

/// A path among the models, as an argument.
fn at(name: &str) -> String {
    MODELS.path().join(name).display().to_string()
}

impl Room {
    /// Two steps of the joint model to `<room>/<out>`, with more flags.
    fn sample(&self, out: &str, flags: &[&str]) -> Outcome {
        self.sample_with("joint", out, flags)
    }

    fn sample_with(&self, model: &str, out: &str, flags: &[&str]) -> Outcome {
        let (model, out) = (at(model), self.path(out));
        jedi(["sample", "--model", &model, "--out", &out, "--steps", "2", "--device", "cpu"].iter().chain(flags))
    }

    /// The paths that a run printed, after checking that it went well.
    fn pictures(&self, out: &str, flags: &[&str]) -> Vec<PathBuf> {
        done(&self.sample(out, flags)).lines().map(PathBuf::from).collect()
    }
}

fn done(outcome: &Outcome) -> &str {
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    &outcome.stdout
}

fn pixels(path: &Path) -> RgbImage {
    image::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).into_rgb8()
}

fn names(paths: &[PathBuf]) -> Vec<&str> {
    paths.iter().map(|path| path.file_name().and_then(|name| name.to_str()).expect("a plain name")).collect()
}

/// The settings inside a picture.
fn settings_of(path: &Path) -> Value {
    let file = std::io::BufReader::new(fs::File::open(path).expect("a picture"));
    let mut reader = png::Decoder::new(file).read_info().expect("a PNG");
    reader.finish().expect("a whole PNG");
    let chunks = &reader.info().utf8_text;
    let chunk = chunks.iter().find(|chunk| chunk.keyword == "jedi").expect("a chunk named jedi");
    serde_json::from_str(&chunk.get_text().expect("text")).expect("JSON")
}

#[test]
fn one_picture_carries_its_settings_inside_and_beside_it() {
    let room = Room::new();
    let toy = format!("{}=a red robot", at("toy.png"));
    let [path] = &room.pictures("out", &["--ref", &toy, "--prompt", "the robot in the snow", "--seed", "7"])[..] else {
        panic!("one picture")
    };
    assert_eq!(names(std::slice::from_ref(path)), ["0001-the-robot-in-the-snow-7.png"]);
    assert_eq!(pixels(path).dimensions(), (32, 32));
    let settings = settings_of(path);
    let sidecar = fs::read(path.with_extension("json")).expect("a sidecar");
    assert_eq!(settings, serde_json::from_slice::<Value>(&sidecar).expect("JSON"));
    assert_eq!(settings["prompt"], "the robot in the snow");
    assert_eq!((&settings["seed"], &settings["steps"], &settings["size"]), (&7.into(), &2.into(), &32.into()));
    assert_eq!(settings["guidance"], serde_json::json!({"kind": "joint", "scale": 3.0}));
    assert_eq!((&settings["coupled"], &settings["device"]), (&true.into(), &"cpu".into()));
    assert_eq!(settings["references"][0]["caption"], "a red robot");
    assert_eq!(settings["references"][0]["sha256"].as_str().map(str::len), Some(64));
    let left: Vec<_> = fs::read_dir(room.path("out")).expect("the folder").collect();
    assert_eq!(left.len(), 2, "nothing but the picture and its sidecar: {left:?}");
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_does_not() {
    let room = Room::new();
    let toy = at("toy.png");
    let run = |out: &str, seed: &str| {
        let paths = room.pictures(out, &["--ref", &toy, "--prompt", "a robot", "--seed", seed]);
        fs::read(&paths[0]).expect("a picture")
    };
    let first = run("a", "3");
    assert!(first == run("b", "3"));
    assert!(first != run("c", "4"));
}

/// A picture depends on its prompt, its seed and the references, not on what is painted beside it.
#[test]
fn a_picture_is_the_same_in_any_batch() {
    let room = Room::new();
    let toy = at("toy.png");
    let alone = room.pictures("alone", &["--ref", &toy, "--prompt", "a robot", "--seed", "5"]);
    let flags = ["--ref", &toy, "--prompt", "a cat", "--prompt", "a robot", "--num-images", "3", "--seed", "4"];
    let many = room.pictures("many", &flags);
    assert_eq!(
        names(&many),
        [
            "0001-a-cat-4.png",
            "0002-a-cat-5.png",
            "0003-a-cat-6.png",
            "0004-a-robot-4.png",
            "0005-a-robot-5.png",
            "0006-a-robot-6.png"
        ]
    );
    assert!(pixels(&alone[0]) == pixels(&many[4]));
    let different: BTreeSet<Vec<u8>> = many.iter().map(|path| pixels(path).into_raw()).collect();
    assert_eq!(different.len(), 6);
}

#[test]
fn a_joint_set_couples_its_pictures() {
    let room = Room::new();
    let flags = ["--prompt", "a robot", "--prompt", "a cat", "--num-images", "2", "--seed", "9"];
    let joint = room.pictures("joint", &[&flags[..], &["--joint"]].concat());
    assert_eq!(names(&joint), ["0001-a-robot-9.png", "0002-a-robot-10.png", "0003-a-cat-11.png", "0004-a-cat-12.png"]);
    let single = room.pictures("single", &["--prompt", "a robot", "--seed", "9"]);
    assert!(pixels(&joint[0]) != pixels(&single[0]), "the set's other pictures must be seen");
    let uncoupled = room.pictures("uncoupled", &[&flags[..], &["--joint", "--uncoupled"]].concat());
    assert!(pixels(&uncoupled[0]) == pixels(&single[0]), "uncoupled, a picture is alone");
}

#[test]
fn references_and_captions_and_every_guidance_change_the_picture() {
    let room = Room::new();
    let toy = at("toy.png");
    let captioned = format!("{toy}=a robot");
    let runs: [&[&str]; 7] = [
        &[],
        &["--ref", &toy],
        &["--ref", &captioned],
        &["--ref", &toy, "--ref", &toy],
        &["--ref", &toy, "--guidance", "text-first", "--image-scale", "5"],
        &["--ref", &toy, "--guidance", "image-first", "--text-scale", "5"],
        &["--ref", &toy, "--guidance", "text-only"],
    ];
    let picture = |(number, flags): (usize, &&[&str])| {
        let paths = room.pictures(&number.to_string(), &[&["--prompt", "a cat"], *flags].concat());
        pixels(&paths[0]).into_raw()
    };
    let different: BTreeSet<Vec<u8>> = runs.iter().enumerate().map(picture).collect();
    assert_eq!(different.len(), runs.len());
}

#[test]
fn a_plain_model_takes_references_without_training_and_says_so() {
    let room = Room::new();
    let toy = at("toy.png");
    let with = room.sample_with("plain", "with", &["--prompt", "a cat", "--ref", &toy]);
    let without = room.sample_with("plain", "without", &["--prompt", "a cat"]);
    assert!(with.stderr.contains("training-free") && !without.stderr.contains("training-free"), "{}", with.stderr);
    assert!(pixels(Path::new(done(&with).trim())) != pixels(Path::new(done(&without).trim())));
}

#[test]
fn a_grid_shows_references_beside_results() {
    let room = Room::new();
    let toy = at("toy.png");
    let flags = ["--ref", &toy, "--prompt", "a cat", "--prompt", "a dog", "--num-images", "2", "--grid"];
    let paths = room.pictures("out", &flags);
    assert_eq!((paths.len(), names(&paths)[4]), (5, "grid.png"));
    let grid = pixels(&paths[4]);
    // Three columns and two rows of 32 pixels with 2 between.
    assert_eq!(grid.dimensions(), (3 * 34 - 2, 2 * 34 - 2));
    let cell = |column: u32, row: u32| image::imageops::crop_imm(&grid, 34 * column, 34 * row, 32, 32).to_image();
    assert!(cell(0, 0) == pixels(Path::new(&toy)) && cell(0, 1) == cell(0, 0));
    assert!(cell(1, 0) == pixels(&paths[0]) && cell(2, 1) == pixels(&paths[3]));
}

#[test]
fn json_is_one_object_a_line() {
    let room = Room::new();
    let outcome = room.sample("out", &["--prompt", "a cat", "--num-images", "2", "--json"]);
    let lines: Vec<Value> =
        done(&outcome).lines().map(|line| serde_json::from_str(line).expect("JSON on every line")).collect();
    assert_eq!(lines.len(), 2);
    for (line, seed) in lines.iter().zip(0..) {
        assert!(Path::new(line["path"].as_str().expect("a path")).is_file());
        assert_eq!((&line["prompt"], &line["seed"]), (&"a cat".into(), &seed.into()));
    }
}

#[test]
fn numbering_goes_on_in_a_folder_and_nothing_is_replaced() {
    let room = Room::new();
    let first = room.pictures("out", &["--prompt", "a cat"]);
    let bytes = fs::read(&first[0]).expect("a picture");
    let second = room.pictures("out", &["--prompt", "a cat", "--scale", "2"]);
    assert_eq!((names(&first), names(&second)), (vec!["0001-a-cat-0.png"], vec!["0002-a-cat-0.png"]));
    assert!(fs::read(&first[0]).expect("the first picture still") == bytes);
}

/// At this size 32 sets of a reference and a target go through the network at once; one is left for a second batch.
/// Products of large matrices are summed in other portions than those of small ones, which moves the last bit of an f32
/// (7e-6 measured in latents of up to 8) and with it, here and there, the rounding of a pixel.
#[test]
fn a_run_of_several_batches_gives_the_pictures_of_one() {
    let room = Room::new();
    let toy = at("toy.png");
    let (many, saved) = (["--ref", &toy, "--prompt", "a cat", "--size", "64"], room.path("latents.safetensors"));
    let all = room.pictures("all", &[&many[..], &["--num-images", "33", "--save-latents", &saved]].concat());
    assert_eq!((all.len(), names(&all)[32]), (33, "0033-a-cat-32.png"));
    for (seed, picture) in [("0", &all[0]), ("32", &all[32])] {
        let alone = pixels(&room.pictures(seed, &[&many[..], &["--seed", seed]].concat())[0]);
        let mut pairs = alone.as_raw().iter().zip(pixels(picture).into_raw());
        assert!(pairs.all(|(a, b)| a.abs_diff(b) <= 1), "seed {seed}");
    }
    let latents = read_safetensors(Path::new(&saved)).expect("saved latents");
    assert_eq!(latents["latents"].dims(), [33, 4, 16, 16]);
}

#[test]
fn an_interrupted_run_leaves_nothing_half_written() {
    let room = Room::new();
    let (model, out) = (at("joint"), room.path("out"));
    let args =
        ["sample", "--model", &model, "--out", &out, "--prompt", "a cat", "--steps", "1000", "--num-images", "9"];
    let child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    // Signals are caught before the folder is made.
    while !Path::new(&out).exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill starts");
    assert!(sent.success());
    let output = child.wait_with_output().expect("it ends");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("interrupted; 0 of 9 pictures are done"), "{message}");
    assert_eq!(fs::read_dir(&out).expect("the folder").count(), 0);
}

#[test]
fn one_picture_may_have_a_path_of_its_own() {
    let room = Room::new();
    let paths = room.pictures("new/cat.png", &["--prompt", "a cat"]);
    assert_eq!(paths, [PathBuf::from(room.path("new/cat.png"))]);
    assert!(Path::new(&room.path("new/cat.json")).is_file());
    let again = room.sample("new/cat.png", &["--prompt", "a cat"]);
    assert!(again.stderr.contains("cat.png: is there already and will be replaced"), "{}", again.stderr);
    let own = room.path("new/cat.png");
    let onto_itself = room.sample("new/cat.png", &["--prompt", "a cat", "--ref", &own]);
    assert_eq!(onto_itself.code, Some(2));
    assert!(onto_itself.stderr.contains("is a reference"), "{}", onto_itself.stderr);
}

/// `target` alone decides without references; with them, the same noise in and out of a batch gives the same latents.
#[test]
fn given_noise_replaces_the_seed_and_latents_are_saved() {
    let room = Room::new();
    let toy = at("toy.png");
    let noise = room.path("noise.safetensors");
    let normal = |purpose: &str, shape: &[usize]| Rng::new(1, purpose, 0).normal_tensor(shape).expect("a tensor");
    let target = normal("target", &[2, 4, 8, 8]);
    let reference = normal("reference", &[2, 1, 4, 8, 8]);
    let tensors = [("target".to_owned(), target.clone()), ("reference".to_owned(), reference.clone())];
    write_tensors(Path::new(&noise), &tensors.into(), &[]).expect("a writable folder");
    let run = |out: &str, flags: &[&str]| {
        let latents = room.path(&format!("{out}.safetensors"));
        let all = ["--ref", &toy, "--prompt", "a cat", "--save-latents", &latents];
        room.pictures(out, &[&all, flags].concat());
        let latents = read_safetensors(Path::new(&latents)).expect("saved latents").remove("latents").expect("latents");
        (latents.dims().to_vec(), latents.flatten_all().expect("values").to_vec1::<f32>().expect("f32"))
    };
    let (dims, both) = run("both", &["--noise", &noise, "--num-images", "2"]);
    assert_eq!(dims, [2, 4, 8, 8]);
    assert!(both.iter().all(|value| value.is_finite()));
    // The seed has no say.
    assert!(run("seed", &["--noise", &noise, "--num-images", "2", "--seed", "99"]).1 == both);
    assert!(run("drawn", &["--num-images", "2"]).1 != both);
    let one = [
        ("target".to_owned(), target.get(1).and_then(|t| t.unsqueeze(0)).expect("the second")),
        ("reference".to_owned(), reference),
    ];
    write_tensors(Path::new(&noise), &one.into(), &[]).expect("a writable folder");
    assert!(run("second", &["--noise", &noise]).1 == both[both.len() / 2..]);
}

#[test]
fn the_model_folder_may_name_its_scale() {
    let room = Room::new();
    let model = room.path("model");
    tiny_model::write(Path::new(&model), Family::Joint);
    fs::write(Path::new(&model).join("jedi.json"), r#"{"guidance_scale": 1.5}"#).expect("a writable folder");
    let scale = |out: &str, flags: &[&str]| {
        let out = room.path(out);
        let args = ["sample", "--model", &model, "--out", &out, "--prompt", "a cat", "--steps", "2", "--json"];
        let outcome = jedi(args.iter().chain(flags));
        serde_json::from_str::<Value>(done(&outcome)).expect("JSON")["guidance"]["scale"].as_f64()
    };
    assert_eq!(scale("own", &[]), Some(1.5));
    assert_eq!(scale("flag", &["--scale", "4"]), Some(4.0));
}

/// On CPUs without a tile unit the two are the same.
#[test]
fn bf16_gives_nearly_the_same_latents_and_says_so() {
    let room = Room::new();
    let toy = at("toy.png");
    let run = |dtype: &str| {
        let latents = room.path(&format!("{dtype}.safetensors"));
        let flags = ["--ref", &toy, "--prompt", "a cat", "--seed", "5", "--save-latents", &latents, "--dtype", dtype];
        let paths = room.pictures(dtype, &flags);
        assert_eq!(settings_of(&paths[0])["dtype"], dtype);
        let latents = read_safetensors(Path::new(&latents)).expect("saved latents").remove("latents").expect("latents");
        latents.flatten_all().expect("values").to_vec1::<f32>().expect("f32")
    };
    let (single, half) = (run("f32"), run("bf16"));
    let square = |values: &[f32]| values.iter().map(|v| f64::from(v * v)).sum::<f64>();
    let difference: Vec<f32> = single.iter().zip(&half).map(|(a, b)| a - b).collect();
    let relative = (square(&difference) / square(&single)).sqrt();
    assert!(relative < 2e-2, "{relative:e}"); // design: bf16 against f32
}

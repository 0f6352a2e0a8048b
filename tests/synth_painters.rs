//! `jedi synth-data` with Stable Diffusion in the stages collage, compose and stylise, from outside, on tiny networks of random
//! weights: what their pictures show means nothing, so what is held to is that each stage asks its model for the right thing.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "parity/drawn.rs"]
mod drawn;
mod harness;
#[path = "harness/lenient.rs"]
mod lenient;
#[path = "harness/room.rs"]
mod room;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use harness::{Outcome, jedi};
use image::RgbImage;
use jedi::config;
use jedi::data::{Dataset, ImageSet, Layout};
use jedi::device::Runtime;
use jedi::diffusion::{Guidance, Sampler};
use jedi::model::Files;
use jedi::model::write::write_tensors;
use jedi::rng::Rng;
use jedi::sample::{Edit, Editor, Pipeline, SampleSettings, SetRequest};
use jedi::synth::settings::SynthConfig;
use lenient::LENIENT;
use room::Room;
use serde_json::{Value, json};

const N_SETS: usize = 3;
/// Of the composed pictures; the models were made for 16.
const SIDE: u32 = 32;

/// Small pictures, their masks, and copies left in.
const SMALL: [&str; 5] =
    ["instances.max_instances=4", "affinity.copies_model=", "sets.masks=true", "collage.size=64", "compose.size=32"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        match path.is_dir() {
            true => copy_folder(&path, &to),
            false => assert!(fs::copy(path, to).is_ok()),
        }
    }
}

fn facts(file: &Path) -> Value {
    let bytes = fs::read(file).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    serde_json::from_str(&header.metadata().as_ref().unwrap()["facts"]).unwrap()
}

/// A golden's network of drawn weights as a transformers folder.
fn write_network(name: &str, folder: &Path, processing: &Value) {
    let facts = facts(&golden(name).with_extension("safetensors"));
    let shapes: BTreeMap<String, Vec<usize>> = serde_json::from_value(facts["shapes"].clone()).unwrap();
    write_tensors(&folder.join("model.safetensors"), &drawn::tensors(&shapes), &[]).unwrap();
    fs::write(folder.join("config.json"), facts["config"].to_string()).unwrap();
    fs::write(folder.join("preprocessor_config.json"), processing.to_string()).unwrap();
}

/// Three painters and the eyes: `xl`, `inpainting`, `edit`, `dino`, `sam`.
fn room() -> Room {
    let room = Room::new();
    let path = |name: &str| PathBuf::from(room.path(name));
    copy_folder(&golden("tiny-xl"), &path("xl"));
    for name in ["inpainting", "edit"] {
        copy_folder(&golden("tiny-pipeline"), &path(name));
        fs::remove_file(path(name).join("jedi.json")).unwrap();
    }
    let unet = path("edit").join("unet");
    fs::copy(golden("unet-edit.safetensors"), unet.join("diffusion_pytorch_model.safetensors")).unwrap();
    fs::write(unet.join("config.json"), facts(&golden("unet-edit.safetensors"))["config"].to_string()).unwrap();
    let small = json!({"size": {"shortest_edge": 48, "longest_edge": 80}});
    write_network("grounding-plain", &path("dino"), &small);
    fs::copy(golden("tiny-grounding/tokenizer.json"), path("dino/tokenizer.json")).unwrap();
    let processing = json!({"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}});
    write_network("sam", &path("sam"), &processing);
    room
}

impl Room {
    fn files(&self, name: &str) -> Files {
        Files::Folder(self.path(name).into())
    }

    fn synth(&self, out: &str, flags: &[&str]) -> Outcome {
        let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/synth-toybox.toml");
        let (out, n_sets) = (self.path(out), N_SETS.to_string());
        jedi(
            ["synth-data", "--config", config, "--device", "cpu", "--sets", &n_sets, "--out", &out].iter().chain(flags),
        )
    }

    /// With all three painters; `changes` are further settings.
    fn painted(&self, out: &str, changes: &[&str], flags: &[&str]) -> Outcome {
        let own = [
            ("collage.model", "xl"),
            ("compose.model", "inpainting"),
            ("stylise.model", "edit"),
            ("instances.detector", "dino"),
            ("instances.segmenter", "sam"),
        ]
        .map(|(setting, folder)| format!("{setting}={}", self.path(folder)));
        let steps = ["collage.steps=3", "collage.sampler=euler", "compose.steps=2", "stylise.steps=2"];
        let mut args = flags.to_vec();
        let settings =
            own.iter().map(String::as_str).chain(LENIENT).chain(SMALL).chain(steps).chain(changes.iter().copied());
        settings.for_each(|setting| args.extend(["--set", setting]));
        self.synth(out, &args)
    }

    fn sets(&self, out: &str) -> Vec<ImageSet> {
        let sets = Dataset::open(&self.path(out), Layout::Sets).unwrap();
        (0..sets.n_samples()).map(|index| sets.read(index).unwrap()).collect()
    }
}

fn done(outcome: &Outcome) {
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
}

/// A member of the tar that a stage left.
fn member(tar: &str, name: &str) -> Vec<u8> {
    let mut archive = tar::Archive::new(fs::File::open(tar).unwrap());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap().to_str() == Some(name) {
            let mut bytes = vec![];
            entry.read_to_end(&mut bytes).unwrap();
            return bytes;
        }
    }
    panic!("{tar} has no {name}");
}

#[test]
fn all_three_painters_make_sets_of_what_each_is_asked_for() {
    let room = room();
    let work = room.path("work");
    let planned = room.painted("sets", &[], &["--dry-run"]);
    done(&planned);
    assert!(planned.stdout.contains("text_guidance = 7.5"), "{}", planned.stdout);
    for (stage, model) in [("collage", "xl"), ("compose", "inpainting"), ("stylise", "edit")] {
        let line = format!("{stage}: {} (0.0 GB on disk)", room.path(model));
        assert!(planned.stderr.contains(&line), "{line} is not in\n{}", planned.stderr);
    }
    let outcome = room.painted("sets", &[], &["--work", &work]);
    done(&outcome);
    let sets = room.sets("sets");
    assert_eq!(sets.len(), N_SETS, "{}", outcome.stderr);
    for stage in ["collage", "compose", "stylise"] {
        let model = &sets[0].metadata["stages"][stage]["models"][0];
        assert_eq!(model["sha256"].as_str().map(str::len), Some(64), "{model}");
    }

    // The collage is what the model paints of the prompt with the set's own noise.
    let record: Value =
        serde_json::from_slice(&member(&format!("{work}/00000/b0000.r0.prompts.tar"), "00000001.0/record.json"))
            .unwrap();
    let collage = member(&format!("{work}/00000/b0000.r0.collage.tar"), "00000001.0/collage.png");
    let description = record["prompts"]["object"].as_str().unwrap();
    let request = SetRequest {
        references: vec![],
        prompts: vec![format!("a sheet of photos of the same {description} in several poses, on a plain background")],
        negative_prompt: String::new(),
        seeds: vec![Rng::new(0, "synth collage", 1 << 16).next_u64()],
    };
    let settings = SampleSettings {
        sampler: Sampler::Euler { is_karras: false },
        ..SampleSettings::new(Guidance::Joint { scale: 5.0 }, 3, 64)
    };
    let pipeline = Pipeline::load(&room.files("xl"), &Runtime::cpu(), true).unwrap();
    let expected = pipeline.paint(&[request], &settings, None, &mut || Ok(())).unwrap().images.remove(0);
    assert!(image::load_from_memory(&collage).unwrap().to_rgb8() == expected);

    // The same sets from the same scenes without styles: what is styled is the edit of what is not.
    done(&room.painted("plain", &["stylise.probability=0"], &["--work", &work]));
    let editor = Editor::load(&room.files("edit"), &Runtime::cpu()).unwrap();
    let guidance = Guidance::ImageFirst { text_scale: 7.5, image_scale: 1.5 };
    let (mut n_styled, mut n_plain) = (0, 0);
    for (set, plain) in sets.iter().zip(room.sets("plain")) {
        assert!(set.images.len() >= 2);
        let attempt = set.metadata["attempt"].as_u64().unwrap();
        let number = set.metadata["number"].as_u64().unwrap() << 16 | attempt;
        for (idx, (image, before)) in set.images.iter().zip(&plain.images).enumerate() {
            assert_eq!(image.dimensions(), (SIDE, SIDE));
            let Some(style) = set.metadata["pictures"][idx]["style"].as_str() else {
                n_plain += 1;
                assert!(image == before);
                continue;
            };
            n_styled += 1;
            assert!(set.captions[idx].ends_with(&format!(", {style}")), "{}", set.captions[idx]);
            let mut rng = Rng::new(0, &format!("synth stylise 0 {idx}"), number);
            assert!(rng.chance(0.5));
            assert_eq!(*rng.pick(&jedi::synth::painting::STYLES), style);
            let instruction = format!("turn it into {style}");
            let edit = Edit { image: before.clone(), instruction, seed: rng.next_u64() };
            let settings = SampleSettings::new(guidance, 2, SIDE as usize);
            let expected = editor.edit(&[edit], &settings, None, &mut || Ok(())).unwrap().images.remove(0);
            assert!(*image == expected, "picture {idx} of set {number}");
        }
    }
    assert!(n_styled > 0 && n_plain > 0, "{n_styled} {n_plain}");

    // One stage after the other, models loaded and dropped: the same bytes.
    done(&room.painted("slowly", &["sets.memory_gb=0"], &[]));
    assert!(fs::read(room.path("slowly/00000.tar")).unwrap() == fs::read(room.path("sets/00000.tar")).unwrap());
}

/// Whether a pixel was painted is seen where nothing was known.
fn n_grey(image: &RgbImage) -> usize {
    image.pixels().filter(|pixel| pixel.0 == [127; 3]).count()
}

#[test]
fn a_model_in_one_file_paints_the_same_scenes_around_drawn_toys() {
    let room = room();
    let (model, file) = (room.path("inpainting"), room.path("inpainting.safetensors"));
    done(&jedi(["convert", "--model", &model, "--out", &file]));
    let synth = |out: &str, model: &str| {
        let setting = format!("compose.model={model}");
        let flags =
            ["--set", &setting, "--set", "compose.steps=2", "--set", "compose.size=32", "--set", "sets.masks=true"];
        done(&room.synth(out, &flags));
        room.sets(out)
    };
    let (from_folder, from_file) = (synth("folder", &model), synth("file", &file));
    assert!(!from_folder.is_empty());
    for (set, other) in from_folder.iter().zip(&from_file) {
        assert!(set.images == other.images && set.captions == other.captions);
        for (image, mask) in set.images.iter().zip(&set.masks) {
            assert!(n_grey(image) < 20, "{} pixels were not painted", n_grey(image));
            assert!(mask.pixels().any(|pixel| pixel.0[0] == 255));
        }
    }
    assert_eq!(from_folder.len(), from_file.len());
}

#[test]
fn what_does_not_go_is_told_by_the_option() {
    let room = room();
    let [xl, inpainting, edit] = ["xl", "inpainting", "edit"].map(|name| room.path(name));
    drawn::picture(9, 6).save(room.path("picture.png")).unwrap();
    let set = |option: &str, value: &str| format!("{option}={value}");
    for (settings, message) in [
        (vec![set("compose.model", &edit)], "its U-Net is InstructPix2Pix (8 channels: noisy 4, picture 4)"),
        (vec![set("collage.model", &inpainting)], "its U-Net is inpainting (9 channels"),
        (vec![set("stylise.model", &xl)], "this stage takes InstructPix2Pix (8 channels)"),
        (vec![set("stylise.model", &room.path("dino"))], "is no whole model folder (diffusers layout): no unet/"),
        (
            vec![set("collage.model", &xl), set("collage.size", "20")],
            "collage.size = 20: this model takes multiples of 8",
        ),
        (
            vec![set("stylise.model", &edit), set("stylise.size", "33")],
            "stylise.size = 33: this model takes multiples of 2",
        ),
        (vec![set("compose.model", "gone")], "compose.model gone: is no model that this stage knows; use toybox, or a"),
        (vec![set("collage.sampler", "heun")], "unknown variant `heun`"),
        (
            vec![set("stylise.styles", "[\"as a fresco\"]")],
            "\"as a fresco\" is no style of filter; it knows: as a pencil",
        ),
        (vec![set("sets.dtype", "bf16")], "sets.dtype: bf16 and f16 are for GPUs"),
    ] {
        let flags: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting.as_str()]).collect();
        let outcome = room.synth("wrong", &flags);
        assert_eq!(outcome.code, Some(2), "{settings:?}: {}", outcome.stderr);
        let option = settings.last().unwrap().split('=').next().unwrap();
        assert!(outcome.stderr.contains(message), "{settings:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(option), "{settings:?}: {}", outcome.stderr);
    }
    let broken = set("collage.model", &room.path("picture.png"));
    let outcome = room.synth("wrong", &["--set", &broken]);
    assert!(outcome.code == Some(1) && outcome.stderr.contains("collage.model"), "{}", outcome.stderr);
    assert!(!Path::new(&room.path("wrong")).exists());
}

#[test]
fn the_config_of_the_papers_pipeline_names_a_model_for_each_stage() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/synth-sdxl.toml");
    let settings: SynthConfig = config::load(&path, &[]).unwrap();
    settings.validate().unwrap();
    // §3.1: "photos of the same", CLIP above 0.95, styles at 0.5.
    assert!(settings.collage.prompt.contains("photos of the same {prompt}"));
    assert_eq!((settings.affinity.threshold, settings.stylise.probability), (0.95, 0.5));
    let models = [
        &settings.prompts.model,
        &settings.collage.model,
        &settings.instances.detector,
        &settings.instances.segmenter,
        &settings.affinity.model,
        &settings.compose.model,
        &settings.stylise.model,
        &settings.caption.model,
    ];
    assert!(models.iter().all(|model| model.contains('/')), "{models:?}");
}

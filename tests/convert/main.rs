//! `jedi convert` and single files, from outside: every family that jedi tells apart, from a diffusers folder to Stable
//! Diffusion's own layout and back, with and without what jedi itself writes into the metadata.

#[path = "../harness/mod.rs"]
mod harness;
mod model;
#[path = "../harness/room.rs"]
mod room;
#[path = "../tiny_model/mod.rs"]
mod tiny_model;
mod xl;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use harness::{Outcome, jedi};
use jedi::model::Files;
use jedi::model::convert::NETWORKS;
use jedi::model::files::read_safetensors;
use jedi::model::write::{write_json, write_tensors};
use jedi::rng::Rng;
use model::{Kind, Model, SD1, SD2, XL, tokenizer};
use room::Room;
use serde_json::{Value, json};
use tiny_model::Family;

fn done(outcome: &Outcome) -> &str {
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    outcome.stdout.trim()
}

fn convert(model: &str, out: &str, flags: &[&str]) -> Outcome {
    jedi(["convert", "--model", model, "--out", out].iter().chain(flags))
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).and_then(|tensor| tensor.flatten_all()?.to_vec1()).expect("values")
}

/// Every tensor of every network, by diffusers' names.
fn networks(files: &Files) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let mut all = BTreeMap::new();
    for part in NETWORKS.iter().filter(|part| files.contains(&format!("{part}/config.json"))) {
        for (name, tensor) in files.tensors(part).expect("weights").0 {
            all.insert(format!("{part}/{name}"), (tensor.dims().to_vec(), values(&tensor)));
        }
    }
    all
}

fn folder(path: &str) -> Files {
    Files::Folder(path.into())
}

/// What the networks make of given inputs; the file to compare.
fn eps(room: &Room, path: &str, model: &Model) -> Vec<f32> {
    let in_channels = model.in_channels;
    let normal = |purpose: &str, shape: &[usize]| Rng::new(7, purpose, 0).normal_tensor(shape).expect("a tensor");
    let mut inputs = BTreeMap::from([
        ("noisy".to_owned(), normal("noisy", &[2, 4, 4, 4])),
        ("timesteps".to_owned(), Tensor::new(&[500i64], &Device::Cpu).expect("a tensor")),
        ("context".to_owned(), normal("context", &[2, 5, model.context_width()])),
    ]);
    if model.kind == Kind::Xl {
        inputs.insert("text_embeds".into(), normal("text_embeds", &[2, model::POOLED]));
        let sizes = [[64f32, 48., 0., 8., 64., 64.]; 2];
        inputs.insert("time_ids".into(), Tensor::new(&sizes, &Device::Cpu).expect("a tensor"));
    }
    if in_channels > 4 {
        inputs.insert("reference".into(), normal("reference", &[2, 4, 4, 4]));
    }
    if in_channels == 9 {
        inputs.insert("mask".into(), Tensor::ones((2, 1, 4, 4), DType::F32, &Device::Cpu).expect("a tensor"));
    }
    let (file, out) = (room.path("in.safetensors"), room.path("out.safetensors"));
    write_tensors(Path::new(&file), &inputs, &[("set_size", "2".into())]).expect("a writable folder");
    done(&jedi(["inspect", "eps", "--model", path, "--inputs", &file, "--outputs", &out]));
    values(&read_safetensors(Path::new(&out)).expect("the outputs")["eps"])
}

fn context(room: &Room, model: &str, flags: &[&str]) -> Vec<f32> {
    let out = room.path("text.safetensors");
    let args = ["inspect", "text", "--model", model, "--prompt", "a photo of the dog", "--outputs", &out];
    done(&jedi(args.iter().chain(flags)));
    let outputs = read_safetensors(Path::new(&out)).expect("the outputs");
    let names = ["tokens", "context", "tokens_2", "text_embeds"];
    names.iter().filter_map(|name| outputs.get(*name)).flat_map(values).collect()
}

fn describe(model: &str) -> String {
    done(&jedi(["inspect", "checkpoint", model])).to_owned()
}

#[test]
fn every_family_goes_into_a_file_and_is_found_out_from_its_tensors_alone() {
    for (name, model, says) in [
        ("sd1", SD1, "family: plain (4 channels, as Stable Diffusion)"),
        ("sd1-inpainting", Model { in_channels: 9, ..SD1 }, "family: inpainting (9 channels"),
        ("instruct-pix2pix", Model { in_channels: 8, ..SD1 }, "family: InstructPix2Pix (8 channels"),
        ("sd2", SD2, "prediction: epsilon"),
        ("sd2-v", Model { prediction: "v_prediction", ..SD2 }, "prediction: v_prediction"),
        ("sd2-inpainting", Model { in_channels: 9, ..SD2 }, "family: inpainting (9 channels"),
        ("xl", XL, "text_encoder_2: "),
        ("xl-v", Model { prediction: "v_prediction", ..XL }, "text_encoder_2: "),
        ("xl-inpainting", Model { in_channels: 9, ..XL }, "family: inpainting (9 channels"),
    ] {
        let room = Room::new();
        let (own, file, bare, back) =
            (room.path("own"), room.path("file.safetensors"), room.path("bare.safetensors"), room.path("back"));
        model.write(Path::new(&own));
        assert_eq!(done(&convert(&own, &file, &[])), file);
        model.without_metadata(&file, &bare);
        assert!(describe(&bare).contains(says), "{name}: {}", describe(&bare));

        let tokenizer = tokenizer();
        let expected = (eps(&room, &own, &model), context(&room, &own, &[]));
        assert_eq!(eps(&room, &file, &model), expected.0, "{name}");
        assert_eq!(eps(&room, &bare, &model), expected.0, "{name}");
        assert_eq!(context(&room, &file, &[]), expected.1, "{name}");
        assert_eq!(context(&room, &bare, &["--tokenizer", &tokenizer]), expected.1, "{name}");

        done(&convert(&bare, &back, &["--tokenizer", &tokenizer]));
        assert_eq!(networks(&folder(&back)), networks(&folder(&own)), "{name}");
        let networks = NETWORKS.iter().map(|network| format!("{network}/config.json"));
        let configs = networks.chain(["scheduler/scheduler_config.json".to_owned()]);
        for config in configs.filter(|config| folder(&own).contains(config)) {
            let (found, expected): (Value, Value) =
                (folder(&back).json(&config).expect("JSON"), folder(&own).json(&config).expect("JSON"));
            assert_eq!(found, expected, "{name}: {config}");
        }
        assert_eq!(context(&room, &back, &[]), expected.1, "{name}");
        // Without a version diffusers does not open a pipeline for inpainting: KeyError, in its `from_pretrained`.
        let index: Value = folder(&back).json("model_index.json").expect("an index");
        assert!(index["_diffusers_version"].is_string(), "{name}: {index}");
        let class = index["_class_name"].as_str().expect("a pipeline");
        assert_eq!(class.contains("Inpaint"), model.in_channels == 9, "{name}: {class}");
        assert_eq!(class.contains("XL"), model.kind == Kind::Xl, "{name}: {class}");
        let second = if model.kind == Kind::Xl { json!("CLIPTextModelWithProjection") } else { Value::Null };
        assert_eq!((&index["text_encoder_2"][1], index["tokenizer_2"].is_array()), (&second, model.kind == Kind::Xl));
    }
}

#[test]
fn a_single_file_samples_with_its_own_tokenizer_or_one_that_is_named_or_lies_beside_it() {
    let room = Room::new();
    let (own, file, bare) = (room.path("own"), room.path("file.safetensors"), room.path("bare.safetensors"));
    SD1.write(Path::new(&own));
    done(&convert(&own, &file, &[]));
    SD1.without_metadata(&file, &bare);
    let sample = |model: &str, out: &str, flags: &[&str]| {
        let out = room.path(out);
        let args = ["sample", "--model", model, "--prompt", "a dog", "--steps", "2", "--size", "16", "--out", &out];
        (jedi(args.iter().chain(flags)), out)
    };
    let picture = |(outcome, path): (Outcome, String)| {
        done(&outcome);
        image::open(path).expect("a picture").into_rgb8()
    };
    let expected = picture(sample(&own, "own.png", &[]));
    assert_eq!(picture(sample(&file, "file.png", &[])), expected);
    assert_eq!(picture(sample(&bare, "named.png", &["--tokenizer", &tokenizer()])), expected);
    assert_eq!(picture(sample(&bare, "model.png", &["--tokenizer", &own])), expected);

    let (outcome, _) = sample(&bare, "none.png", &[]);
    assert_eq!((outcome.code, outcome.stderr.lines().count()), (Some(2), 1), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("a single file has no tokenizer; give --tokenizer DIR"), "{}", outcome.stderr);
    fs::create_dir(room.path("tokenizer")).expect("a writable folder");
    for name in ["vocab.json", "merges.txt"] {
        fs::copy(Path::new(&tokenizer()).join(name), room.path(&format!("tokenizer/{name}"))).expect("a file");
    }
    assert_eq!(picture(sample(&bare, "beside.png", &[])), expected);
}

#[test]
fn dtypes_and_shards_change_the_files_and_not_the_model() {
    let room = Room::new();
    let own = room.path("own");
    SD1.write(Path::new(&own));
    let expected = networks(&folder(&own));
    let shards = room.path("shards");
    done(&convert(&own, &shards, &["--max-shard-size", "300KB"]));
    assert_eq!(networks(&folder(&shards)), expected);
    let files: Vec<_> = fs::read_dir(Path::new(&shards).join("unet")).expect("a folder").collect();
    let count = files.len() - 2;
    assert!(count > 1, "{files:?}");
    let (mut total, mut largest_value) = (0, 0);
    for i in 1..=count {
        let file = Path::new(&shards).join(format!("unet/diffusion_pytorch_model-{i:05}-of-{count:05}.safetensors"));
        let tensors = read_safetensors(&file).expect("a shard");
        let sizes: Vec<usize> = tensors.values().map(|tensor| 4 * tensor.elem_count()).collect();
        assert!(sizes.len() == 1 || sizes.iter().sum::<usize>() <= 300_000, "{file:?}");
        total += sizes.iter().sum::<usize>();
        largest_value = largest_value.max(sizes.len());
    }
    assert!(largest_value > 1, "a tensor a file");
    let index: Value = folder(&shards).json("unet/diffusion_pytorch_model.safetensors.index.json").expect("an index");
    assert_eq!(index["metadata"]["total_size"], json!(total));

    for (dtype, tolerance, name) in [("f16", 1e-3, "F16"), ("bf16", 1e-2, "BF16")] {
        let (half, whole) = (room.path(&format!("{dtype}.safetensors")), room.path(&format!("{dtype}-f32")));
        done(&convert(&own, &half, &["--dtype", dtype]));
        let said = describe(&half);
        assert!(said.contains("single file") && said.contains(&format!("parameters, {name}, ")), "{said}");
        done(&convert(&half, &whole, &["--dtype", "f32"]));
        for (name, (shape, found)) in networks(&folder(&whole)) {
            let (expected_shape, expected) = &expected[&name];
            assert_eq!(&shape, expected_shape, "{name}");
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() <= tolerance * expected.abs() + 1e-7, "{name}: {found}, {expected}");
            }
        }
    }
}

#[test]
fn a_plain_model_becomes_a_joint_one_that_predicts_the_same() {
    let room = Room::new();
    let (plain, joint, file) = (room.path("plain"), room.path("joint"), room.path("joint.safetensors"));
    SD1.write(Path::new(&plain));
    done(&convert(&plain, &joint, &["--joint"]));
    done(&convert(&plain, &file, &["--joint"]));
    let nine = Model { in_channels: 9, ..SD1 };
    for model in [&joint, &file] {
        let said = describe(model);
        assert!(said.contains("family: joint (9 channels") && said.contains("trained steps: 0"), "{said}");
        let (found, expected) = (eps(&room, model, &nine), eps(&room, &plain, &SD1));
        let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= 1e-5 * largest, "{found}, {expected}");
        }
    }
    // A model for inpainting has the channels already.
    let (inpainting, joint) = (room.path("inpainting"), room.path("from-inpainting.safetensors"));
    nine.write(Path::new(&inpainting));
    done(&convert(&inpainting, &joint, &["--joint"]));
    assert!(describe(&joint).contains("family: joint (9 channels"));
    assert_eq!(eps(&room, &joint, &nine), eps(&room, &inpainting, &nine));
    let pix2pix = room.path("pix2pix");
    Model { in_channels: 8, ..SD1 }.write(Path::new(&pix2pix));
    let outcome = convert(&pix2pix, &room.path("refused"), &["--joint"]);
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("--joint: InstructPix2Pix (8 channels"), "{}", outcome.stderr);
}

#[test]
fn what_is_predicted_can_be_told() {
    let room = Room::new();
    let (own, file, bare, told) =
        (room.path("own"), room.path("f.safetensors"), room.path("b.safetensors"), room.path("told.safetensors"));
    Model { prediction: "v_prediction", ..SD2 }.write(Path::new(&own));
    done(&convert(&own, &file, &[]));
    assert!(describe(&file).contains("metadata modelspec.prediction_type = v\n"), "{}", describe(&file));
    SD2.without_metadata(&file, &bare);
    let tokenizer = tokenizer();
    let outcome = convert(&bare, &told, &["--tokenizer", &tokenizer, "--prediction", "epsilon"]);
    done(&outcome);
    assert!(outcome.stderr.contains("taken to predict v by the spread"), "{}", outcome.stderr);
    assert!(describe(&told).contains("prediction: epsilon"), "{}", describe(&told));
}

#[test]
fn a_trained_model_keeps_all_that_it_says_of_itself() {
    let room = Room::new();
    let (file, back) = (room.path("toybox.safetensors"), room.path("back"));
    done(&convert("toybox", &file, &[]));
    let said = describe(&file);
    let toybox = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/toybox/model");
    let info: serde_json::Value = Files::Folder(toybox.clone()).json("jedi.json").expect("what it says of itself");
    let trained = format!("trained steps: {}", info["trained_steps"]);
    assert!(said.contains("family: joint (33 channels") && said.contains(&trained), "{said}");
    assert!(said.contains("tokenizer: there") && said.contains("bytes, sha256 "), "{said}");
    done(&convert(&file, &back, &[]));
    assert_eq!(networks(&folder(&back)), networks(&Files::Folder(toybox.clone())));
    for name in ["jedi.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "unet/config.json"] {
        assert_eq!(
            fs::read(Path::new(&back).join(name)).expect(name),
            fs::read(toybox.join(name)).expect(name),
            "{name}"
        );
    }
}

/// Python's loader looks for every part that `model_index.json` names.
#[test]
fn parts_that_are_not_written_are_crossed_out() {
    let room = Room::new();
    let (own, out) = (room.path("own"), room.path("out"));
    tiny_model::write(Path::new(&own), Family::Plain);
    let index = json!({
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"], "requires_safety_checker": true,
    });
    write_json(&Path::new(&own).join("model_index.json"), &index).expect("a writable folder");
    done(&convert(&own, &out, &[]));
    let written: Value = folder(&out).json("model_index.json").expect("an index");
    for absent in ["safety_checker", "feature_extractor"] {
        assert_eq!(written[absent], json!([null, null]));
    }
    assert_eq!((&written["unet"], &written["_class_name"]), (&index["unet"], &index["_class_name"]));
}

#[test]
fn what_cannot_be_converted_is_refused_and_nothing_is_written_over() {
    let room = Room::new();
    let (file, full) = (room.path("there.safetensors"), room.path("full"));
    fs::write(&file, "there").expect("a writable folder");
    fs::create_dir(&full).expect("a writable folder");
    fs::write(room.path("full/a"), "there").expect("a writable folder");
    let new = room.path("new.safetensors");
    for (out, flags, message) in [
        (&file, &[][..], "there.safetensors: is there already"),
        (&full, &[], "full: is not empty"),
        (&room.path("full/a"), &[], "full/a: is a file; name a folder"),
        (&new, &["--max-shard-size", "1MB"], "--max-shard-size: a single file is not split"),
        (&new, &["--max-shard-size", "many"], "use a number and a unit"),
        (&new, &["--tokenizer", &full], "holds neither vocab.json and merges.txt nor tokenizer.json"),
    ] {
        let outcome = convert("toybox", out, flags);
        assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
        assert!(outcome.stderr.contains(message) && outcome.stdout.is_empty(), "{}", outcome.stderr);
    }
    assert_eq!(fs::read(&file).expect("the file"), b"there");
    assert!(!Path::new(&new).exists());
    let pickle = room.path("sd.ckpt");
    fs::write(&pickle, "").expect("a writable folder");
    let outcome = convert(&pickle, &new, &[]);
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.stderr.contains("sd.ckpt: is a Python pickle") && outcome.stderr.contains("python3 -c"));
}

//! What `jedi sample` does not take, or takes with a word.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::Tensor;
use image::Rgb;
use jedi::model::files::read_safetensors;
use jedi::model::write::write_tensors;
use jedi::rng::Rng;

use crate::harness::jedi;
use crate::tiny_model::{self, Family};
use crate::{Room, at, done, toy};

#[test]
fn pictures_that_need_a_word_are_taken_with_that_word() {
    let room = Room::new();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let deep = image::ImageBuffer::<Rgb<u16>, _>::from_pixel(32, 32, Rgb([65535u16, 257, 0]));
    deep.save(room.path("deep.png")).expect("a 16-bit picture");
    toy(48, 32).save(room.path("wide.png")).expect("a picture");
    let cmyk = fixtures.join("cmyk.jpg").display().to_string();
    let animated = fixtures.join("animated.webp").display().to_string();
    let (deep, wide) = (room.path("deep.png"), room.path("wide.png"));
    let flags = ["--prompt", "a cat", "--ref", &cmyk, "--ref", &animated, "--ref", &deep, "--ref", &wide];
    let outcome = room.sample("out", &flags);
    done(&outcome);
    for (file, word) in [
        ("cmyk.jpg", "CMYK turned into RGB"),
        ("animated.webp", "only its first frame"),
        ("deep.png", "reduced to 8"),
        ("wide.png", "48×32 cropped to the middle 32×32"),
    ] {
        let has = |line: &str| line.contains(file) && line.contains(word);
        assert!(outcome.stderr.lines().any(has), "{file}: {}", outcome.stderr);
    }
}

#[test]
fn empty_and_long_prompts_are_taken_with_a_word() {
    let room = Room::new();
    let empty = room.sample("empty", &["--prompt", ""]);
    assert!(done(&empty).contains("0001-picture-0.png"));
    assert!(empty.stderr.contains("--prompt: is empty"), "{}", empty.stderr);
    let long = format!("{} on the beach", "a robot and ".repeat(8));
    let long = room.sample("long", &["--prompt", &long]);
    done(&long);
    assert!(long.stderr.contains("too long") && long.stderr.contains("the beach\""), "{}", long.stderr);
}

#[test]
fn wrong_requests_are_refused_before_the_sampling_starts() {
    let room = Room::new();
    let toy = at("toy.png");
    fs::write(room.path("file"), "").expect("a file");
    let bytes = fs::read(&toy).expect("the reference");
    fs::write(room.path("cut.png"), &bytes[..bytes.len() / 2]).expect("a file");
    toy_file(&room, "tiny.png", 12);
    let (missing, cut, tiny) = (room.path("missing.png"), room.path("cut.png"), room.path("tiny.png"));
    let (no_noise, bad_latents) = (room.path("none.safetensors"), room.path("file/latents.safetensors"));
    let cases: [(i32, &str, &[&str], &str); 11] = [
        (2, "out", &["--ref", &missing], "missing.png: no such file"),
        (1, "out", &["--ref", &cut], "cut.png: is broken or cut off"),
        (1, "out", &["--ref", &tiny], "tiny.png: 12×12 pixels are too few"),
        (2, "out", &["--size", "36"], "--size 36: this model takes multiples of 8 pixels, such as 32"),
        (2, "out", &["--text-scale", "2"], "--text-scale 2: works with --guidance text-first"),
        (2, "out", &["--guidance", "text-only", "--image-scale", "2"], "--image-scale 2: works with"),
        (2, "x.png", &["--num-images", "2"], "x.png: is one file for 2 pictures"),
        (1, "file/out", &[], "file/out: cannot be written"),
        (1, "out", &["--save-latents", &bad_latents], "file/latents.safetensors: cannot be written"),
        (2, "out", &["--noise", &no_noise], "none.safetensors: no such file"),
        (2, "out", &["--model", "no-such-model"], "--model no-such-model: no such folder"),
    ];
    for (code, out, flags, message) in cases {
        let (model, out) = (at("joint"), room.path(out));
        let mut args = vec!["sample", "--out", &out, "--prompt", "a cat", "--steps", "2"];
        if !flags.contains(&"--model") {
            args.extend(["--model", &model]);
        }
        args.extend(flags);
        let outcome = jedi(args);
        assert_eq!(outcome.code, Some(code), "{flags:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(message), "{flags:?}: {}", outcome.stderr);
        assert!(outcome.stderr.lines().last().is_some_and(|line| line.starts_with("error: ")), "{}", outcome.stderr);
        assert!(outcome.stdout.is_empty(), "{flags:?}");
    }
    let pictures = fs::read_dir(room.path("out")).map_or(0, |entries| entries.count());
    assert_eq!(pictures, 0, "nothing was painted");
}

/// It takes a picture to edit, for which `sample` has no flag.
#[test]
fn a_network_of_instruct_pix2pix_is_refused_before_its_weights_are_read() {
    let room = Room::new();
    let model = room.path("model");
    tiny_model::write(Path::new(&model), Family::Plain);
    let config = Path::new(&model).join("unet/config.json");
    let plain = fs::read_to_string(&config).expect("a config");
    let eight = plain.replace("\"in_channels\": 4", "\"in_channels\": 8");
    assert_ne!(eight, plain);
    fs::write(&config, eight).expect("a writable folder");
    let outcome = jedi(["sample", "--model", &model, "--out", &room.path("out"), "--prompt", "a cat", "--steps", "2"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("in_channels 8 is InstructPix2Pix's"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("`jedi inspect eps` runs"), "{}", outcome.stderr);
}

/// They were once missed when the networks were loaded, without the folder's name.
#[test]
fn a_folder_of_xl_without_its_second_parts_is_refused_by_name() {
    let room = Room::new();
    let whole = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-xl");
    for (left_out, message) in
        [("text_encoder_2", "no text_encoder_2/config.json"), ("tokenizer_2", "no tokenizer_2/vocab.json")]
    {
        let model = room.path(left_out);
        copy_folder(&whole, Path::new(&model), left_out);
        let outcome = jedi(["sample", "--model", &model, "--out", &room.path("out"), "--prompt", "a cat"]);
        assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
        assert!(outcome.stderr.contains(&format!("--model {model}: is no whole model")), "{}", outcome.stderr);
        assert!(outcome.stderr.contains(message), "{}", outcome.stderr);
    }
}

fn copy_folder(from: &Path, to: &Path, left_out: &str) {
    fs::create_dir_all(to).expect("a writable folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name");
        match path.is_dir() {
            true if name == left_out => {}
            true => copy_folder(&path, &to.join(name), left_out),
            false => drop(fs::copy(&path, to.join(name)).expect("a file")),
        }
    }
}

/// The numbers of a GPU's formats are not the CPU's.
#[test]
fn a_number_format_that_the_device_lacks_is_refused_with_the_way_out() {
    let room = Room::new();
    let outcome = room.sample("out", &["--prompt", "a cat", "--dtype", "f16"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("--dtype f16: on a GPU only; on the CPU leave it out (f32)"), "{}", outcome.stderr);
    for dtype in ["f32", "bf16"] {
        done(&room.sample(dtype, &["--prompt", "a cat", "--dtype", dtype]));
    }
}

#[test]
fn noise_of_another_shape_is_refused_by_name() {
    let room = Room::new();
    let toy = at("toy.png");
    let noise = room.path("noise.safetensors");
    for (tensor, shape, message) in [
        ("other", vec![1, 4, 8, 8], "tensor target is missing"),
        ("target", vec![2, 4, 8, 8], "tensor target is [2, 4, 8, 8], this run needs [1, 4, 8, 8]"),
        ("target", vec![1, 4, 8, 8], "tensor reference [2, 1, 4, 8, 8] is missing"),
    ] {
        let tensors = [(tensor.to_owned(), Rng::new(1, "n", 0).normal_tensor(&shape).expect("a tensor"))];
        write_tensors(Path::new(&noise), &tensors.into(), &[]).expect("a writable folder");
        let outcome = room.sample("out", &["--prompt", "a cat", "--ref", &toy, "--noise", &noise]);
        assert_eq!(outcome.code, Some(1));
        assert!(outcome.stderr.contains(message), "{}", outcome.stderr);
    }
}

#[test]
fn checkpoints_that_do_not_fit_are_refused_with_the_tensor() {
    let room = Room::new();
    let model = room.path("model");
    tiny_model::write(Path::new(&model), Family::Joint);
    let file = Path::new(&model).join("unet/diffusion_pytorch_model.safetensors");
    let whole = read_safetensors(&file).expect("the weights");
    let name = "mid_block.attentions.0.proj_in.weight";
    let refusal = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut tensors: BTreeMap<_, _> =
            whole.iter().map(|(name, tensor)| (name.clone(), tensor.copy().expect("a copy"))).collect();
        change(&mut tensors);
        write_tensors(&file, &tensors, &[]).expect("a writable folder");
        let outcome =
            jedi(["sample", "--model", &model, "--out", &room.path("out"), "--prompt", "a cat", "--steps", "2"]);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("unet/diffusion_pytorch_model.safetensors: "), "{}", outcome.stderr);
        outcome.stderr
    };
    let missing = refusal(&|tensors| drop(tensors.remove(name)));
    assert!(missing.contains(&format!("tensor {name} is missing")), "{missing}");
    let misshapen = refusal(&|tensors| {
        let tensor = tensors[name].narrow(0, 0, 3).and_then(|tensor| tensor.contiguous()).expect("a part");
        tensors.insert(name.to_owned(), tensor);
    });
    assert!(misshapen.contains(&format!("tensor {name} has shape [3, 16")), "{misshapen}");
    let extra = refusal(&|tensors| drop(tensors.insert("adapter.weight".to_owned(), tensors[name].clone())));
    assert!(extra.contains("do not belong to this network, the first is adapter.weight"), "{extra}");
    fs::write(&file, "not weights").expect("a writable folder");
    let outcome = jedi(["sample", "--model", &model, "--out", &room.path("out"), "--prompt", "a cat"]);
    assert!(outcome.stderr.contains("not a readable safetensors file"), "{}", outcome.stderr);
}

fn toy_file(room: &Room, name: &str, side: u32) {
    toy(side, side).save(room.path(name)).expect("a writable folder");
}

//! Ways to sample and to write: samplers, restraint, little memory, formats, previews.

use std::fs;
use std::path::Path;

use jedi::model::files::read_safetensors;

use crate::harness::jedi;
use crate::{Room, at, done, pixels, settings_of};

/// The largest difference of the latents of two runs, as a share of the largest value.
fn distance(a: &str, b: &str) -> f32 {
    let values = |path: &str| {
        let latents = read_safetensors(Path::new(path)).expect("saved latents").remove("latents").expect("latents");
        latents.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32")
    };
    let (a, b) = (values(a), values(b));
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    a.iter().zip(&b).fold(0f32, |distance, (a, b)| distance.max((a - b).abs())) / largest
}

#[test]
fn every_sampler_and_every_restraint_changes_the_picture_and_is_recorded() {
    let room = Room::new();
    let toy = at("toy.png");
    let two_scales = ["--guidance", "text-first", "--text-scale", "3", "--image-scale", "6"];
    let runs: [(&[&str], &str, &str); 11] = [
        (&[], "sampler", "\"ddim\""),
        (&["--sampler", "dpm++"], "sampler", "\"dpm++\""),
        (&["--sampler", "dpm++", "--karras"], "karras", "true"),
        (&["--sampler", "euler"], "sampler", "\"euler\""),
        (&["--sampler", "euler-a"], "sampler", "\"euler-a\""),
        (&["--sampler", "unipc"], "sampler", "\"unipc\""),
        (&["--sampler", "unipc", "--karras"], "karras", "true"),
        (&["--guidance-rescale", "0.7"], "guidance", r#"{"kind":"joint","scale":3.0,"rescale":0.7}"#),
        (&["--negative-prompt", "a dog"], "negative_prompt", "\"a dog\""),
        (&two_scales, "guidance", r#"{"kind":"text-first","text_scale":3.0,"image_scale":6.0}"#),
        (
            &[&two_scales[..], &["--normalise-guidance"]].concat(),
            "guidance",
            r#"{"kind":"text-first","text_scale":3.0,"image_scale":6.0,"normalised":true}"#,
        ),
    ];
    let mut pictures = Vec::new();
    for (number, (flags, key, expected)) in runs.iter().enumerate() {
        // Two steps are too few for the methods of higher order to differ.
        let (model, out) = (at("joint"), room.path(&number.to_string()));
        let asked = ["sample", "--model", &model, "--out", &out, "--steps", "5", "--device", "cpu", "--ref", &toy];
        let outcome = jedi(asked.iter().chain(&["--prompt", "a cat"]).chain(*flags));
        let path = Path::new(done(&outcome).trim_end());
        assert_eq!(settings_of(path)[key].to_string(), *expected);
        pictures.push((flags, pixels(path).into_raw()));
    }
    for (number, (flags, picture)) in pictures.iter().enumerate() {
        let twin = pictures[..number].iter().find(|(_, other)| other == picture);
        assert!(twin.is_none(), "{flags:?} paints what {:?} does", twin.map(|twin| &twin.0));
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    let room = Room::new();
    for (out, flags, message) in [
        ("out", &["--karras"][..], "--karras: works with --sampler dpm++, euler or unipc"),
        ("out", &["--karras", "--sampler", "euler-a"], "--karras: works with"),
        ("out", &["--normalise-guidance"], "--normalise-guidance: works with --guidance text-first"),
        ("out", &["--vae-tile", "12"], "--vae-tile 12: this model takes multiples of 16 pixels, such as 16"),
        ("cat.tiff", &[], "cat.tiff: jedi writes .png, .jpg and .webp"),
        ("out", &["--from", "a.png", "--prompts-file", "b.jsonl"], "cannot be used with"),
    ] {
        let outcome = room.sample(out, &[&["--prompt", "a cat"][..], flags].concat());
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{flags:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(message), "{flags:?}: {}", outcome.stderr);
    }
    let no_say = room.sample("out", &["--prompt", "a cat", "--scale", "1", "--negative-prompt", "a dog"]);
    done(&no_say);
    assert!(no_say.stderr.contains("--negative-prompt: has no say"), "{}", no_say.stderr);
}

/// Other batches, so other shapes of products: on CPUs without a tile unit the last bits may differ.
#[test]
fn little_memory_gives_the_same_pictures() {
    let room = Room::new();
    let toy = at("toy.png");
    let run = |name: &str, flags: &[&str]| {
        let latents = room.path(&format!("{name}.safetensors"));
        let all = ["--ref", &toy, "--prompt", "a cat", "--num-images", "3", "--save-latents", &latents];
        (room.pictures(name, &[&all[..], flags].concat()), latents)
    };
    let (all, all_latents) = run("all", &[]);
    let (few, few_latents) = run("few", &["--low-memory"]);
    assert!(distance(&few_latents, &all_latents) < 1e-5);
    assert!(settings_of(&few[1])["low_memory"] == true && settings_of(&all[1])["low_memory"].is_null());
    let mut pairs = pixels(&few[1]).into_raw().into_iter().zip(pixels(&all[1]).into_raw());
    assert!(pairs.all(|(a, b)| a.abs_diff(b) <= 1));
    let again = room.pictures("again", &["--from", &few[1].display().to_string()]);
    assert!(pixels(&again[0]) == pixels(&few[1]));
}

/// Tiles of 32 pixels for a picture of 64: the seams are blended, so that nothing jumps at them.
#[test]
fn large_pictures_go_through_the_autoencoder_in_tiles() {
    let room = Room::new();
    let flags = ["--prompt", "a photo of a robot on the beach", "--model", "toybox", "--steps", "4", "--size", "128"];
    let run = |name: &str, more: &[&str]| {
        let out = room.path(name);
        let all = [&["sample", "--device", "cpu", "--out", &out][..], &flags, more].concat();
        done(&crate::harness::jedi(all)).trim().to_owned()
    };
    let (whole, tiled) = (run("whole.png", &[]), run("tiled.png", &["--vae-tile", "64"]));
    assert_eq!(settings_of(Path::new(&tiled))["vae_tile"], 64);
    assert!(settings_of(Path::new(&whole))["vae_tile"].is_null());
    let (a, b) = (pixels(Path::new(&whole)), pixels(Path::new(&tiled)));
    assert!(a != b && a.dimensions() == b.dimensions());
    let pairs = a.as_raw().iter().zip(b.as_raw());
    let mean = pairs.map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / a.as_raw().len() as f64;
    assert!(mean < 16.0, "tiles are {mean} levels off");
    let frugal = run("frugal.png", &["--low-memory"]);
    assert_eq!(settings_of(Path::new(&frugal))["vae_tile"], 64, "its own size");
}

#[test]
fn the_suffix_chooses_the_format() {
    let room = Room::new();
    let flags = ["--prompt", "a cat", "--seed", "4"];
    let png = &room.pictures("a.png", &flags)[0];
    for (name, magic, worst) in [("a.jpg", &b"\xff\xd8\xff"[..], 40), ("b.webp", b"RIFF", 0)] {
        let path = &room.pictures(name, &flags)[0];
        assert!(fs::read(path).expect("a picture").starts_with(magic), "{name}");
        let pairs = pixels(path).into_raw().into_iter().zip(pixels(png).into_raw());
        let found = pairs.map(|(a, b)| a.abs_diff(b)).max();
        assert!(found <= Some(worst), "{name}: {found:?}");
        let again = room.pictures(&format!("{name}-again.png"), &["--from", &path.display().to_string()]);
        assert!(pixels(&again[0]) == pixels(png), "{name}");
    }
}

#[test]
fn a_preview_shows_the_running_pictures() {
    let room = Room::new();
    let outcome = room.sample("out", &["--prompt", "a cat", "--num-images", "3", "--preview-every", "1"]);
    assert!(outcome.stderr.contains("preview.png: shows the running pictures every 1 steps"), "{}", outcome.stderr);
    assert_eq!(done(&outcome).lines().count(), 3);
    let preview = pixels(Path::new(&room.path("out/preview.png")));
    // Two by two, one place empty: cells of 32 pixels, gaps of 2 and, between groups, 6.
    assert_eq!(preview.dimensions(), (2 * 32 + 6, 2 * 34 - 2));
    done(&room.sample("cat.png", &["--prompt", "a cat", "--preview-every", "2"]));
    assert_eq!(pixels(Path::new(&room.path("cat.preview.png"))).dimensions(), (32, 32));
    done(&room.sample("late", &["--prompt", "a cat", "--preview-every", "3"]));
    assert!(!Path::new(&room.path("late/preview.png")).exists(), "two steps have no third");
}

//! `jedi train` on several sources of real files, of which some are broken.

use std::fs;
use std::path::Path;

use image::RgbImage;
use jedi::data::SetSource;
use jedi::data::set::write_strip;
use jedi::data::shards::ShardWriter;
use jedi::data::{Members, members_from_set};
use jedi::synth::toybox::ToyboxSource;
use jedi::train::ObjectiveKind::Joint;

use super::harness::{Outcome, jedi};
use super::world::{World, bits, metrics};

const SETS: ToyboxSource = ToyboxSource { seed: 3, sets: 12, images: 4, size: 16 };
const STATE: &str = "checkpoints/latest/state/optimizer.safetensors";

/// Strips in a folder, single pictures in two tars, a clip and an object, and the config that mixes them with the toybox.
fn mixed(world: &World, more: &str) -> String {
    let [strips, tars, clips, views] = ["strips", "tars", "clips", "views"].map(|name| world.path(name));
    [&strips, &tars].into_iter().for_each(|folder| fs::create_dir_all(folder).expect("a folder"));
    (0..SETS.sets).for_each(|idx| write_strip(&SETS.read(idx).expect("a set"), &strips).expect("a strip"));
    for shard in 0..2 {
        let mut writer = ShardWriter::create(&tars.join(format!("0000{shard}.tar"))).expect("a tar");
        for idx in 0..6 {
            let set = SETS.read(shard * 6 + idx).expect("a set");
            let mut jpeg = std::io::Cursor::new(vec![]);
            set.images[0].write_to(&mut jpeg, image::ImageFormat::Jpeg).expect("a JPEG");
            let json = format!("{{\"caption\": {:?}, \"aesthetic\": {idx}}}", set.captions[0]);
            let members: Members = [("jpg", jpeg.into_inner()), ("json", json.into_bytes())]
                .map(|(suffix, bytes)| (suffix.to_owned(), bytes))
                .into();
            writer.push(&format!("{shard}{idx}"), &members).expect("a sample");
        }
        writer.finish().expect("a tar");
    }
    for (folder, n) in [(clips.join("one"), 9), (views.join("chair"), 6)] {
        fs::create_dir_all(&folder).expect("a folder");
        for idx in 0..n {
            let grey = image::Rgb([20 * idx as u8; 3]);
            RgbImage::from_pixel(24, 18, grey).save(folder.join(format!("{idx:03}.png"))).expect("a picture");
        }
    }
    fs::write(clips.join("one.txt"), "a grey field").expect("a file");
    let [strips, tars, clips, views] = [strips, tars, clips, views].map(|path| path.display().to_string());
    let config = world.config_text(Joint).replace("source = \"toybox\"\nsets = 6\n", more)
        + &format!(
            "[[data.sources]]\nsource = '{strips}'\nname = 'strips'\nweight = 2\ncrop = 0.7\nvariants = 2\n\
             [[data.sources]]\nsource = '{tars}/{{00000..00001}}.tar'\nname = 'singles'\nlayout = 'single'\n\
             caption = {{ json = 'caption' }}\nfilters = [{{ key = 'aesthetic', min = 1 }}]\nshuffle_window = 1\n\
             [[data.sources]]\nsource = '{clips}'\nname = 'clips'\nlayout = 'clips'\napart = 2.0\nflip = true\n\
             [[data.sources]]\nsource = '{views}'\nname = 'views'\nlayout = 'views'\ncaption.template = 'a {{key}}'\n\
             [[data.sources]]\nsource = 'toybox'\nname = 'toys'\nsets = 9\n"
        );
    let path = world.path("mixed.toml");
    fs::write(&path, config).expect("a file");
    path.display().to_string()
}

/// Without previews, which would take most of the time.
fn train(config: &str, out: &Path, settings: &[&str]) -> Outcome {
    let out = out.display().to_string();
    let mut arguments = vec!["train", "--device", "cpu", "--config", config, "--out", &out];
    arguments.extend(["--set", "run.preview_images=0"]);
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    jedi(arguments)
}

fn assert_done(ended: &Outcome) {
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}

#[test]
fn five_kinds_of_sources_train_alike_with_any_number_of_workers_and_caches() {
    let world = World::new();
    let config = mixed(&world, "");
    let cache = format!("data.cache={}", world.path("cache").display());
    let runs = [
        ("one", vec!["data.workers=1"]),
        ("four", vec!["data.workers=4", "joint.latent_cache_gb=0"]),
        ("filling", vec![cache.as_str()]),
        ("filled", vec![cache.as_str(), "joint.latent_cache_gb=0"]),
    ];
    for (name, settings) in &runs {
        let ended =
            train(&config, &world.path(name), &[&["run.steps=8", "run.validate_every=0"], &settings[..]].concat());
        assert_done(&ended);
        assert!(ended.stderr.contains("singles: its filters pass over 2 of 12 samples"), "{}", ended.stderr);
    }
    let (first, state) = (metrics(&world.path("one")), bits(&world.path("one").join(STATE)));
    for (name, _) in &runs[1..] {
        assert_eq!(metrics(&world.path(name)), first, "{name}");
        assert!(bits(&world.path(name).join(STATE)) == state, "{name}");
    }
    // Latents of what comes again: not those of clips and views, which are cut anew each time.
    let part = world.path("cache/latents/part-000000.bin");
    assert!(fs::metadata(part).unwrap().len() > 10_000);
    assert!(!world.path("cache/latents/part-000001.bin").exists());
}

#[test]
fn texts_of_a_frozen_encoder_come_from_the_cache() {
    let world = World::new();
    let config = world.config_file(Joint).display().to_string();
    let cache = format!("data.cache={}", world.path("cache").display());
    let frozen = ["run.steps=4", "run.validate_every=0", "model.freeze=[\"text_encoder.*\"]", cache.as_str()];
    let part = world.path("cache/texts/part-000000.bin");
    let mut sizes = vec![];
    for name in ["filling", "filled"] {
        assert_done(&train(&config, &world.path(name), &frozen));
        sizes.push(fs::metadata(&part).unwrap().len());
    }
    assert!(sizes[0] > 500 && sizes[0] == sizes[1] && !part.with_file_name("part-000001.bin").exists(), "{sizes:?}");
    assert_eq!(metrics(&world.path("filled")), metrics(&world.path("filling")));
    // One that is trained says something else at each step.
    let (trained, cache) = (world.path("trained"), format!("data.cache={}", world.path("other").display()));
    assert_done(&train(&config, &trained, &["run.steps=4", "run.validate_every=0", "run.preview_images=1", &cache]));
    assert!(trained.join("samples/step-4.png").is_file() && !world.path("filled/samples").exists());
    assert!(world.path("other/latents").is_dir() && !world.path("other/texts").exists());
}

#[test]
fn broken_samples_are_skipped_counted_and_named_while_they_are_few() {
    let world = World::new();
    let config = mixed(&world, "max_bad_fraction = 0.4\n");
    // A picture broken behind its header, captions that are too many, a missing caption, a file that cannot be read, and a
    // tar that is cut off.
    let strip = |name: &str| world.path("strips").join(name);
    let png = fs::read(strip("00000001.png")).unwrap();
    fs::write(strip("00000001.png"), &png[..png.len() * 2 / 3]).unwrap();
    fs::write(strip("00000003.txt"), "a<|split|>b").unwrap();
    fs::remove_file(strip("00000005.txt")).unwrap();
    fs::remove_file(strip("00000007.txt")).unwrap();
    std::os::unix::fs::symlink("/nowhere/at/all", strip("00000007.txt")).unwrap();
    let tar = world.path("tars/00001.tar");
    let bytes = fs::read(&tar).unwrap();
    fs::write(&tar, &bytes[..bytes.len() * 2 / 3]).unwrap();
    let ended = train(&config, &world.path("run"), &["run.steps=30", "run.validate_every=0"]);
    assert_done(&ended);
    for part in [
        "00000003: .txt: 2 captions for 4 pictures",
        "00000005: .txt: the captions are missing",
        "00000007: .txt: No such file or directory",
        "00001.tar: cut off in ",
        "broken, skipped: ",
        "00000001: .png: is broken or cut off",
        "broken samples were met and skipped",
    ] {
        assert!(ended.stderr.contains(part), "{part} is not in: {}", ended.stderr);
    }
    let list = fs::read_to_string(world.path("run/broken-samples.txt")).unwrap();
    assert!(list.lines().any(|line| line.starts_with("strips: ") && line.contains("00000001: .png: ")), "{list}");
    // With fewer allowed, the run does not begin.
    let ended = train(&config, &world.path("other"), &["run.steps=1", "data.max_bad_fraction=0.1"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("broken sets among 12; data.max_bad_fraction = 0.1 allows fewer"),
        "{}",
        ended.stderr
    );
}

#[test]
fn a_sample_that_breaks_behind_its_header_ends_the_run_where_none_is_allowed() {
    let world = World::new();
    let folder = world.path("strips");
    fs::create_dir_all(&folder).unwrap();
    (0..3).for_each(|idx| write_strip(&SETS.read(idx).unwrap(), &folder).unwrap());
    let png = fs::read(folder.join("00000001.png")).unwrap();
    fs::write(folder.join("00000001.png"), &png[..png.len() - 40]).unwrap();
    let config = world.config_file(Joint).display().to_string();
    let ended = train(&config, &world.path("run"), &[&format!("data.source={}", folder.display())]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    for part in ["training stopped at step 0", "data.max_bad_fraction = 0.01", "00000001: .png: is broken or cut off"] {
        assert!(ended.stderr.contains(part), "{part} is not in: {}", ended.stderr);
    }
}

#[test]
fn loose_sets_in_tars_keep_their_order() {
    let world = World::new();
    let tar = world.path("loose.tar");
    let mut writer = ShardWriter::create(&tar).unwrap();
    for idx in 0..4 {
        let set = SETS.read(idx).unwrap();
        let mut members = members_from_set(&set).unwrap();
        members.remove("png");
        for (number, image) in set.images.iter().enumerate() {
            let mut png = std::io::Cursor::new(vec![]);
            image.write_to(&mut png, image::ImageFormat::Png).unwrap();
            members.insert(format!("{number}.png"), png.into_inner());
        }
        writer.push(&set.key, &members).unwrap();
    }
    writer.finish().unwrap();
    let strips = world.path("strips");
    fs::create_dir_all(&strips).unwrap();
    (0..4).for_each(|idx| write_strip(&SETS.read(idx).unwrap(), &strips).unwrap());
    let config = world.config_file(Joint).display().to_string();
    let losses = [("loose", &tar), ("strips", &strips)].map(|(name, data)| {
        let source = format!("data.source={}", data.display());
        assert_done(&train(
            &config,
            &world.path(&format!("run-{name}")),
            &["run.steps=3", "run.validate_every=0", &source],
        ));
        metrics(&world.path(&format!("run-{name}")))
    });
    assert_eq!(losses[0], losses[1]);
}

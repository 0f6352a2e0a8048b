//! `jedi inspect dataset` from outside.

mod harness;

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use harness::{Outcome, jedi};
use image::RgbImage;
use jedi::data::Members;
use jedi::data::shards::ShardWriter;

struct Room(tempfile::TempDir);

impl Room {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn inspect(place: &Path, flags: &[&str]) -> Outcome {
    let place = place.display().to_string();
    jedi(["inspect", "dataset", &place].iter().chain(flags))
}

fn jpeg(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Cursor::new(vec![]);
    let picture = RgbImage::from_fn(width, height, |x, y| image::Rgb([(x as u8).wrapping_mul(3), y as u8, 90]));
    picture.write_to(&mut bytes, image::ImageFormat::Jpeg).expect("a JPEG");
    bytes.into_inner()
}

fn push(writer: &mut ShardWriter, key: &str, files: &[(&str, &[u8])]) {
    let members: Members = files.iter().map(|(suffix, bytes)| (suffix.to_string(), bytes.to_vec())).collect();
    writer.push(key, &members).expect("a sample");
}

/// Two shards: five sets, of which two are broken; the second shard is cut off behind its first set.
fn shards(room: &Room) -> PathBuf {
    let folder = room.path("shards");
    fs::create_dir_all(&folder).expect("a folder");
    let (two, three) = (jpeg(40, 80), jpeg(48, 144));
    let mut writer = ShardWriter::create(&folder.join("0.tar")).expect("a tar");
    push(&mut writer, "good", &[("jpg", &two), ("txt", b"a cat<|split|>the cat <b>again</b>")]);
    push(&mut writer, "many", &[("jpg", &two), ("txt", b"one<|split|>two<|split|>three")]);
    push(&mut writer, "half", &[("jpg", &two[..two.len() - 30]), ("txt", b"one<|split|>two")]);
    push(&mut writer, "none", &[("jpg", &two)]);
    writer.finish().expect("a tar");
    let mut writer = ShardWriter::create(&folder.join("1.tar")).expect("a tar");
    push(&mut writer, "large", &[("jpg", &three), ("txt", b"a<|split|>b<|split|>")]);
    push(&mut writer, "lost", &[("jpg", &three), ("txt", b"a<|split|>b<|split|>c")]);
    writer.finish().expect("a tar");
    let bytes = fs::read(folder.join("1.tar")).expect("a tar");
    fs::write(folder.join("1.tar"), &bytes[..bytes.len() - 3000]).expect("a shorter tar");
    folder
}

#[test]
fn counts_and_broken_samples_are_told() {
    let room = Room::new();
    let ended = inspect(&shards(&room), &[]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    for line in [
        "  samples      5",
        "  sets         2, pictures each: 1 of 2, 1 of 3",
        "  pictures     5, shorter side 40 to 48 pixels, median 48",
        "  captions     5, 5 different, 1 empty,",
        "  passed over  0",
        "  broken       4",
        "sample many: .txt: 3 captions for 2 pictures",
        "sample half: .jpg: the JPEG is cut off",
        "sample none: .txt: the captions are missing",
        "1.tar: cut off in lost.",
        "  lost         about ",
    ] {
        assert!(ended.stdout.contains(line), "{line} is not in: {}", ended.stdout);
    }
    // Headers alone do not tell that a picture is cut off.
    let quick = inspect(&room.path("shards"), &["--quick", "--json"]);
    let found: serde_json::Value = serde_json::from_str(&quick.stdout).expect("JSON");
    assert_eq!((found["sets"].as_u64(), found["broken"].as_array().map(Vec::len)), (Some(3), Some(3)), "{found}");
}

#[test]
fn the_contact_sheet_shows_pictures_captions_and_what_is_broken() {
    let room = Room::new();
    let sheet = room.path("sheet.html");
    let ended = inspect(&shards(&room), &["--html", &sheet.display().to_string()]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let html = fs::read_to_string(sheet).expect("a sheet");
    assert_eq!(html.matches("<img src=\"data:image/jpeg;base64,").count(), 5);
    for part in ["the cat &lt;b&gt;again&lt;/b&gt;", "sample half: .jpg: the JPEG is cut off", "<h2>Broken: 4</h2>"] {
        assert!(html.contains(part), "{part} is not on the sheet");
    }
}

#[test]
fn all_sources_of_a_config_are_looked_at_by_their_rules() {
    let room = Room::new();
    let [singles, clips] = ["singles", "clips"].map(|name| room.path(name));
    fs::create_dir_all(&singles).expect("a folder");
    for (idx, (width, height)) in [(60, 40), (200, 30), (64, 64)].into_iter().enumerate() {
        fs::write(singles.join(format!("{idx}.jpg")), jpeg(width, height)).expect("a file");
        fs::write(singles.join(format!("{idx}.json")), format!("{{\"class\": \"cat {idx}\"}}")).expect("a file");
    }
    fs::create_dir_all(clips.join("a")).expect("a folder");
    (0..9).for_each(|idx| fs::write(clips.join(format!("a/{idx}.jpg")), jpeg(20, 20)).expect("a file"));
    fs::write(clips.join("a.txt"), "a clip").expect("a file");
    let config = room.path("train.toml");
    let text = format!(
        "objective = 'autoencoder'\nmodel = {{ architecture = 'a' }}\nrun = {{ steps = 1, images_per_step = 4 }}\n\
         [[data.sources]]\nsource = '{}'\nname = 'singles'\nlayout = 'single'\nmax_aspect = 2.0\n\
         caption.template = 'a photo of a {{class}}'\n\
         [[data.sources]]\nsource = '{}'\nname = 'clips'\nlayout = 'clips'\n\
         [[data.sources]]\nsource = 'toybox'\nsets = 3\n",
        singles.display(),
        clips.display()
    );
    fs::write(&config, &text).expect("a file");
    let ended = inspect(&config, &["--json"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let found: Vec<serde_json::Value> =
        ended.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let sets: Vec<_> = found.iter().map(|f| (f["source"].as_str().unwrap_or(""), f["sets"].as_u64())).collect();
    assert_eq!(sets, [("singles", Some(2)), ("clips", Some(1)), ("toybox", Some(3))]);
    let passed_over = found[0]["passed_over"][0].as_str().expect("a reason");
    assert!(passed_over.ends_with("/1: 200×30 pixels, max_aspect is 2"), "{passed_over}");
    assert_eq!(found[0]["captions"]["different"].as_u64(), Some(2));
    assert_eq!(found[1]["set_sizes"]["4"].as_u64(), Some(1));

    let ended = inspect(&config, &["--layout", "sets"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    fs::write(&config, text.replace("max_aspect = 2.0", "max_aspect = 0.5")).expect("a file");
    let ended = inspect(&config, &[]);
    assert!(ended.code == Some(2) && ended.stderr.contains("singles: max_aspect = 0.5"), "{}", ended.stderr);
}

#[test]
fn places_without_anything_to_train_on_are_refused() {
    let room = Room::new();
    let ended = inspect(&room.path("nowhere"), &[]);
    assert!(ended.code == Some(1) && ended.stderr.contains("nowhere: no such file or folder"), "{}", ended.stderr);
    let folder = room.path("broken");
    fs::create_dir_all(&folder).expect("a folder");
    fs::write(folder.join("a.jpg"), "no picture").expect("a file");
    fs::write(folder.join("a.txt"), "").expect("a file");
    let ended = inspect(&folder, &[]);
    assert!(
        ended.code == Some(1) && ended.stderr.contains("holds no set that could be trained on"),
        "{}",
        ended.stderr
    );
    assert!(ended.stdout.contains("a: .jpg: is not a picture that jedi reads"), "{}", ended.stdout);
}

/// Videos need a program that is not always there.
#[test]
fn videos_without_ffmpeg_are_refused_with_the_way_out() {
    let room = Room::new();
    let videos = room.path("videos");
    fs::create_dir_all(&videos).expect("a folder");
    fs::write(videos.join("a.mp4"), "moov").expect("a file");
    let place = videos.display().to_string();
    let output = harness::command(["inspect", "dataset", &place, "--layout", "clips"])
        .env("PATH", room.path("empty"))
        .output()
        .expect("the binary starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("videos: holds videos, for which the program ffmpeg must be on the PATH"), "{stderr}");
}

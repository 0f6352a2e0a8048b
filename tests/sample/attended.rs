//! How strongly, and where, a reference is attended to: `--ref-weight` and `--ref-mask`.

use std::path::PathBuf;

use image::{GrayImage, Luma, RgbImage};

use crate::{Room, at, pixels, settings_of};

/// The largest difference of two pictures, in steps of 1/255.
fn distance(a: &RgbImage, b: &RgbImage) -> u8 {
    assert_eq!(a.dimensions(), b.dimensions());
    a.iter().zip(b.iter()).map(|(a, b)| a.abs_diff(*b)).max().expect("pixels")
}

/// A mask in the room, white from `from` to `to` of 32 columns.
fn mask(room: &Room, name: &str, columns: std::ops::Range<u32>) -> String {
    let path = room.path(name);
    let white = |x, _| Luma([if columns.contains(&x) { 255u8 } else { 0 }]);
    GrayImage::from_fn(32, 32, white).save(&path).expect("a writable folder");
    path
}

fn painted(room: &Room, out: &str, flags: &[&str]) -> (PathBuf, RgbImage) {
    let toy = at("toy.png");
    let flags = [&["--ref", &toy, "--prompt", "a cat", "--seed", "3"][..], flags].concat();
    let path = room.pictures(out, &flags).remove(0);
    let picture = pixels(&path);
    (path, picture)
}

#[test]
fn a_weight_goes_from_not_at_all_to_more_than_ever() {
    let room = Room::new();
    let (_, as_ever) = painted(&room, "as-ever", &[]);
    let (path, same) = painted(&room, "one", &["--ref-weight", "1"]);
    assert_eq!(same, as_ever);
    assert!(settings_of(&path)["references"][0].get("weight").is_none(), "1 is what it is anyway");
    // A reference that the new picture cannot attend to is one that it does not see.
    let (_, unseen) = painted(&room, "zero", &["--ref-weight", "0"]);
    let (_, uncoupled) = painted(&room, "uncoupled", &["--uncoupled"]);
    assert!(distance(&unseen, &uncoupled) <= 1, "{}", distance(&unseen, &uncoupled));
    assert!(distance(&uncoupled, &as_ever) > 1);
    let (path, more) = painted(&room, "five", &["--ref-weight", "5"]);
    assert!(distance(&more, &as_ever) > 1);
    assert_eq!(settings_of(&path)["references"][0]["weight"], 5.0);
}

#[test]
fn a_mask_hides_what_is_black_and_is_repeated_with_the_picture() {
    let room = Room::new();
    let (_, as_ever) = painted(&room, "as-ever", &[]);
    let (white, half) = (mask(&room, "white.png", 0..32), mask(&room, "half.png", 0..16));
    assert_eq!(painted(&room, "white", &["--ref-mask", &white]).1, as_ever);
    assert_eq!(painted(&room, "none", &["--ref-mask", "none"]).1, as_ever);
    let (path, half_seen) = painted(&room, "half", &["--ref-mask", &half]);
    assert!(distance(&half_seen, &as_ever) > 1);
    let from = path.display().to_string();
    let repeated = room.pictures("again", &["--from", &from]).remove(0);
    assert_eq!(pixels(&repeated), half_seen);

    mask(&room, "half.png", 0..8);
    let changed = room.sample("changed", &["--from", &from]);
    assert_eq!(changed.code, Some(2));
    assert!(changed.stderr.contains("half.png is not the file any more"), "{}", changed.stderr);
}

#[test]
fn weights_and_masks_that_cannot_be_are_refused() {
    let room = Room::new();
    let (toy, black) = (at("toy.png"), mask(&room, "black.png", 0..0));
    for (flags, message) in [
        (&["--ref-weight", "1", "--ref-weight", "2"][..], "--ref-weight: 2 weights for 1 references"),
        (&["--ref-weight=-1"], "use a number, 0 or more"),
        (&["--ref-mask", "nowhere.png"], "--ref-mask nowhere.png: no such file"),
        (&["--ref-mask", &black], "black.png: is black all over; paint the subject white"),
    ] {
        let outcome = room.sample("out", &[&["--ref", &toy, "--prompt", "a cat"][..], flags].concat());
        assert_eq!(outcome.code, Some(2), "{flags:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(message), "{flags:?}: {}", outcome.stderr);
    }
}

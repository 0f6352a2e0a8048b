//! The same picture again: alone, in a batch, by the picture itself, by a prompts file; and a prompts file that goes on.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use jedi::model::write::write_tensors;
use jedi::rng::Rng;
use serde_json::Value;

use crate::harness::{Outcome, jedi};
use crate::{Room, at, done, names, pixels, settings_of, toy};

const ROBOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/toybox/examples/robot.png");
const CAT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/toybox/examples/cat.png");

impl Room {
    /// `jedi sample` into `<room>/<out>`; of the model inside the program where none is named.
    fn run(&self, out: &str, flags: &[&str]) -> Outcome {
        let out = self.path(out);
        jedi(["sample", "--out", &out, "--device", "cpu"].iter().chain(flags))
    }

    fn paths(&self, out: &str, flags: &[&str]) -> Vec<PathBuf> {
        done(&self.run(out, flags)).lines().map(PathBuf::from).collect()
    }

    fn write(&self, name: &str, text: &str) -> String {
        fs::write(self.path(name), text).expect("a writable folder");
        self.path(name)
    }
}

fn bytes(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Of the model inside the program, to the last bit and by every way; the sampler that adds noise of its own, and one that
/// remembers its steps.
#[test]
fn a_picture_is_the_same_alone_in_a_batch_by_itself_and_by_a_prompts_file() {
    let room = Room::new();
    let prompt = "a photo of a robot on the beach";
    for (name, sampler) in [("euler-a", &["--sampler", "euler-a"][..]), ("dpm++", &["--sampler", "dpm++", "--karras"])]
    {
        let flags = [&["--ref", ROBOT, "--steps", "3", "--prompt", prompt][..], sampler].concat();
        let out = |way: &str| format!("{name}-{way}");
        let alone = room.paths(&out("alone"), &[&flags[..], &["--seed", "7"]].concat());
        let expected = bytes(&alone[0]);
        let batch = [&flags[..], &["--prompt", "a photo of a robot in the snow", "--num-images", "2", "--seed", "6"]];
        let batch = room.paths(&out("batch"), &batch.concat());
        assert!(bytes(&batch[1]) == expected, "{name}: in a batch");
        let json = alone[0].with_extension("json").display().to_string();
        for from in [alone[0].display().to_string(), json] {
            assert!(bytes(&room.paths(&out("itself"), &["--from", &from])[0]) == expected, "{name}: by {from}");
        }
        let line = |prompt: &str, seed: u64| {
            let karras = name == "dpm++";
            format!(
                r#"{{"prompt": "{prompt}", "seed": {seed}, "refs": ["{ROBOT}"], "sampler": "{name}", "karras": {karras}}}"#
            )
        };
        let text = format!("{}\n{}\n", line("a photo of a cat", 1), line(prompt, 7));
        let file = room.write(&format!("{name}.jsonl"), &text);
        let by_file = room.paths(&out("file"), &["--prompts-file", &file, "--steps", "3"]);
        assert!(bytes(&by_file[1]) == expected, "{name}: by a prompts file");
    }
}

#[test]
fn flags_beside_a_picture_win_and_the_rest_is_as_it_was() {
    let room = Room::new();
    let toy = format!("{}=a red robot", at("toy.png"));
    let model = at("joint");
    let made = ["--model", &model, "--ref", &toy, "--steps", "2", "--guidance", "image-first", "--text-scale", "2"];
    let made = [&made[..], &["--image-scale", "4", "--normalise-guidance", "--guidance-rescale", "0.5"]].concat();
    let made = [&made[..], &["--negative-prompt", "a dog", "--fit", "pad"]].concat();
    let old = room.paths("old.png", &[&made[..], &["--prompt", "a cat", "--seed", "3"]].concat());
    let from = old[0].display().to_string();
    for (number, change) in [
        &["--seed", "8"][..],
        &["--prompt", "a robot"],
        &["--steps", "3"],
        &["--text-scale", "3"],
        &["--sampler", "euler", "--karras"],
        &["--normalise-guidance=false"],
        &["--negative-prompt", ""],
    ]
    .into_iter()
    .enumerate()
    {
        let again = room.paths(&format!("{number}/a.png"), &[&["--from", &from][..], change].concat());
        let is_given = |flag: &str| change.contains(&flag) || (flag == "--normalise-guidance" && number == 5);
        let mut flags: Vec<&str> = Vec::new();
        let all = [&made[..], &["--prompt", "a cat", "--seed", "3"]].concat();
        let mut rest = all.as_slice();
        while let [flag, tail @ ..] = rest {
            let length = if *flag == "--normalise-guidance" { 1 } else { 2 };
            if !is_given(flag) {
                flags.extend(&rest[..length]);
            }
            rest = &rest[length..];
            assert!(tail.len() + 1 >= length);
        }
        let fresh = room.paths(&format!("{number}/b.png"), &[&flags[..], change].concat());
        assert!(bytes(&again[0]) == bytes(&fresh[0]), "{change:?}");
        assert!(pixels(&again[0]) != pixels(&old[0]), "{change:?} changes nothing");
    }
    // Another guidance starts with scales of its own.
    let joint = room.paths("joint.png", &["--from", &from, "--guidance", "joint", "--scale", "2"]);
    assert_eq!(settings_of(&joint[0])["guidance"], serde_json::json!({"kind": "joint", "scale": 2.0, "rescale": 0.5}));
}

#[test]
fn a_picture_is_repeated_with_its_own_references_only() {
    let room = Room::new();
    let (model, reference) = (at("joint"), room.path("reference.png"));
    toy(32, 32).save(&reference).expect("a picture");
    let made = ["--model", &model, "--steps", "2", "--ref", &reference, "--prompt", "a cat"];
    let old = room.paths("old.png", &made)[0].display().to_string();
    fs::rename(&reference, room.path("moved.png")).expect("a move");
    let refusal = |flags: &[&str]| {
        let outcome = room.run("new", &[&["--from", &old][..], flags].concat());
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{}", outcome.stderr);
        outcome.stderr
    };
    let gone = refusal(&[]);
    assert!(gone.contains("reference.png is not there; give the file with --ref"), "{gone}");
    toy(40, 40).save(&reference).expect("another picture of that name");
    let other = refusal(&[]);
    assert!(other.contains("reference.png is not the file any more"), "{other}");
    let moved = room.paths("moved", &["--from", &old, "--ref", &room.path("moved.png")]);
    assert!(pixels(&moved[0]) == pixels(Path::new(&old)));
    let plain = room.run("new", &["--from", &at("toy.png")]);
    assert_eq!(plain.code, Some(2));
    assert!(plain.stderr.contains("toy.png: holds no settings of jedi's"), "{}", plain.stderr);
}

#[test]
fn one_picture_of_a_joint_set_is_repeated_alone() {
    let room = Room::new();
    let (model, toy) = (at("joint"), at("toy.png"));
    let flags = ["--model", &model, "--steps", "2", "--ref", &toy, "--joint", "--num-images", "2", "--seed", "5"];
    let set = room.paths("set", &[&flags[..], &["--prompt", "a robot", "--prompt", "a cat"]].concat());
    let third = set[2].display().to_string();
    let again = room.paths("again", &["--from", &third]);
    assert_eq!(again.len(), 1);
    assert!(bytes(&again[0]) == bytes(&set[2]));
    let outcome = room.run("other", &["--from", &third, "--seed", "1"]);
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.stderr.contains("--seed: the picture of --from is one of a set"), "{}", outcome.stderr);
    let other = room.paths("other", &["--from", &third, "--joint", "--seed", "1", "--num-images", "2"]);
    assert_eq!(names(&other), ["0001-a-cat-1.png", "0002-a-cat-2.png"]);
}

#[test]
fn given_noise_is_found_again() {
    let room = Room::new();
    let (model, toy, noise) = (at("joint"), at("toy.png"), room.path("noise.safetensors"));
    let normal = |purpose: &str, shape: &[usize]| Rng::new(1, purpose, 0).normal_tensor(shape).expect("a tensor");
    let write = |seed: &str| {
        let target = ("target".to_owned(), normal(seed, &[2, 4, 8, 8]));
        let tensors = [target, ("reference".to_owned(), normal("reference", &[2, 1, 4, 8, 8]))];
        write_tensors(Path::new(&noise), &tensors.into(), &[]).expect("a writable folder");
    };
    write("target");
    let flags = ["--model", &model, "--steps", "2", "--ref", &toy, "--prompt", "a cat", "--num-images", "2"];
    let both = room.paths("both", &[&flags[..], &["--noise", &noise]].concat());
    let from = both[1].display().to_string();
    assert!(bytes(&room.paths("again", &["--from", &from])[0]) == bytes(&both[1]));
    write("another target");
    let outcome = room.run("other", &["--from", &from]);
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.stderr.contains("is not the noise any more"), "{}", outcome.stderr);
}

/// Three lines of two sizes; the second run makes what is missing, the third what has changed.
#[test]
fn a_prompts_file_goes_on_where_it_was_left() {
    let room = Room::new();
    let (model, toy) = (at("joint"), at("toy.png"));
    let lines = |last: &str| {
        format!(
            "{{\"prompt\": \"a cat\", \"refs\": [{{\"image\": \"{toy}\", \"caption\": \"a toy\"}}], \"seed\": 3}}\n\
             {{\"prompt\": \"a dog\", \"size\": 64}}\n\n\
             {{\"prompt\": \"{last}\", \"refs\": [\"{toy}=a toy\"], \"num_images\": 2, \"steps\": 2}}\n"
        )
    };
    let file = room.write("prompts.jsonl", &lines("a robot"));
    let flags = ["--model", &model, "--steps", "2", "--prompts-file", &file];
    let first = room.paths("out", &flags);
    // What is alike goes together: the lines with a reference, then the one without.
    assert_eq!(names(&first), ["0001-a-cat-3.png", "0002-a-robot-0.png", "0003-a-robot-1.png", "0004-a-dog-0.png"]);
    let alone =
        ["--model", &model, "--steps", "2", "--ref", &format!("{toy}=a toy"), "--prompt", "a robot", "--seed", "1"];
    assert!(bytes(&room.paths("alone", &alone)[0]) == bytes(&first[2]));
    assert_eq!(pixels(&first[3]).dimensions(), (64, 64));

    let all: BTreeSet<Vec<u8>> = first.iter().map(|path| bytes(path)).collect();
    fs::remove_file(&first[1]).expect("a picture to lose");
    let second = room.run("out", &flags);
    let paths: Vec<PathBuf> = done(&second).lines().map(PathBuf::from).collect();
    assert!(second.stderr.contains("3 of 4 pictures are there already"), "{}", second.stderr);
    assert_eq!((paths.len(), names(&paths[3..])), (4, vec!["0005-a-robot-0.png"]));
    assert_eq!(paths.iter().map(|path| bytes(path)).collect::<BTreeSet<_>>(), all);

    room.write("prompts.jsonl", &lines("a horse"));
    let third = room.run("out", &flags);
    assert!(third.stderr.contains("2 of 4 pictures are there already"), "{}", third.stderr);
    assert_eq!(done(&third).lines().count(), 4);
    let fourth = room.run("out", &[&flags[..], &["--json"]].concat());
    let records: Vec<Value> = done(&fourth).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(fourth.stderr.contains("4 of 4"), "{}", fourth.stderr);
    assert!(records.iter().all(|record| Path::new(record["path"].as_str().expect("a path")).is_file()));
}

#[test]
fn wrong_lines_are_refused_with_their_number_before_anything_is_made() {
    let room = Room::new();
    let model = at("joint");
    for (line, message) in [
        ("{\"prompt\": \"a\", \"refs\": [\"missing.png\"]}", "line 2: --ref missing.png: no such file"),
        ("{\"prompt\": \"a\", \"text_scale\": 2}", "line 2: --text-scale 2: works with"),
        ("{\"prompt\": \"a\", \"karras\": true}", "line 2: --karras: works with --sampler dpm++"),
        ("{\"prompt\": \"a\", \"size\": 36}", "line 2: --size 36: this model takes multiples of 8"),
        ("{\"prompt\": \"a\", \"num_steps\": 3}", "line 2: unknown field `num_steps`"),
    ] {
        let file = room.write("prompts.jsonl", &format!("{{\"prompt\": \"fine\"}}\n{line}\n"));
        let outcome = room.run("out", &["--model", &model, "--steps", "2", "--prompts-file", &file]);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{line}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(message), "{line}: {}", outcome.stderr);
    }
    let outcome = room.run("out", &["--model", &model, "--prompts-file", &room.path("none.jsonl")]);
    assert!(outcome.code == Some(2) && outcome.stderr.contains("none.jsonl: no such file"), "{}", outcome.stderr);
}

/// The example toy and its captions by either flag.
#[test]
fn a_caption_belongs_to_its_reference_by_either_flag() {
    let room = Room::new();
    let base = ["--steps", "2", "--prompt", "a photo of a robot on the beach"];
    let (robot, cat) = (format!("{ROBOT}=a robot"), format!("{CAT}=a cat"));
    let joined = room.paths("joined", &[&base[..], &["--ref", &robot, "--ref", &cat]].concat());
    let apart = ["--ref", ROBOT, "--ref-caption", "a robot", "--ref", CAT, "--ref-caption", "a cat"];
    assert!(bytes(&room.paths("apart", &[&base[..], &apart].concat())[0]) == bytes(&joined[0]));
    for (flags, message) in [
        (&["--ref", ROBOT, "--ref-caption", "a", "--ref-caption", "b"][..], "2 captions for 1 references"),
        (&["--ref", &robot, "--ref-caption", "b"], "has the caption \"a robot\" already"),
    ] {
        let outcome = room.run("out", &[&base[..], flags].concat());
        assert!(outcome.code == Some(2) && outcome.stderr.contains(message), "{}", outcome.stderr);
    }
}

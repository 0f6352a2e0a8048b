//! The TensorBoard record, read by a reader of its own.

use std::fs;
use std::path::{Path, PathBuf};

use image::RgbImage;
use jedi::train::ObjectiveKind::Autoencoder;
use jedi::train::{Hooks, train};

use super::world::{World, metrics};

/// The fields of a protobuf message: number and content.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Content<'_>)> {
    let mut fields = vec![];
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let content = match key & 7 {
            0 => Content::Number(varint(&mut bytes)),
            1 => Content::Double(f64::from_le_bytes(take(&mut bytes, 8).try_into().expect("so many bytes"))),
            2 => {
                let length = varint(&mut bytes) as usize;
                Content::Bytes(take(&mut bytes, length))
            }
            5 => Content::Float(f32::from_le_bytes(take(&mut bytes, 4).try_into().expect("so many bytes"))),
            kind => panic!("wire type {kind}"),
        };
        fields.push((key >> 3, content));
    }
    fields
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Content<'a> {
    Number(u64),
    Double(f64),
    Float(f32),
    Bytes(&'a [u8]),
}

impl<'a> Content<'a> {
    fn bytes(self) -> &'a [u8] {
        let Content::Bytes(bytes) = self else { panic!("{self:?} is no message") };
        bytes
    }

    fn number(self) -> u64 {
        let Content::Number(number) = self else { panic!("{self:?} is no number") };
        number
    }
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (head, rest) = bytes.split_at(count);
    *bytes = rest;
    head
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return value;
        }
    }
    panic!("a number without end")
}

fn one<'a>(fields: &[(u64, Content<'a>)], number: u64) -> Option<Content<'a>> {
    fields.iter().find(|(known, _)| *known == number).map(|(_, content)| *content)
}

/// The Castagnoli CRC bit by bit.
fn masked_crc(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// What an event says of its step.
#[derive(Debug, PartialEq)]
enum Said {
    Version(String),
    Start,
    Number(String, f32),
    Picture(String, RgbImage),
}

fn events(path: &Path) -> Vec<(u64, Said)> {
    let bytes = fs::read(path).expect("an event file");
    let (mut rest, mut said) = (&bytes[..], vec![]);
    let crc = |rest: &mut &[u8], of: &[u8]| {
        assert_eq!(take(rest, 4), masked_crc(of).to_le_bytes());
    };
    while !rest.is_empty() {
        let length = take(&mut rest, 8);
        crc(&mut rest, length);
        let event = take(&mut rest, u64::from_le_bytes(length.try_into().expect("so many bytes")) as usize);
        crc(&mut rest, event);
        let event = fields(event);
        let Some(Content::Double(time)) = one(&event, 1) else { panic!("no time") };
        assert!(time > 1.6e9, "{time}");
        let step = one(&event, 2).expect("a step").number();
        if let Some(version) = one(&event, 3) {
            said.push((step, Said::Version(String::from_utf8(version.bytes().to_vec()).expect("UTF-8"))));
        }
        if let Some(session) = one(&event, 7) {
            assert_eq!(fields(session.bytes()), [(1, Content::Number(1))]);
            said.push((step, Said::Start));
        }
        for (number, value) in one(&event, 5).map(|summary| fields(summary.bytes())).unwrap_or_default() {
            assert_eq!(number, 1);
            let value = fields(value.bytes());
            let tag = String::from_utf8(one(&value, 1).expect("a tag").bytes().to_vec()).expect("UTF-8");
            said.push((
                step,
                match one(&value, 2) {
                    Some(Content::Float(number)) => Said::Number(tag, number),
                    _ => {
                        let image = fields(one(&value, 4).expect("a picture").bytes());
                        let size = [1, 2].map(|field| one(&image, field).expect("a size").number() as u32);
                        let png = one(&image, 4).expect("its file").bytes();
                        let picture = image::load_from_memory(png).expect("a picture").into_rgb8();
                        assert_eq!(size, [picture.height(), picture.width()]);
                        Said::Picture(tag, picture)
                    }
                },
            ));
        }
    }
    said
}

fn event_files(run: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(run).expect("a run").map(|entry| entry.expect("a name").path());
    let is_events = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().contains("tfevents"));
    let mut files: Vec<PathBuf> = paths.filter(is_events).collect();
    files.sort();
    files
}

fn picture(steps: u64) -> RgbImage {
    RgbImage::from_fn(9, 5, |x, y| image::Rgb([x as u8, y as u8, steps as u8]))
}

/// One start, stopped after `stop_at` steps.
fn start(world: &World, stop_at: u64) {
    let config = world.config(Autoencoder, &["run.steps=4"]);
    let mut objective = world.objective(&config).expect("an objective");
    let made = std::cell::Cell::new(0);
    let hooks = Hooks {
        on_step: &mut |report| made.set(report.step + 1),
        on_notice: &mut |_| {},
        on_checkpoint: &mut |steps, _| Ok(Some(picture(steps))),
        is_interrupted: &|| made.get() == stop_at,
    };
    train(&config, objective.as_mut(), &world.path("run"), hooks).expect("a run");
}

#[test]
fn each_start_writes_a_file_that_says_what_the_metrics_say() {
    let world = World::new();
    start(&world, 2);
    start(&world, 4);
    let files = event_files(&world.path("run"));
    assert_eq!(files.len(), 2);
    let lines = metrics(&world.path("run"));
    for (file, steps) in files.iter().zip([1..=2u64, 3..=4]) {
        let all = events(file);
        assert_eq!(all[..2], [(0, Said::Version("brain.Event:2".into())), (*steps.start(), Said::Start)]);
        let last = *steps.end();
        assert!(all.contains(&(last, Said::Picture("preview".into(), picture(last)))));
        for step in steps {
            let line = &lines[step as usize - 1];
            for name in ["loss", "lr", "gradient_norm", "validation_loss"] {
                let found = all.iter().find_map(|(at, said)| match said {
                    Said::Number(tag, number) if *at == step && tag == name => Some(*number),
                    _ => None,
                });
                assert_eq!(found, line.get(name).map(|value| value.as_f64().unwrap() as f32), "{name} of {step}");
            }
            let speed = |(at, said): &(u64, Said)| {
                matches!(said, Said::Number(tag, number)
                if *at == step && tag == "images_per_second" && *number > 0.0)
            };
            assert_eq!(all.iter().filter(|each| speed(each)).count(), 1);
        }
        assert!(all[2..].iter().all(|(at, _)| (1..=4).contains(at)));
    }
}

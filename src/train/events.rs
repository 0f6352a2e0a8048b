//! TensorBoard's event files: the record of a run as curves and pictures. Hand-written, as the crates for it are not kept up:
//! records in TFRecord frames, each an `Event` in protobuf (`tensorboard/compat/proto/{event,summary}.proto`).

use std::fs::{File, OpenOptions};
use std::io::{self, Cursor, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use image::{ImageFormat, RgbImage};

/// An event file of one start of a run. Steps are updates made, as checkpoints and previews count them.
pub struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// A new file in `folder`, for a start that has `steps` updates behind it. What earlier files say of later steps is
    /// void: those steps are made again.
    pub fn start(folder: &Path, steps: u64) -> Result<Self> {
        let (file, path) = create_in(folder).with_context(|| format!("{}: no event file", folder.display()))?;
        let mut events = Self { file, path };
        let mut version = vec![];
        bytes_field(&mut version, 3, b"brain.Event:2");
        events.write(0, version)?;
        // A `SessionLog` with status START: readers drop what they have from this step on.
        let mut session = vec![];
        varint_field(&mut session, 1, 1);
        let mut start = vec![];
        bytes_field(&mut start, 7, &session);
        events.write(steps + 1, start)?;
        Ok(events)
    }

    /// Numbers by their names.
    pub fn numbers(&mut self, steps: u64, numbers: &[(String, f64)]) -> Result<()> {
        let mut summary = vec![];
        for (name, number) in numbers {
            let mut value = vec![];
            bytes_field(&mut value, 1, name.as_bytes());
            varint(&mut value, 2 << 3 | 5);
            value.extend((*number as f32).to_le_bytes());
            bytes_field(&mut summary, 1, &value);
        }
        self.write_summary(steps, &summary)
    }

    /// A picture, as PNG.
    pub fn picture(&mut self, steps: u64, name: &str, picture: &RgbImage) -> Result<()> {
        let mut png = Cursor::new(vec![]);
        picture.write_to(&mut png, ImageFormat::Png).with_context(|| self.path.display().to_string())?;
        let mut image = vec![];
        // Height, width and colour space (3: RGB).
        for (field, number) in [(1, picture.height().into()), (2, picture.width().into()), (3, 3)] {
            varint_field(&mut image, field, number);
        }
        bytes_field(&mut image, 4, png.get_ref());
        let (mut value, mut summary) = (vec![], vec![]);
        bytes_field(&mut value, 1, name.as_bytes());
        bytes_field(&mut value, 4, &image);
        bytes_field(&mut summary, 1, &value);
        self.write_summary(steps, &summary)
    }

    fn write_summary(&mut self, steps: u64, summary: &[u8]) -> Result<()> {
        let mut what = vec![];
        bytes_field(&mut what, 5, summary);
        self.write(steps, what)
    }

    /// One event of this moment, in one piece: a reader never finds half of it unless the machine dies.
    fn write(&mut self, step: u64, what: Vec<u8>) -> Result<()> {
        let mut event = vec![];
        varint(&mut event, 1 << 3 | 1);
        event.extend(now().as_secs_f64().to_le_bytes());
        varint_field(&mut event, 2, step);
        event.extend(what);
        let length = (event.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(event.len() + 16);
        record.extend(length);
        record.extend(masked_crc32c(&length).to_le_bytes());
        record.extend(&event);
        record.extend(masked_crc32c(&event).to_le_bytes());
        self.file.write_all(&record).with_context(|| self.path.display().to_string())
    }
}

fn now() -> std::time::Duration {
    // A clock before 1970 is no reason not to train.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Readers take all files with "tfevents" in their names, in the order of the names.
fn create_in(folder: &Path) -> io::Result<(File, PathBuf)> {
    let mut number = 0;
    loop {
        let path = folder.join(format!("events.out.tfevents.{:010}.{number:03}", now().as_secs()));
        match OpenOptions::new().create_new(true).append(true).open(&path) {
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => number += 1,
            other => return Ok((other?, path)),
        }
    }
}

/// Protobuf's base-128 numbers, the lowest digits first.
fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn varint_field(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3);
    varint(out, value);
}

fn bytes_field(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

/// The checksum of TFRecord (`tensorflow/core/lib/hash/crc32c.h`): rotated and shifted, so that the checksum of data that
/// holds checksums stays a good one.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Castagnoli's CRC, RFC 3720.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let (mut crc, mut bit) = (byte as u32, 0);
            while bit < 8 {
                crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
                bit += 1;
            }
            table[byte] = crc;
            byte += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, byte| crc >> 8 ^ TABLE[(crc as u8 ^ byte) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        // RFC 3720, B.4: 32 bytes of zeros, and 0x00 … 0x1f.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&Vec::from_iter(0..32)), 0x46dd_794e);
    }

    #[test]
    fn starts_within_a_second_get_files_of_their_own_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..3).map(|step| EventFile::start(folder.path(), step).unwrap().path).collect();
        let mut sorted = paths.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(paths, sorted);
    }
}

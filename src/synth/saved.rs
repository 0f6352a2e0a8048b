//! What a stage made of a batch, on disk: a tar of records and pictures that people can open too, with the fingerprint of all
//! that it depends on. A run that goes on takes what is there and still valid.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use image::{DynamicImage, GrayImage, ImageFormat, Luma, Rgb, RgbImage, Rgba, RgbaImage};
use serde::{Deserialize, Serialize};

use super::draft::{Draft, Picture, Record};
use super::stage::{Cutout, Stage};
use crate::whole_file::write_whole_with;

/// First member of each tar.
const HEAD: &str = "stage.json";

/// What a tar says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// Of the settings, versions and models of this stage and all before it.
    pub fingerprint: String,
    /// Set numbers that it worked on.
    pub numbers: Vec<u64>,
    /// That the stage took.
    pub seconds: f64,
}

/// Writes what `stage` added to the drafts, whole or not at all.
pub fn write(path: &Path, stage: Stage, head: &Head, drafts: &[Draft]) -> Result<()> {
    write_whole_with(path, |file| {
        let mut tar = tar::Builder::new(file);
        append(&mut tar, HEAD, &serde_json::to_vec_pretty(head)?)?;
        for draft in drafts {
            let folder = format!("{:08}.{}", draft.record.number, draft.record.attempt);
            append(&mut tar, &format!("{folder}/record.json"), &serde_json::to_vec_pretty(&draft.record)?)?;
            for (name, picture) in pictures_of_stage(draft, stage) {
                let mut bytes = Cursor::new(vec![]);
                picture.write_to(&mut bytes, ImageFormat::Png)?;
                append(&mut tar, &format!("{folder}/{name}.png"), bytes.get_ref())?;
            }
        }
        tar.finish()?;
        Ok(())
    })
}

fn append(tar: &mut tar::Builder<impl Write>, name: &str, bytes: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    Ok(tar.append_data(&mut header, name, bytes)?)
}

/// Whether there is a tar at `path` of this stage under these settings, and of these set numbers.
pub fn is_valid(path: &Path, fingerprint: &str, numbers: &[u64]) -> Result<bool> {
    if !path.exists() {
        return Ok(false);
    }
    let head = head(path)?;
    Ok(head.fingerprint == fingerprint && head.numbers == numbers)
}

/// The seconds that the stage took whose tar this is.
pub fn seconds(path: &Path) -> Result<f64> {
    Ok(head(path)?.seconds)
}

fn head(path: &Path) -> Result<Head> {
    let describe = || format!("{}: is no work file; remove it", path.display());
    let mut archive = tar::Archive::new(fs::File::open(path).with_context(describe)?);
    let mut entries = archive.entries().with_context(describe)?;
    let mut first = entries.next().with_context(describe)?.with_context(describe)?;
    let mut bytes = vec![];
    first.read_to_end(&mut bytes).with_context(describe)?;
    serde_json::from_slice(&bytes).with_context(describe)
}

/// The drafts as the last of the tars leaves them; these are of one batch, in the order of the stages.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Draft>> {
    let mut found: BTreeMap<String, BTreeMap<String, Vec<u8>>> = BTreeMap::new();
    for path in paths {
        read_tar(path, &mut found).with_context(|| path.display().to_string())?;
    }
    found.iter().map(|(folder, members)| draft(members).with_context(|| folder.clone())).collect()
}

/// The records alone of one tar.
pub fn records(path: &Path) -> Result<Vec<Record>> {
    let mut found = BTreeMap::new();
    read_tar(path, &mut found).with_context(|| path.display().to_string())?;
    let record =
        |(folder, members): (&String, &BTreeMap<String, Vec<u8>>)| record(members).with_context(|| folder.clone());
    found.iter().map(record).collect()
}

fn record(members: &BTreeMap<String, Vec<u8>>) -> Result<Record> {
    let bytes = members.get("record.json").context("record.json is missing")?;
    serde_json::from_slice(bytes).context("record.json")
}

fn read_tar(path: &Path, found: &mut BTreeMap<String, BTreeMap<String, Vec<u8>>>) -> Result<()> {
    let mut archive = tar::Archive::new(std::io::BufReader::new(fs::File::open(path)?));
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some((folder, member)) = name.split_once('/') else { continue };
        let mut bytes = vec![];
        entry.read_to_end(&mut bytes)?;
        found.entry(folder.to_owned()).or_default().insert(member.to_owned(), bytes);
    }
    Ok(())
}

/// The pictures that a stage adds or changes, by name.
fn pictures_of_stage(draft: &Draft, stage: Stage) -> Vec<(String, DynamicImage)> {
    let mut pictures: Vec<(String, DynamicImage)> = vec![];
    match stage {
        Stage::Prompts | Stage::Affinity | Stage::Caption | Stage::Score => {}
        Stage::Collage => {
            pictures.extend(draft.collage.iter().map(|image| ("collage".to_owned(), image.clone().into())));
            pictures.extend(draft.truth.iter().map(|labels| ("truth".to_owned(), labels.clone().into())));
        }
        Stage::Instances => {
            let cutouts = draft.cutouts.iter().enumerate();
            pictures.extend(cutouts.map(|(idx, cutout)| (instance_name(idx), with_mask(&cutout.image, &cutout.mask))));
        }
        Stage::Compose | Stage::Stylise => {
            for (set_idx, (set, records)) in draft.pictures.iter().zip(&draft.record.sets).enumerate() {
                for (idx, (picture, record)) in set.iter().zip(&records.pictures).enumerate() {
                    if stage == Stage::Compose || record.style.is_some() {
                        pictures.push((picture_name(set_idx, idx), with_mask(&picture.image, &picture.mask)));
                    }
                }
            }
        }
    }
    pictures
}

fn instance_name(idx: usize) -> String {
    format!("instance.{idx}")
}

fn picture_name(set_idx: usize, idx: usize) -> String {
    format!("picture.{set_idx}.{idx}")
}

fn draft(members: &BTreeMap<String, Vec<u8>>) -> Result<Draft> {
    let record = record(members)?;
    let picture = |name: String| -> Result<Option<DynamicImage>> {
        let Some(bytes) = members.get(&format!("{name}.png")) else { return Ok(None) };
        Ok(Some(image::load_from_memory_with_format(bytes, ImageFormat::Png).context(name)?))
    };
    let mut draft = Draft {
        collage: picture("collage".into())?.map(DynamicImage::into_rgb8),
        truth: picture("truth".into())?.map(DynamicImage::into_luma8),
        cutouts: vec![],
        pictures: vec![],
        record,
    };
    for idx in 0..draft.record.instances.len() {
        let Some(found) = picture(instance_name(idx))? else { break };
        let (image, mask) = without_mask(&found.into_rgba8());
        draft.cutouts.push(Cutout { image, mask });
    }
    for (set_idx, set) in draft.record.sets.iter().enumerate() {
        let mut pictures = vec![];
        for idx in 0..set.pictures.len() {
            let Some(found) = picture(picture_name(set_idx, idx))? else { break };
            let (image, mask) = without_mask(&found.into_rgba8());
            pictures.push(Picture { image, mask });
        }
        draft.pictures.push(pictures);
    }
    Ok(draft)
}

/// One picture with the mask as its transparency, so that people see what is cut out.
fn with_mask(image: &RgbImage, mask: &GrayImage) -> DynamicImage {
    let pixel = |x, y| {
        let Rgb([red, green, blue]) = *image.get_pixel(x, y);
        Rgba([red, green, blue, mask.get_pixel(x, y).0[0]])
    };
    RgbaImage::from_fn(image.width(), image.height(), pixel).into()
}

fn without_mask(both: &RgbaImage) -> (RgbImage, GrayImage) {
    let (width, height) = both.dimensions();
    let image = RgbImage::from_fn(width, height, |x, y| {
        let [red, green, blue, _] = both.get_pixel(x, y).0;
        Rgb([red, green, blue])
    });
    (image, GrayImage::from_fn(width, height, |x, y| Luma([both.get_pixel(x, y).0[3]])))
}

#[cfg(test)]
mod tests {
    use super::super::draft::{Found, PictureRecord, SetRecord};
    use super::*;

    fn picture(value: u8) -> (RgbImage, GrayImage) {
        let image = RgbImage::from_fn(9, 7, |x, y| Rgb([x as u8 * 9, y as u8 * 9, value]));
        (image, GrayImage::from_fn(9, 7, |x, _| Luma([x as u8 * 28])))
    }

    fn full_draft(number: u64) -> Draft {
        let mut draft = Draft::new(1, number, 2, "cat".into());
        let ((image, mask), (styled, _)) = (picture(3), picture(200));
        draft.collage = Some(picture(9).0);
        draft.truth = Some(mask.clone());
        draft.record.instances = vec![Found { score: 0.123_456_79, ..Found::default() }];
        draft.cutouts = vec![Cutout { image: image.clone(), mask: mask.clone() }];
        let plain = PictureRecord::default();
        let changed = PictureRecord { style: Some("as a comic".into()), ..plain.clone() };
        draft.record.sets = vec![SetRecord { pictures: vec![plain, changed], pairs: vec![] }];
        draft.pictures = vec![vec![Picture { image, mask: mask.clone() }, Picture { image: styled, mask }]];
        draft
    }

    #[test]
    fn a_draft_comes_back_as_the_stages_left_it() {
        let folder = tempfile::tempdir().unwrap();
        let drafts = [full_draft(3), full_draft(12)];
        let head = Head { fingerprint: "f".into(), numbers: vec![3, 12], seconds: 1.5 };
        let paths: Vec<_> = Stage::ALL.iter().map(|stage| folder.path().join(stage.name())).collect();
        for (stage, path) in Stage::ALL.into_iter().zip(&paths) {
            let mut drafts = drafts.clone();
            if stage == Stage::Compose {
                // What is restyled later looks otherwise here.
                drafts.iter_mut().for_each(|draft| draft.pictures[0][1].image = picture(1).0);
            }
            write(path, stage, &head, &drafts).unwrap();
        }
        assert_eq!(format!("{:?}", read(&paths).unwrap()), format!("{drafts:?}"));
        assert_eq!(seconds(&paths[0]).unwrap(), 1.5);
        assert!(is_valid(&paths[0], "f", &[3, 12]).unwrap());
        assert!(!is_valid(&paths[0], "g", &[3, 12]).unwrap() && !is_valid(&paths[0], "f", &[3]).unwrap());
        assert!(!is_valid(&folder.path().join("none"), "f", &[3, 12]).unwrap());
    }

    #[test]
    fn a_broken_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b000.r0.collage.tar");
        fs::write(&path, "hello").unwrap();
        let message = format!("{:#}", is_valid(&path, "f", &[]).unwrap_err());
        assert!(message.contains("b000.r0.collage.tar: is no work file"), "{message}");
    }
}

//! The end of a shard: the sets that came through go into its tar, the counts and a few pictures of what was accepted and
//! rejected into the report's folder. Everything else is written before the tar, whose being there says that all is done.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use image::imageops::{self, FilterType};
use image::{Rgb, RgbImage};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::draft::Draft;
use super::job::{Job, Shard};
use super::output;
use super::saved;
use super::stage::{Area, Stage};
use super::yields::Yield;
use crate::data::shards::ShardWriter;
use crate::data::{Members, members_from_set, write_png};
use crate::whole_file::write_whole;

/// Folder of the report's parts in the data's folder.
pub const REPORT: &str = "report";
/// Folder of the rejected attempts in the data's folder.
pub const REJECTED: &str = "rejected";

/// Sets, and rejected attempts, of a shard that the report shows.
const SHOWN: usize = 12;
/// Height of the pictures there, in pixels.
const SHOWN_HEIGHT: u32 = 144;

/// Where the results of a batch lie.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The stages of each attempt, in order.
    pub attempts: Vec<Vec<(Stage, PathBuf)>>,
}

/// The report's part of a shard.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardReport {
    /// Its counts.
    pub yields: Yield,
    /// Some of the sets.
    pub accepted: Vec<Sample>,
    /// Some of the rejected attempts.
    pub rejected: Vec<Sample>,
}

/// One picture of the report with what is said of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// File beside the part.
    pub picture: String,
    /// Lines under it.
    pub lines: Vec<String>,
}

/// Writes the shard and all that belongs to it; its counts.
pub fn finish(job: &Job, shard: &Shard, outcomes: &[Outcome], models: &Value) -> Result<Yield> {
    let mut tar = ShardWriter::create(&job.shard_path(shard))?;
    let mut thrown = Thrown::new(job, shard);
    let mut each = |draft: &Draft| -> Result<()> {
        for set in output::sets(draft, job.config.sets.masks, models)? {
            let members = members_from_set(&set).with_context(|| format!("set {}", set.key))?;
            tar.push(&set.key, &members)?;
        }
        thrown.add(draft)
    };
    let sum = report(job, &job.folder.join(REPORT), shard, outcomes, &mut each)?;
    thrown.finish()?;
    tar.finish()?;
    if job.work.is_none() {
        clear(job, shard)?;
    }
    Ok(sum)
}

/// Removes the work of a finished shard, and what it has left in the report of unfinished ones.
pub fn clear(job: &Job, shard: &Shard) -> Result<()> {
    let folder = job.work_folder(shard);
    fs::remove_dir_all(&folder).with_context(|| format!("{}: cannot be removed", folder.display()))?;
    let work = job.work_root();
    let report = work.join(REPORT);
    // Mostly there is none of these; folders go when nothing is in them any more.
    fs::remove_file(report.join(format!("{:05}.json", shard.number))).ok();
    fs::remove_dir_all(report.join(format!("{:05}", shard.number))).ok();
    if fs::remove_dir(&report).is_ok() {
        fs::remove_file(work.join("report.html")).ok();
    }
    fs::remove_dir(work).ok();
    Ok(())
}

/// The counts of a shard that is not finished, and its part of the report, which lies with its work.
pub fn summarise(job: &Job, shard: &Shard, outcomes: &[Outcome]) -> Result<Yield> {
    report(job, &job.work_root().join(REPORT), shard, outcomes, &mut |_| Ok(()))
}

/// Counts, shows `each` draft to the caller and writes the report's part. A set number is done when an attempt came through;
/// the drafts come by number, then by attempt.
fn report(
    job: &Job,
    folder: &Path,
    shard: &Shard,
    outcomes: &[Outcome],
    each: &mut dyn FnMut(&Draft) -> Result<()>,
) -> Result<Yield> {
    let pictures = folder.join(format!("{:05}", shard.number));
    fs::create_dir_all(&pictures).with_context(|| format!("{}: cannot be made", pictures.display()))?;
    let mut part = ShardReport::default();
    let affinity = &job.config.affinity;
    part.yields.within_sets.by = [affinity.model.clone(), affinity.copies_model.clone()];
    part.yields.final_pictures.by = job.config.score_models().map(str::to_owned);
    for outcome in outcomes {
        let mut drafts: Vec<Draft> = vec![];
        for paths in &outcome.attempts {
            for (stage, path) in paths {
                *part.yields.seconds.entry(*stage).or_default() += saved::seconds(path)?;
            }
            let paths: Vec<PathBuf> = paths.iter().map(|(_, path)| path.clone()).collect();
            drafts.extend(saved::read(&paths)?);
        }
        drafts.sort_by_key(|draft| (draft.record.number, draft.record.attempt));
        for (idx, draft) in drafts.iter().enumerate() {
            part.yields.add_draft(draft);
            let is_last = drafts.get(idx + 1).is_none_or(|next| next.record.number != draft.record.number);
            part.yields.skipped += usize::from(is_last && !draft.is_alive());
            part.show(draft, &pictures)?;
            each(draft)?;
        }
    }
    let path = folder.join(format!("{:05}.json", shard.number));
    write_whole(&path, &serde_json::to_vec_pretty(&part)?)?;
    Ok(part.yields)
}

impl ShardReport {
    /// Draws the draft if there is room.
    fn show(&mut self, draft: &Draft, folder: &Path) -> Result<()> {
        let (list, kind) = match draft.is_alive() {
            true => (&mut self.accepted, "accepted"),
            false => (&mut self.rejected, "rejected"),
        };
        if list.len() >= SHOWN {
            return Ok(());
        }
        let Some(collage) = &draft.collage else { return Ok(()) };
        let record = &draft.record;
        let mut row = vec![with_boxes(collage, draft)];
        row.extend(draft.pictures.iter().flatten().map(|picture| picture.image.clone()));
        let file = format!("{kind}-{:08}-{}.png", record.number, record.attempt);
        write_png(&folder.join(&file), &side_by_side(&row))?;
        let mut lines = vec![format!("{:08}: {}", record.number, record.object)];
        lines.extend(record.prompts.as_ref().map(|prompts| prompts.object.clone()));
        if let Some(rejection) = &record.rejection {
            let detail = rejection.detail.as_ref().map_or(String::new(), |detail| format!(" ({detail})"));
            lines.push(format!("{}: {}{detail}", rejection.stage.name(), rejection.reason));
        }
        for set in &record.sets {
            lines.extend(set.pictures.iter().map(|picture| picture.caption.clone()));
        }
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        list.push(Sample { picture: format!("{name}/{file}"), lines });
        Ok(())
    }
}

/// The collage with a rectangle around each thing: green those of the largest subject, orange those of others, blue copies left
/// out, red what was dropped.
fn with_boxes(collage: &RgbImage, draft: &Draft) -> RgbImage {
    let mut picture = collage.clone();
    let thickness = (collage.height() / 128).max(1);
    for dropped in &draft.record.dropped {
        rectangle(&mut picture, dropped.area, thickness, Rgb([220, 30, 30]));
    }
    for found in &draft.record.instances {
        let colour = match found.component {
            Some(0) => Rgb([20, 160, 60]),
            Some(_) => Rgb([240, 140, 20]),
            None => Rgb([40, 90, 220]),
        };
        rectangle(&mut picture, found.area, thickness, colour);
    }
    picture
}

fn rectangle(picture: &mut RgbImage, area: Area, thickness: u32, colour: Rgb<u8>) {
    let (right, bottom) = (area.left + area.width, area.top + area.height);
    for y in area.top..bottom.min(picture.height()) {
        for x in area.left..right.min(picture.width()) {
            let inside = x >= area.left + thickness
                && x + thickness < right
                && y >= area.top + thickness
                && y + thickness < bottom;
            if !inside {
                picture.put_pixel(x, y, colour);
            }
        }
    }
}

fn side_by_side(pictures: &[RgbImage]) -> RgbImage {
    const GAP: u32 = 4;
    let scaled: Vec<RgbImage> = pictures
        .iter()
        .map(|picture| {
            let width = (picture.width() * SHOWN_HEIGHT / picture.height().max(1)).max(1);
            imageops::resize(picture, width, SHOWN_HEIGHT, FilterType::CatmullRom)
        })
        .collect();
    let width = scaled.iter().map(|picture| picture.width() + GAP).sum::<u32>().saturating_sub(GAP);
    let mut row = RgbImage::from_pixel(width.max(1), SHOWN_HEIGHT, Rgb([255; 3]));
    let mut left = 0;
    for picture in &scaled {
        imageops::replace(&mut row, picture, i64::from(left), 0);
        left += picture.width() + GAP;
    }
    row
}

/// The rejected attempts of a shard: collage and record.
struct Thrown {
    path: Option<PathBuf>,
    tar: Option<ShardWriter>,
}

impl Thrown {
    fn new(job: &Job, shard: &Shard) -> Self {
        let path = job.folder.join(REJECTED).join(format!("{:05}.tar", shard.number));
        Self { path: job.keep_rejected.then_some(path), tar: None }
    }

    fn add(&mut self, draft: &Draft) -> Result<()> {
        let (Some(path), false) = (&self.path, draft.is_alive()) else { return Ok(()) };
        let tar = match self.tar.take() {
            Some(tar) => tar,
            None => {
                let folder = path.parent().context("a tar lies in a folder")?;
                fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
                ShardWriter::create(path)?
            }
        };
        let tar = self.tar.insert(tar);
        let mut members = Members::new();
        if let Some(collage) = &draft.collage {
            let mut bytes = std::io::Cursor::new(vec![]);
            collage.write_to(&mut bytes, image::ImageFormat::Png)?;
            members.insert("png".to_owned(), bytes.into_inner());
        }
        let reason = draft.record.rejection.as_ref().map_or("", |rejection| &rejection.reason);
        members.insert("txt".to_owned(), reason.as_bytes().to_vec());
        members.insert("json".to_owned(), serde_json::to_vec_pretty(&draft.record)?);
        tar.push(&format!("{:08}-{}", draft.record.number, draft.record.attempt), &members)
    }

    fn finish(self) -> Result<()> {
        self.tar.map_or(Ok(()), ShardWriter::finish)
    }
}

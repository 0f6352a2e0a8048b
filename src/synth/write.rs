//! Toybox sets written to disk. The bytes depend on the settings alone: not on threads, parts or interruptions.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::manifest::claim;
use super::toybox::{ToyboxSource, key};
use crate::data::set::write_members;
use crate::data::shards::ShardWriter;
use crate::data::{ImageSet, Members, SetSource, members_from_set};
use crate::folder_lock;
use crate::whole_file::target_name;

/// Toybox data to be written.
#[derive(Clone, Debug)]
pub struct ToyboxData {
    /// Where to; made if it does not exist.
    pub folder: PathBuf,
    /// Draws the sets.
    pub source: ToyboxSource,
    /// Write where the toy is, too.
    pub masks: bool,
    /// Loose files or tars.
    pub packing: Packing,
    /// The share of the work that this call does.
    pub part: Part,
}

/// The form on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// `<key>.png`, `<key>.txt`, `<key>.json` in one folder.
    Folder,
    /// Tars of so many sets.
    Shards {
        /// In each but the last, which may hold fewer.
        sets_per_shard: usize,
    },
}

/// Part `index` (from 0) of `of` parts of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    index: usize,
    of: usize,
}

impl Part {
    /// All sets.
    pub const ALL: Part = Part { index: 0, of: 1 };

    /// Part `index` of `of`, counted from 0.
    pub fn new(index: usize, of: usize) -> Result<Self> {
        ensure!(index < of, "part {index} of {of}: parts are numbered from 0 to one less than how many there are");
        Ok(Self { index, of })
    }

    /// Its share of so many items.
    pub fn range(self, items: usize) -> Range<usize> {
        items * self.index / self.of..items * (self.index + 1) / self.of
    }

    /// Name of the lock that keeps a second process from the same part.
    pub fn lock_name(self) -> String {
        format!("part-{}-of-{}.lock", self.index, self.of)
    }
}

/// What a call has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Sets written now.
    pub written: usize,
    /// Sets that were there before.
    pub kept: usize,
    /// Sets of this part that are still missing, because the call was interrupted.
    pub missing: usize,
}

/// Sets drawn at a time: enough to keep all threads busy, few enough to stop soon and to hold in memory.
const SETS_AT_A_TIME: usize = 32;

/// Writes what is not there yet. `progress` is called with the sets done and the sets of this part; when `interrupted`
/// says so, the call returns early with everything that it finished in its place and nothing else.
///
/// # Errors
/// Another process is at work on the same part.
pub fn write_toybox(
    data: &ToyboxData,
    progress: &mut dyn FnMut(usize, usize),
    interrupted: &dyn Fn() -> bool,
) -> Result<Summary> {
    ensure!(data.source.images > 0, "images: a set needs at least one picture");
    ensure!(data.source.size >= 8, "size: {} pixels a side are too few for a toy; at least 8", data.source.size);
    ensure!(data.packing != Packing::Shards { sets_per_shard: 0 }, "sets per shard: must be at least 1");
    claim(&data.folder, &data.settings())?;
    let _lock = folder_lock::hold(&data.folder, &data.part.lock_name(), "synth-data")?;
    let mine = data.part_sets();
    sweep(data, &mine)?;
    let mut count = Count { total: mine.len(), summary: Summary::default(), progress };
    match data.packing {
        Packing::Folder => write_folder(data, mine, &mut count, interrupted)?,
        Packing::Shards { sets_per_shard } => {
            for first in mine.clone().step_by(sets_per_shard) {
                let sets = first..(first + sets_per_shard).min(mine.end);
                let path = data.folder.join(format!("{:05}.tar", first / sets_per_shard));
                if !write_shard(data, &path, sets, &mut count, interrupted)? {
                    break;
                }
            }
        }
    }
    let Summary { written, kept, .. } = count.summary;
    Ok(Summary { missing: count.total - written - kept, ..count.summary })
}

impl ToyboxData {
    /// Everything that decides which files there will be and what is in them.
    fn settings(&self) -> Map<String, Value> {
        let ToyboxSource { seed, sets, images, size } = self.source;
        let sets_per_shard = match self.packing {
            Packing::Folder => None,
            Packing::Shards { sets_per_shard } => Some(sets_per_shard),
        };
        let settings = [
            ("format", json!(1)),
            ("source", json!("toybox")),
            ("seed", json!(seed)),
            ("sets", json!(sets)),
            ("images", json!(images)),
            ("size", json!(size)),
            ("masks", json!(self.masks)),
            ("sets_per_shard", json!(sets_per_shard)),
        ];
        settings.map(|(name, value)| (name.to_owned(), value)).into_iter().collect()
    }

    /// The sets of this part; whole shards where there are shards.
    fn part_sets(&self) -> Range<usize> {
        let sets = self.source.sets;
        match self.packing {
            Packing::Folder => self.part.range(sets),
            Packing::Shards { sets_per_shard } => {
                let shards = self.part.range(sets.div_ceil(sets_per_shard));
                (shards.start * sets_per_shard).min(sets)..(shards.end * sets_per_shard).min(sets)
            }
        }
    }

    fn set(&self, set_idx: usize) -> Result<ImageSet> {
        let mut set = self.source.read(set_idx)?;
        if !self.masks {
            set.masks.clear();
        }
        Ok(set)
    }

    /// Whether all files of a set are in the folder.
    fn is_whole(&self, set_idx: usize) -> bool {
        let n_masks = if self.masks { self.source.images } else { 0 };
        let suffixes = ["png", "txt", "json"].map(str::to_owned).into_iter();
        suffixes
            .chain((0..n_masks).map(|idx| format!("{idx}.mask.png")))
            .all(|suffix| self.folder.join(format!("{}.{suffix}", key(set_idx))).exists())
    }
}

/// Counts sets and tells the caller.
struct Count<'a> {
    total: usize,
    summary: Summary,
    progress: &'a mut dyn FnMut(usize, usize),
}

impl Count<'_> {
    fn add(&mut self, written: usize, kept: usize) {
        self.summary.written += written;
        self.summary.kept += kept;
        (self.progress)(self.summary.written + self.summary.kept, self.total);
    }
}

fn write_folder(
    data: &ToyboxData,
    mine: Range<usize>,
    count: &mut Count,
    interrupted: &dyn Fn() -> bool,
) -> Result<()> {
    for sets in batches(mine) {
        let missing: Vec<usize> = sets.clone().filter(|&set_idx| !data.is_whole(set_idx)).collect();
        if !missing.is_empty() && interrupted() {
            break;
        }
        missing.par_iter().try_for_each(|&set_idx| {
            let set = data.set(set_idx)?;
            write_members(&set.key, &members_from_set(&set)?, &data.folder)
        })?;
        count.add(missing.len(), sets.len() - missing.len());
    }
    Ok(())
}

/// Writes one shard unless it is there; false when interrupted.
fn write_shard(
    data: &ToyboxData,
    path: &Path,
    sets: Range<usize>,
    count: &mut Count,
    interrupted: &dyn Fn() -> bool,
) -> Result<bool> {
    if path.exists() {
        count.add(0, sets.len());
        return Ok(true);
    }
    let mut writer = ShardWriter::create(path)?;
    for batch in batches(sets.clone()) {
        if interrupted() {
            return Ok(false);
        }
        let drawn: Vec<Members> = batch
            .clone()
            .into_par_iter()
            .map(|set_idx| members_from_set(&data.set(set_idx)?))
            .collect::<Result<_>>()?;
        batch.zip(&drawn).try_for_each(|(set_idx, members)| writer.push(&key(set_idx), members))?;
    }
    writer.finish()?;
    count.add(sets.len(), 0);
    Ok(true)
}

fn batches(sets: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = sets.end;
    sets.step_by(SETS_AT_A_TIME).map(move |first| first..(first + SETS_AT_A_TIME).min(end))
}

/// Removes what a killed run of this part has left unfinished; other parts may be at work in the same folder.
fn sweep(data: &ToyboxData, mine: &Range<usize>) -> Result<()> {
    let sets_per_file = match data.packing {
        Packing::Folder => 1,
        Packing::Shards { sets_per_shard } => sets_per_shard,
    };
    let is_mine = |name: &str| {
        let number = target_name(name)?.split('.').next()?.parse::<usize>().ok()?;
        Some(mine.contains(&number.checked_mul(sets_per_file)?))
    };
    let sweep = |folder: &Path| {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if is_mine(&entry.file_name().to_string_lossy()) == Some(true) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok::<(), std::io::Error>(())
    };
    sweep(&data.folder).with_context(|| format!("{}: unfinished files cannot be removed", data.folder.display()))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeMap;

    use super::*;
    use crate::data::{Dataset, Layout};

    const SHARDS: Packing = Packing::Shards { sets_per_shard: 10 };

    fn data(root: &tempfile::TempDir, name: &str, packing: Packing) -> ToyboxData {
        let source = ToyboxSource { seed: 5, sets: 75, images: 2, size: 16 };
        ToyboxData { folder: root.path().join(name), source, masks: false, packing, part: Part::ALL }
    }

    fn run(data: &ToyboxData) -> Summary {
        write_toybox(data, &mut |_, _| (), &|| false).unwrap()
    }

    /// Without the parts' locks.
    fn files(data: &ToyboxData) -> BTreeMap<String, Vec<u8>> {
        let is_data = |(name, _): &(String, Vec<u8>)| !name.ends_with(".lock");
        let entry = |entry: std::io::Result<fs::DirEntry>| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
        };
        fs::read_dir(&data.folder).unwrap().map(entry).filter(is_data).collect()
    }

    #[test]
    fn what_is_written_reads_back_as_what_is_drawn() {
        let root = tempfile::tempdir().unwrap();
        for (name, packing) in [("folder", Packing::Folder), ("shards", SHARDS)] {
            let data = ToyboxData { masks: true, ..data(&root, name, packing) };
            assert_eq!(run(&data), Summary { written: 75, kept: 0, missing: 0 });
            let dataset = Dataset::open(data.folder.to_str().unwrap(), Layout::Sets).unwrap();
            assert_eq!(dataset.n_samples(), 75);
            for set_idx in [0, 9, 10, 74] {
                let (read, drawn) = (dataset.read(set_idx).unwrap(), data.source.read(set_idx).unwrap());
                assert_eq!((read.key, read.images, read.captions), (drawn.key, drawn.images, drawn.captions));
                assert_eq!(read.masks, drawn.masks);
                assert_eq!(read.metadata["subject"]["seed"], drawn.metadata["subject"]["seed"]);
            }
        }
    }

    #[test]
    fn an_interrupted_run_goes_on_to_the_same_bytes() {
        let root = tempfile::tempdir().unwrap();
        let shards = Packing::Shards { sets_per_shard: SETS_AT_A_TIME + 8 };
        for (name, packing) in [("folder", Packing::Folder), ("shards", shards)] {
            let straight = data(&root, &format!("{name}-straight"), packing);
            run(&straight);
            let broken = data(&root, &format!("{name}-broken"), packing);
            let mut runs = 0;
            loop {
                // Each run gets one batch further; the first ends in the middle of a shard.
                let questions = Cell::new(0);
                let interrupted = || questions.replace(questions.get() + 1) > runs;
                let summary = write_toybox(&broken, &mut |_, _| (), &interrupted).unwrap();
                assert!(files(&broken).keys().all(|name| !name.starts_with('.')), "{name}");
                runs += 1;
                if summary.missing == 0 {
                    break;
                }
                assert!(runs < 10);
                // A kill in the middle of writing set 74, or the last shard.
                let stray = if packing == shards { ".00001.tar.1.tmp" } else { ".00000074.png.1.tmp" };
                fs::write(broken.folder.join(stray), "half").unwrap();
            }
            assert!(runs > 1, "{name}");
            assert!(files(&broken) == files(&straight), "{name}");
            assert_eq!(run(&broken), Summary { written: 0, kept: 75, missing: 0 });
        }
    }

    #[test]
    fn a_set_with_a_lost_file_is_written_again() {
        let root = tempfile::tempdir().unwrap();
        let data = data(&root, "data", Packing::Folder);
        run(&data);
        let before = files(&data);
        fs::remove_file(data.folder.join("00000007.txt")).unwrap();
        assert_eq!(run(&data), Summary { written: 1, kept: 74, missing: 0 });
        assert!(files(&data) == before);
    }

    #[test]
    fn parts_make_up_the_whole_and_threads_change_nothing() {
        let root = tempfile::tempdir().unwrap();
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        for (name, packing) in [("folder", Packing::Folder), ("shards", SHARDS)] {
            let whole = data(&root, name, packing);
            one_thread.install(|| run(&whole));
            let parts = data(&root, &format!("{name}-parts"), packing);
            let mut written = 0;
            for index in [2, 0, 1] {
                let part = ToyboxData { part: Part::new(index, 3).unwrap(), ..parts.clone() };
                // Work of another part in progress must survive.
                let other =
                    parts.folder.join(if packing == SHARDS { ".00002.tar.9.tmp" } else { ".00000026.png.9.tmp" });
                fs::create_dir_all(&parts.folder).unwrap();
                fs::write(&other, "half").unwrap();
                written += run(&part).written;
                // Set 26 and shard 2 belong to part 1, which may clear them away.
                assert_eq!(other.exists(), index != 1, "part {index}");
                fs::remove_file(&other).ok();
            }
            assert_eq!(written, 75);
            assert!(files(&parts) == files(&whole), "{name}");
        }
    }

    #[test]
    fn more_parts_than_work_is_no_error() {
        let root = tempfile::tempdir().unwrap();
        let data = data(&root, "data", Packing::Shards { sets_per_shard: 50 });
        let written: usize =
            (0..5).map(|index| run(&ToyboxData { part: Part::new(index, 5).unwrap(), ..data.clone() }).written).sum();
        assert_eq!((written, files(&data).len()), (75, 3));
        assert!(Part::new(5, 5).is_err());
    }

    #[test]
    fn a_second_run_of_a_part_is_refused_while_the_first_is_at_work() {
        let root = tempfile::tempdir().unwrap();
        let data = data(&root, "data", SHARDS);
        let part = |index: usize| ToyboxData { part: Part::new(index, 2).unwrap(), ..data.clone() };
        let mut refused = None;
        let mut progress = |_: usize, _: usize| {
            if refused.is_none() {
                refused = Some(write_toybox(&part(0), &mut |_, _| (), &|| false).map_err(|error| error.to_string()));
                assert_eq!(run(&part(1)).missing, 0);
            }
        };
        let summary = write_toybox(&part(0), &mut progress, &|| false).unwrap();
        assert_eq!((summary.written, summary.missing), (40, 0));
        let refused = refused.expect("progress was made").unwrap_err();
        assert!(refused.contains("another jedi synth-data is at work in it"), "{refused}");
        assert_eq!(run(&part(0)).kept, 40);
    }

    #[test]
    fn progress_ends_at_the_total() {
        let root = tempfile::tempdir().unwrap();
        let mut calls = vec![];
        write_toybox(&data(&root, "data", SHARDS), &mut |done, total| calls.push((done, total)), &|| false).unwrap();
        assert_eq!((calls.len(), calls.last()), (8, Some(&(75, 75))));
        assert!(calls.is_sorted());
    }

    #[test]
    fn other_settings_are_refused_in_the_same_folder() {
        let root = tempfile::tempdir().unwrap();
        let first = data(&root, "data", Packing::Folder);
        run(&first);
        let before = files(&first);
        let seed = ToyboxData { source: ToyboxSource { seed: 6, ..first.source }, ..first.clone() };
        for other in
            [seed, ToyboxData { masks: true, ..first.clone() }, ToyboxData { packing: SHARDS, ..first.clone() }]
        {
            let error = write_toybox(&other, &mut |_, _| (), &|| false).unwrap_err().to_string();
            assert!(error.contains("data of other settings ("), "{error}");
        }
        assert!(files(&first) == before);
    }
}

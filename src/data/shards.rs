//! WebDataset shards: tars whose members are samples' files, those of a sample adjacent. Indexed once by their headers, read
//! lazily, so that a shard may be larger than memory.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::Members;
use super::members::split_name;
use crate::whole_file::{UNFINISHED, temporary_name};

/// Where one member's bytes lie in its tar.
#[derive(Clone, Debug)]
struct Extent {
    suffix: Box<str>,
    offset: u64,
    bytes: u64,
}

impl Extent {
    /// The bytes, at most `limit` of them.
    fn read(&self, tar: &mut File, limit: Option<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.bytes.min(limit.unwrap_or(u64::MAX)) as usize];
        tar.seek(SeekFrom::Start(self.offset))?;
        tar.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// The files of one sample in a tar.
#[derive(Clone, Debug)]
pub struct TarSample {
    /// The name that its files share.
    pub key: String,
    extents: Vec<Extent>,
}

impl TarSample {
    /// Reads the sample's files from the tar at `path`.
    pub fn read(&self, path: &Path) -> Result<Members> {
        let mut file = File::open(path)?;
        let mut member = |extent: &Extent| Ok((extent.suffix.to_string(), extent.read(&mut file, None)?));
        self.extents.iter().map(&mut member).collect()
    }

    /// Endings of the sample's files.
    pub fn suffixes(&self) -> Vec<&str> {
        self.extents.iter().map(|extent| &*extent.suffix).collect()
    }

    /// Reads one of the sample's files, at most `limit` bytes of it.
    pub fn read_one(&self, path: &Path, suffix: &str, limit: Option<u64>) -> Result<Vec<u8>> {
        let extent = self.extents.iter().find(|extent| &*extent.suffix == suffix).context("is not there")?;
        extent.read(&mut File::open(path)?, limit)
    }
}

/// What a tar holds.
#[derive(Debug, Default)]
pub struct TarIndex {
    /// The samples that are whole, in the tar's order.
    pub samples: Vec<TarSample>,
    /// Why there may have been more; None: the tar is whole.
    pub fault: Option<String>,
}

/// The samples of the tar at `path` that have a file whose ending `is_wanted`. A tar that is cut off gives those before the
/// cut; one that is none is an error.
pub fn index(path: &Path, is_wanted: fn(&str) -> bool) -> Result<TarIndex> {
    let mut index = index_file(path).with_context(|| path.display().to_string())?;
    index.samples.retain(|sample| sample.extents.iter().any(|extent| is_wanted(&extent.suffix)));
    Ok(index)
}

fn index_file(path: &Path) -> Result<TarIndex> {
    const NO_TAR: &str = "is no tar, or a compressed or broken one; unpack it or make it again";
    let mut file = File::open(path).context("cannot be read")?;
    let length = file.metadata()?.len();
    let is_ended = ends_with_zeros(&mut file, length)?;
    let mut archive = tar::Archive::new(BufReader::new(file));
    let mut samples: Vec<TarSample> = vec![];
    let mut keys = HashSet::new();
    let mut is_first = true;
    for entry in archive.entries_with_seek()? {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) if is_first => return Err(error).context(NO_TAR),
            Err(error) => {
                let last = samples.last().map_or(String::new(), |sample| sample.key.clone());
                return Ok(TarIndex { samples, fault: Some(format!("broken behind sample {last}: {error}; {AGAIN}")) });
            }
        };
        is_first = false;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some((key, suffix)) = split_name(name.trim_start_matches("./")) else { continue };
        let extent = Extent { suffix: suffix.into(), offset: entry.raw_file_position(), bytes: entry.size() };
        if extent.bytes > length.saturating_sub(extent.offset) {
            samples.pop_if(|sample| sample.key == key);
            return Ok(TarIndex { samples, fault: Some(format!("cut off in {name}; {AGAIN}")) });
        }
        match samples.last_mut() {
            Some(sample) if sample.key == key => sample.extents.push(extent),
            _ => {
                ensure!(
                    keys.insert(key.to_owned()),
                    "the files of sample {key} are not side by side; sort them by name"
                );
                samples.push(TarSample { key: key.to_owned(), extents: vec![extent] });
            }
        }
    }
    ensure!(!is_first || is_ended, NO_TAR);
    // If the last sample is not whole, reading it tells.
    let fault = (!is_ended).then(|| format!("has no end mark, so it may be cut off between two files; {AGAIN}"));
    Ok(TarIndex { samples, fault })
}

const AGAIN: &str = "copy or download it again";

/// Whether the last block is empty, as a tar's is.
fn ends_with_zeros(file: &mut File, length: u64) -> Result<bool> {
    let mut block = [1; 512];
    if length >= 512 {
        file.seek(SeekFrom::Start(length - 512))?;
        file.read_exact(&mut block)?;
        file.rewind()?;
    }
    Ok(block.iter().all(|&byte| byte == 0))
}

/// Expands `{00000..00099}` (numbers as wide as the first) in a path; several braces give all combinations.
pub fn expand_braces(pattern: &str) -> Result<Vec<String>> {
    let Some(open) = pattern.find('{') else { return Ok(vec![pattern.to_owned()]) };
    let parts = || {
        let close = open + pattern[open..].find('}')?;
        let (first, last) = pattern[open + 1..close].split_once("..")?;
        Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?, first.len(), close))
    };
    let (first, last, width, close) =
        parts().with_context(|| format!("{pattern}: a brace must be of the form {{00000..00099}}"))?;
    ensure!(first <= last, "{pattern}: {first} is more than {last}; write the smaller number first");
    let mut paths = vec![];
    for rest in expand_braces(&pattern[close + 1..])? {
        paths.extend((first..=last).map(|number| format!("{}{number:0width$}{rest}", &pattern[..open])));
    }
    paths.sort();
    Ok(paths)
}

/// Writes one shard under a temporary name; [`ShardWriter::finish`] puts it in its place, dropping removes it.
pub struct ShardWriter {
    path: PathBuf,
    temporary: PathBuf,
    /// None when finished.
    tar: Option<tar::Builder<BufWriter<File>>>,
}

impl ShardWriter {
    /// A shard that will be at `path`.
    pub fn create(path: &Path) -> Result<Self> {
        let temporary = temporary_name(path);
        let file = File::create(&temporary).with_context(|| format!("{}: cannot be written", path.display()))?;
        Ok(Self { path: path.to_owned(), temporary, tar: Some(tar::Builder::new(BufWriter::new(file))) })
    }

    /// Adds a sample. The bytes of a shard depend on what is added alone: no times, no owner.
    pub fn push(&mut self, key: &str, members: &Members) -> Result<()> {
        let tar = self.tar.as_mut().expect("finishing takes the writer away");
        let mut append = |suffix: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            header.set_mtime(0);
            tar.append_data(&mut header, format!("{key}.{suffix}"), bytes)
        };
        members
            .iter()
            .try_for_each(|(suffix, bytes)| append(suffix, bytes))
            .with_context(|| format!("{}: cannot be written", self.path.display()))
    }

    /// Ends the tar, syncs it and gives it its name.
    pub fn finish(mut self) -> Result<()> {
        let tar = self.tar.take().expect("finishing takes the writer away");
        let finish = || {
            let mut buffer = tar.into_inner()?;
            buffer.flush()?;
            buffer.get_ref().sync_all()?;
            fs::rename(&self.temporary, &self.path)
        };
        let outcome = finish();
        if outcome.is_err() {
            self.discard();
        }
        outcome.with_context(|| format!("{}: cannot be written", self.path.display()))
    }

    fn discard(&self) {
        // Nothing is lost if it stays: readers pass over it, the next run removes it.
        fs::remove_file(&self.temporary).ok();
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        if self.tar.take().is_some() {
            self.discard();
        }
    }
}

/// The tars in a folder, by name.
pub fn tars_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut tars = vec![];
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(UNFINISHED));
        if !hidden && path.extension().is_some_and(|ending| ending == "tar") {
            tars.push(path);
        }
    }
    tars.sort();
    Ok(tars)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::members::is_picture;

    fn members(text: &str) -> Members {
        [("png", text), ("txt", "a caption"), ("json", "{}")]
            .map(|(suffix, text)| (suffix.to_owned(), text.as_bytes().to_vec()))
            .into()
    }

    fn written(keys: &[&str]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.tar");
        let mut writer = ShardWriter::create(&path).unwrap();
        keys.iter().for_each(|key| writer.push(key, &members(key)).unwrap());
        writer.finish().unwrap();
        (folder, path)
    }

    fn samples(path: &Path) -> Vec<TarSample> {
        let TarIndex { samples, fault } = index(path, is_picture).unwrap();
        assert_eq!(fault, None);
        samples
    }

    fn refusal(path: &Path) -> String {
        format!("{:#}", index(path, is_picture).unwrap_err())
    }

    #[test]
    fn samples_come_back_as_they_were_written() {
        let long = "folder/".repeat(30) + "b";
        let keys = ["z", long.as_str(), "c"];
        let (_folder, path) = written(&keys);
        let samples = samples(&path);
        assert_eq!(samples.iter().map(|sample| sample.key.as_str()).collect::<Vec<_>>(), keys);
        for idx in [2, 0, 1] {
            assert_eq!(samples[idx].read(&path).unwrap(), members(keys[idx]));
        }
    }

    #[test]
    fn samples_without_a_picture_are_passed_over() {
        let (folder, _) = written(&[]);
        let path = folder.path().join("1.tar");
        let mut writer = ShardWriter::create(&path).unwrap();
        writer.push("a", &[("txt".to_owned(), vec![])].into()).unwrap();
        writer.push("b", &members("b")).unwrap();
        writer.finish().unwrap();
        assert_eq!(samples(&path).len(), 1);
    }

    #[test]
    fn a_tar_that_is_cut_off_gives_what_is_whole_and_tells_where_it_ends() {
        let (_folder, path) = written(&["a", "b", "c"]);
        let whole = fs::read(&path).unwrap();
        // Of each sample: json, png, txt, a header of 512 bytes and a block of contents each.
        for (length, n_whole, fault) in [
            (5 * 1024 + 512 + 3, 1, "cut off in b.txt; copy or download it again"),
            (6 * 1024 + 512 + 1, 2, "cut off in c.json"),
            (6 * 1024, 2, "has no end mark"),
            (7 * 1024 + 99, 2, "broken behind sample c: "),
        ] {
            fs::write(&path, &whole[..length]).unwrap();
            let index = index(&path, is_picture).unwrap();
            let keys: Vec<&str> = index.samples.iter().map(|sample| sample.key.as_str()).collect();
            assert!(keys.len() <= n_whole && keys == ["a", "b", "c"][..keys.len()], "{length}: {keys:?}");
            assert!(index.fault.as_ref().is_some_and(|told| told.contains(fault)), "{length}: {:?}", index.fault);
        }
    }

    #[test]
    fn what_is_no_tar_is_refused() {
        let (_folder, path) = written(&["a", "b"]);
        for bytes in [vec![7u8; 2000], vec![]] {
            fs::write(&path, bytes).unwrap();
            assert!(refusal(&path).contains("0.tar: is no tar"), "{}", refusal(&path));
        }
        let (_folder, path) = written(&["a", "b", "a"]);
        assert!(refusal(&path).contains("the files of sample a are not side by side"));
        assert!(refusal(Path::new("/no/such/0.tar")).starts_with("/no/such/0.tar: cannot be read"));
    }

    #[test]
    fn an_abandoned_shard_leaves_nothing() {
        let (folder, path) = written(&["a"]);
        let mut writer = ShardWriter::create(&folder.path().join("1.tar")).unwrap();
        writer.push("b", &members("b")).unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(tars_in(folder.path()).unwrap(), [path]);
    }

    #[test]
    fn braces_count_with_leading_zeros() {
        assert_eq!(expand_braces("d/{008..011}.tar").unwrap(), ["d/008.tar", "d/009.tar", "d/010.tar", "d/011.tar"]);
        assert_eq!(expand_braces("{1..2}/{0..1}").unwrap(), ["1/0", "1/1", "2/0", "2/1"]);
        assert_eq!(expand_braces("plain.tar").unwrap(), ["plain.tar"]);
        for wrong in ["{1..", "{a..b}.tar", "{1}.tar", "{3..2}.tar"] {
            assert!(expand_braces(wrong).is_err(), "{wrong}");
        }
    }
}

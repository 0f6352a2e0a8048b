//! A data set on disk: a folder of samples' files, or tar shards. Indexed when opened, read by number.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;

use super::members::{is_picture, split_name};
use super::outline::outline;
use super::shards::{TarSample, expand_braces, index, tars_in};
use super::{ImageSet, Layout, Members, Rules, SetOutline, set_from_members};
use crate::whole_file::UNFINISHED;

/// The samples of a folder or of shards.
pub struct Dataset {
    storage: Storage,
    layout: Layout,
    faults: Vec<Fault>,
}

enum Storage {
    Folder { path: PathBuf, samples: Vec<FolderSample> },
    Shards { paths: Vec<PathBuf>, lengths: Vec<usize>, samples: Vec<(u32, TarSample)> },
}

struct FolderSample {
    /// With the sub-folder in front, where there is one.
    key: String,
    suffixes: Vec<Box<str>>,
}

/// A part of a data set that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The file, the cause and the way out.
    pub message: String,
    /// About so many samples are missing because of it: what the other shards hold more than this one, at least 1.
    pub n_lost: usize,
}

impl Dataset {
    /// Opens a folder of samples (or of folders of samples), a folder of tars, a tar, or tars by a pattern such as
    /// `data/{00000..00099}.tar`. Shards that are broken are told by [`Dataset::faults`].
    pub fn open(place: &str, layout: Layout) -> Result<Self> {
        Self::open_files(place, layout, is_picture)
    }

    /// The same with the samples that have a file whose ending `is_wanted`.
    pub(super) fn open_files(place: &str, layout: Layout, is_wanted: fn(&str) -> bool) -> Result<Self> {
        let path = Path::new(place);
        let mut faults = vec![];
        let storage = if place.contains('{') && !path.exists() {
            let paths = expand_braces(place)?.into_iter().map(PathBuf::from).collect();
            shards(paths, is_wanted, &mut faults)?
        } else if path.is_dir() {
            let context = || format!("{place}: cannot be read");
            let samples = folder_samples(path, is_wanted).with_context(context)?;
            let tars = tars_in(path).with_context(context)?;
            ensure!(
                samples.is_empty() || tars.is_empty(),
                "{place}: holds pictures and tars; put them into two folders and name the one you mean"
            );
            if tars.is_empty() {
                Storage::Folder { path: path.to_owned(), samples }
            } else {
                shards(tars, is_wanted, &mut faults)?
            }
        } else {
            shards(vec![path.to_owned()], is_wanted, &mut faults)?
        };
        let dataset = Self { storage, layout, faults };
        if dataset.n_samples() == 0 {
            if let Some(Fault { message, .. }) = dataset.faults.first() {
                bail!("{message}");
            }
            bail!(
                "{place}: holds no samples; a sample is key.png or key.jpg beside key.txt, in the folder itself or in a tar"
            );
        }
        Ok(dataset)
    }

    /// How many samples there are.
    pub fn n_samples(&self) -> usize {
        match &self.storage {
            Storage::Folder { samples, .. } => samples.len(),
            Storage::Shards { samples, .. } => samples.len(),
        }
    }

    /// What could not be read of the place.
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }

    /// The samples of each shard; empty for a folder.
    pub fn shard_lengths(&self) -> &[usize] {
        match &self.storage {
            Storage::Folder { .. } => &[],
            Storage::Shards { lengths, .. } => lengths,
        }
    }

    /// How the files of a sample make a set.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Sample number `idx` as a set, pictures as large as they are stored.
    pub fn read(&self, idx: usize) -> Result<ImageSet> {
        self.read_by(idx, &Rules::default())
    }

    /// The same with captions as the rules say.
    pub fn read_by(&self, idx: usize, rules: &Rules) -> Result<ImageSet> {
        let (key, label) = self.name(idx);
        self.members(idx)
            .and_then(|members| set_from_members(key, &members, self.layout, &rules.caption))
            .context(label)
    }

    /// What sample number `idx` promises, its pictures not decoded; refused where `read` would refuse it, as far as
    /// headers, captions and JSON tell.
    pub fn outline(&self, idx: usize, rules: &Rules) -> Result<SetOutline> {
        let (key, label) = self.name(idx);
        let outline = match &self.storage {
            Storage::Folder { path, samples } => {
                let FolderSample { key, suffixes } = &samples[idx];
                let suffixes: Vec<&str> = suffixes.iter().map(|suffix| &**suffix).collect();
                let read = |suffix: &str, limit| Ok(start_of(&path.join(format!("{key}.{suffix}")), limit)?);
                outline(key, &suffixes, self.layout, rules, &read)
            }
            Storage::Shards { paths, samples, .. } => {
                let (shard, sample) = &samples[idx];
                let read = |suffix: &str, limit| sample.read_one(&paths[*shard as usize], suffix, limit);
                outline(key, &sample.suffixes(), self.layout, rules, &read)
            }
        };
        outline.map(|outline| SetOutline { label: label.clone(), ..outline }).context(label)
    }

    /// The key of sample number `idx`, and its place for messages.
    pub fn name(&self, idx: usize) -> (&str, String) {
        match &self.storage {
            Storage::Folder { path, samples } => {
                (&samples[idx].key, path.join(&samples[idx].key).display().to_string())
            }
            Storage::Shards { paths, samples, .. } => {
                let (shard, sample) = &samples[idx];
                (&sample.key, format!("{}: sample {}", paths[*shard as usize].display(), sample.key))
            }
        }
    }

    /// The bytes of sample number `idx`.
    pub fn members(&self, idx: usize) -> Result<Members> {
        match &self.storage {
            Storage::Folder { path, samples } => {
                let FolderSample { key, suffixes } = &samples[idx];
                let member = |suffix: &str| {
                    let bytes = fs::read(path.join(format!("{key}.{suffix}"))).with_context(|| format!(".{suffix}"))?;
                    Ok((suffix.to_string(), bytes))
                };
                suffixes.iter().map(|suffix| member(suffix)).collect()
            }
            Storage::Shards { paths, samples, .. } => {
                let (shard, sample) = &samples[idx];
                sample.read(&paths[*shard as usize])
            }
        }
    }
}

/// The bytes of a file, at most `limit` of them.
fn start_of(path: &Path, limit: Option<u64>) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![];
    fs::File::open(path)?.take(limit.unwrap_or(u64::MAX)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Shards that cannot be read, or not to their ends, become faults; one that is not there was named wrongly.
fn shards(paths: Vec<PathBuf>, is_wanted: fn(&str) -> bool, faults: &mut Vec<Fault>) -> Result<Storage> {
    for path in &paths {
        ensure!(path.exists(), "{}: no such file or folder; check the path", path.display());
    }
    let indices: Vec<_> = paths.par_iter().map(|path| index(path, is_wanted)).collect();
    let whole: Vec<usize> = indices
        .iter()
        .filter_map(|index| index.as_ref().ok().filter(|index| index.fault.is_none()))
        .map(|index| index.samples.len())
        .collect();
    let usual = whole.iter().sum::<usize>() / whole.len().max(1);
    let (mut samples, mut lengths) = (vec![], vec![]);
    for (shard, index) in indices.into_iter().enumerate() {
        let (found, message) = match index {
            Ok(index) => {
                let fault = index.fault.map(|fault| format!("{}: {fault}", paths[shard].display()));
                (index.samples, fault)
            }
            Err(error) => (vec![], Some(format!("{error:#}"))),
        };
        faults.extend(message.map(|message| Fault { message, n_lost: usual.saturating_sub(found.len()).max(1) }));
        lengths.push(found.len());
        samples.extend(found.into_iter().map(|sample| (shard as u32, sample)));
    }
    Ok(Storage::Shards { paths, lengths, samples })
}

/// The wanted samples in a folder, by key; in its sub-folders where it holds none itself.
fn folder_samples(folder: &Path, is_wanted: fn(&str) -> bool) -> Result<Vec<FolderSample>> {
    let (mut samples, folders) = samples_in(folder, "", is_wanted)?;
    if samples.is_empty() {
        for name in folders {
            samples.extend(samples_in(&folder.join(&name), &format!("{name}/"), is_wanted)?.0);
        }
    }
    Ok(samples)
}

/// The samples in one folder, their keys behind `prefix`, and its sub-folders by name.
fn samples_in(folder: &Path, prefix: &str, is_wanted: fn(&str) -> bool) -> Result<(Vec<FolderSample>, Vec<String>)> {
    let mut samples: BTreeMap<String, Vec<Box<str>>> = BTreeMap::new();
    let mut folders = vec![];
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(UNFINISHED) {
            continue;
        }
        match split_name(&name) {
            // A file's ending, so that the disk is not asked for the kind of each of a million files.
            Some((key, suffix)) if is_wanted(suffix) || !entry.file_type()?.is_dir() => {
                samples.entry(format!("{prefix}{key}")).or_default().push(suffix.into());
            }
            _ if entry.path().is_dir() => folders.push(name),
            _ => {}
        }
    }
    folders.sort();
    let samples = samples
        .into_iter()
        .filter(|(_, suffixes)| suffixes.iter().any(|suffix| is_wanted(suffix)))
        .map(|(key, suffixes)| FolderSample { key, suffixes })
        .collect();
    Ok((samples, folders))
}

#[cfg(test)]
mod tests {
    use image::RgbImage;

    use super::*;
    use crate::data::members_from_set;
    use crate::data::set::write_strip;
    use crate::data::shards::ShardWriter;

    fn set(idx: u8) -> ImageSet {
        let image = |shade: u8| RgbImage::from_fn(16, 16, |x, y| image::Rgb([shade, x as u8 * 9, y as u8 * idx]));
        ImageSet {
            key: format!("{idx:05}"),
            images: vec![image(idx), image(200 - idx)],
            captions: vec![format!("first of {idx}"), "second".to_owned()],
            masks: vec![],
            metadata: serde_json::json!({ "index": idx }),
        }
    }

    /// Sets 0..6 in a folder, in two shards in a second folder.
    fn written() -> (tempfile::TempDir, String, String) {
        let root = tempfile::tempdir().unwrap();
        let (folder, tars) = (root.path().join("strips"), root.path().join("tars"));
        [&folder, &tars].into_iter().for_each(|path| fs::create_dir(path).unwrap());
        for shard in 0..2 {
            let mut writer = ShardWriter::create(&tars.join(format!("{shard:03}.tar"))).unwrap();
            for set in (shard * 3..shard * 3 + 3).map(set) {
                write_strip(&set, &folder).unwrap();
                writer.push(&set.key, &members_from_set(&set).unwrap()).unwrap();
            }
            writer.finish().unwrap();
        }
        let place = |path: PathBuf| path.to_str().unwrap().to_owned();
        (root, place(folder), place(tars))
    }

    fn refusal(place: &str) -> String {
        format!("{:#}", Dataset::open(place, Layout::Sets).map(|_| ()).unwrap_err())
    }

    #[test]
    fn folder_and_tars_give_the_sets_that_were_written() {
        let (_root, folder, tars) = written();
        // What an interrupted writer may leave, and what people put beside their data.
        for stray in [".00009.png.77.tmp", "00008.txt", "README.md", "dataset.json", "LICENSE"] {
            fs::write(Path::new(&folder).join(stray), "half").unwrap();
        }
        for place in [folder, tars.clone(), tars + "/{000..001}.tar"] {
            let dataset = Dataset::open(&place, Layout::Sets).unwrap();
            assert_eq!(dataset.n_samples(), 6, "{place}");
            for idx in [5, 0, 3, 1] {
                let (read, expected) = (dataset.read(idx).unwrap(), set(idx as u8));
                assert_eq!((read.key, read.images, read.captions), (expected.key, expected.images, expected.captions));
                assert_eq!(read.metadata, expected.metadata);
            }
        }
    }

    #[test]
    fn one_tar_is_a_data_set() {
        let (_root, _, tars) = written();
        let dataset = Dataset::open(&(tars + "/001.tar"), Layout::Sets).unwrap();
        assert_eq!((dataset.n_samples(), dataset.read(0).unwrap().key), (3, "00003".to_owned()));
    }

    #[test]
    fn places_without_data_are_refused() {
        let (root, folder, tars) = written();
        assert!(refusal("/no/such/place").starts_with("/no/such/place: no such file or folder"));
        assert!(refusal(&format!("{tars}/{{000..002}}.tar")).contains("002.tar: no such file"));
        fs::create_dir(root.path().join("empty")).unwrap();
        assert!(refusal(root.path().join("empty").to_str().unwrap()).contains("holds no samples"));
        fs::copy(format!("{tars}/000.tar"), format!("{folder}/000.tar")).unwrap();
        assert!(refusal(&folder).contains("holds pictures and tars"));
    }

    #[test]
    fn a_folder_of_folders_is_read_through() {
        let (root, folder, _) = written();
        let outer = root.path().join("outer");
        fs::create_dir_all(outer.join("empty")).unwrap();
        for name in ["00001", "00000"] {
            fs::create_dir(outer.join(name)).unwrap();
            for entry in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap()) {
                fs::copy(entry.path(), outer.join(name).join(entry.file_name())).unwrap();
            }
        }
        let dataset = Dataset::open(outer.to_str().unwrap(), Layout::Sets).unwrap();
        assert_eq!((dataset.n_samples(), dataset.read(7).unwrap().key), (12, "00001/00001".to_owned()));
        assert!(dataset.shard_lengths().is_empty());
    }

    #[test]
    fn broken_shards_are_told_and_the_others_are_read() {
        let (_root, _, tars) = written();
        let bytes = fs::read(format!("{tars}/001.tar")).unwrap();
        fs::write(format!("{tars}/001.tar"), &bytes[..bytes.len() - 1024 - 512 + 3]).unwrap();
        fs::write(format!("{tars}/002.tar"), "<html>not found</html>").unwrap();
        let dataset = Dataset::open(&tars, Layout::Sets).unwrap();
        assert_eq!((dataset.n_samples(), dataset.shard_lengths()), (5, &[3, 2, 0][..]));
        let [cut, none] = dataset.faults() else { panic!("{:?}", dataset.faults()) };
        assert!(cut.message.contains("001.tar: cut off in 00005.txt") && cut.n_lost == 1, "{cut:?}");
        assert!(none.message.contains("002.tar: is no tar") && none.n_lost == 3, "{none:?}");
        assert!(refusal(&format!("{tars}/002.tar")).contains("002.tar: is no tar"));
    }

    #[test]
    fn a_broken_sample_is_named() {
        let (_root, folder, _) = written();
        fs::write(format!("{folder}/00001.txt"), "only one").unwrap();
        let dataset = Dataset::open(&folder, Layout::Sets).unwrap();
        let error = format!("{:#}", dataset.read(1).unwrap_err());
        assert!(error.contains("strips/00001: .txt: 1 captions for 2 pictures"), "{error}");
        assert!(dataset.read(2).is_ok());
    }
}

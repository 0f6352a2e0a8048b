//! A data set on disk: a folder of samples' files, or tar shards. Indexed when opened, read by number.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::members::{is_picture, split_name};
use super::outline::outline;
use super::shards::{TarSample, expand_braces, index, tars_in};
use super::{ImageSet, Layout, Members, SetOutline, set_from_members};
use crate::whole_file::UNFINISHED;

/// The samples of a folder or of shards.
pub struct Dataset {
    storage: Storage,
    layout: Layout,
}

enum Storage {
    Folder { path: PathBuf, samples: Vec<FolderSample> },
    Shards { paths: Vec<PathBuf>, samples: Vec<(usize, TarSample)> },
}

struct FolderSample {
    key: String,
    suffixes: Vec<Box<str>>,
}

impl Dataset {
    /// Opens a folder of samples, a folder of tars, a tar, or tars by a pattern such as `data/{00000..00099}.tar`.
    pub fn open(place: &str, layout: Layout) -> Result<Self> {
        let path = Path::new(place);
        let storage = if place.contains('{') && !path.exists() {
            shards(expand_braces(place)?.into_iter().map(PathBuf::from).collect())?
        } else if path.is_dir() {
            let context = || format!("{place}: cannot be read");
            let samples = folder_samples(path).with_context(context)?;
            let tars = tars_in(path).with_context(context)?;
            ensure!(
                samples.is_empty() || tars.is_empty(),
                "{place}: holds pictures and tars; put them into two folders and name the one you mean"
            );
            if tars.is_empty() { Storage::Folder { path: path.to_owned(), samples } } else { shards(tars)? }
        } else {
            shards(vec![path.to_owned()])?
        };
        let dataset = Self { storage, layout };
        if dataset.n_samples() == 0 {
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

    /// Sample number `idx` as a set, pictures as large as they are stored.
    pub fn read(&self, idx: usize) -> Result<ImageSet> {
        let (key, label) = self.name(idx);
        self.members(idx).and_then(|members| set_from_members(key, &members, self.layout)).context(label)
    }

    /// What sample number `idx` promises, its pictures not decoded; refused where `read` would refuse it, as far as
    /// headers, captions and JSON tell.
    pub fn outline(&self, idx: usize) -> Result<SetOutline> {
        let (_, label) = self.name(idx);
        let outline = match &self.storage {
            Storage::Folder { path, samples } => {
                let FolderSample { key, suffixes } = &samples[idx];
                let suffixes: Vec<&str> = suffixes.iter().map(|suffix| &**suffix).collect();
                let read = |suffix: &str, limit| Ok(start_of(&path.join(format!("{key}.{suffix}")), limit)?);
                outline(&label, &suffixes, self.layout, &read)
            }
            Storage::Shards { paths, samples } => {
                let (shard, sample) = &samples[idx];
                let read = |suffix: &str, limit| sample.read_one(&paths[*shard], suffix, limit);
                outline(&label, &sample.suffixes(), self.layout, &read)
            }
        };
        outline.context(label)
    }

    /// The key of sample number `idx`, and its place for messages.
    fn name(&self, idx: usize) -> (&str, String) {
        match &self.storage {
            Storage::Folder { path, samples } => {
                (&samples[idx].key, path.join(&samples[idx].key).display().to_string())
            }
            Storage::Shards { paths, samples } => {
                let (shard, sample) = &samples[idx];
                (&sample.key, format!("{}: sample {}", paths[*shard].display(), sample.key))
            }
        }
    }

    /// The bytes of sample number `idx`.
    fn members(&self, idx: usize) -> Result<Members> {
        match &self.storage {
            Storage::Folder { path, samples } => {
                let FolderSample { key, suffixes } = &samples[idx];
                let member = |suffix: &str| {
                    let bytes = fs::read(path.join(format!("{key}.{suffix}"))).with_context(|| format!(".{suffix}"))?;
                    Ok((suffix.to_string(), bytes))
                };
                suffixes.iter().map(|suffix| member(suffix)).collect()
            }
            Storage::Shards { paths, samples } => {
                let (shard, sample) = &samples[idx];
                sample.read(&paths[*shard])
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

fn shards(paths: Vec<PathBuf>) -> Result<Storage> {
    let mut samples = vec![];
    for (shard, path) in paths.iter().enumerate() {
        ensure!(path.exists(), "{}: no such file or folder; check the path", path.display());
        samples.extend(index(path)?.into_iter().map(|sample| (shard, sample)));
    }
    Ok(Storage::Shards { paths, samples })
}

/// The samples with a picture in a folder, by key.
fn folder_samples(folder: &Path) -> Result<Vec<FolderSample>> {
    let mut samples: BTreeMap<String, Vec<Box<str>>> = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(UNFINISHED) || entry.path().is_dir() {
            continue;
        }
        if let Some((key, suffix)) = split_name(&name) {
            samples.entry(key.to_owned()).or_default().push(suffix.into());
        }
    }
    let with_picture = |suffixes: &[Box<str>]| suffixes.iter().any(|suffix| is_picture(suffix));
    Ok(samples
        .into_iter()
        .filter(|(_, suffixes)| with_picture(suffixes))
        .map(|(key, suffixes)| FolderSample { key, suffixes })
        .collect())
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
        assert!(refusal(root.path().to_str().unwrap()).contains("holds no samples"));
        fs::copy(format!("{tars}/000.tar"), format!("{folder}/000.tar")).unwrap();
        assert!(refusal(&folder).contains("holds pictures and tars"));
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

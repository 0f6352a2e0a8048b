//! One model's place in the hub's cache, laid out as Python's huggingface_hub does, so that each reads what the other wrote:
//! `models--owner--name/{blobs/<etag>, refs/<revision>, snapshots/<commit>/<file> → blob}`, locks in `.locks`.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};

use super::name::is_commit;
use crate::whole_file::{temporary_name, write_whole};

/// The folder of a model in the cache; it need not be there.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
    locks: PathBuf,
}

impl Cache {
    /// Of `owner/name` in the hub's cache.
    pub fn of(cache: &Path, repository: &str) -> Self {
        let folder = format!("models--{}", repository.replace('/', "--"));
        Self { root: cache.join(&folder), locks: cache.join(".locks").join(folder) }
    }

    /// The model folder of a commit.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// A file's contents by its etag.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// As much of a blob as has arrived.
    pub fn unfinished_blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// The commit that a branch or tag meant when it was last seen.
    pub fn commit_of(&self, revision: &str) -> Option<String> {
        // Without the file there is none.
        let commit = fs::read_to_string(self.root.join("refs").join(revision)).ok()?.trim().to_owned();
        is_commit(&commit).then_some(commit)
    }

    /// Remembers what a branch or tag means.
    pub fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) || self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        make_folder_of(&path)?;
        write_whole(&path, commit.as_bytes())
    }

    /// Whether the hub said that a commit has no such file.
    pub fn is_known_absent(&self, commit: &str, file: &str) -> bool {
        self.absence(commit, file).is_file()
    }

    /// Remembers that a commit has no such file.
    pub fn set_absent(&self, commit: &str, file: &str) -> Result<()> {
        let path = self.absence(commit, file);
        make_folder_of(&path)?;
        fs::write(&path, "").with_context(|| path.display().to_string())
    }

    fn absence(&self, commit: &str, file: &str) -> PathBuf {
        self.root.join(".no_exist").join(commit).join(file)
    }

    /// The files of a commit that are there, by their names in the model folder.
    pub fn files(&self, commit: &str) -> Vec<String> {
        let root = self.snapshot(commit);
        let mut files = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            // A folder that is not there holds nothing.
            for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
                if path.is_dir() {
                    folders.push(path);
                } else if path.is_file() {
                    let name = path.strip_prefix(&root).unwrap_or(&path);
                    files.push(name.components().map(component_name).collect::<Vec<_>>().join("/"));
                }
            }
        }
        files
    }

    /// Holds a blob for this process alone, after waiting for another one that downloads it; `on_wait` is called before that.
    pub fn lock(&self, etag: &str, on_wait: impl FnOnce()) -> Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        make_folder_of(&path)?;
        let lock = || -> io::Result<File> {
            let file = File::options().create(true).truncate(false).write(true).open(&path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    on_wait();
                    file.lock()?;
                }
                Err(TryLockError::Error(error)) => return Err(error),
            }
            Ok(file)
        };
        lock().with_context(|| format!("{}: cannot be locked", path.display()))
    }

    /// Makes a whole blob the file `name` of a commit.
    pub fn link(&self, commit: &str, name: &str, etag: &str) -> Result<()> {
        let path = self.snapshot(commit).join(name);
        make_folder_of(&path)?;
        let up = "../".repeat(2 + name.split('/').count() - 1);
        let temporary = temporary_name(&path);
        // One that another run left there.
        fs::remove_file(&temporary).ok();
        let link = || -> io::Result<()> {
            // File systems without links get a copy, as Python does it.
            if symlink(&format!("{up}blobs/{etag}"), &temporary).is_err() {
                fs::copy(self.blob(etag), &temporary)?;
            }
            fs::rename(&temporary, &path)
        };
        link().with_context(|| format!("{}: cannot be written", path.display()))
    }
}

fn component_name(component: Component) -> String {
    component.as_os_str().to_string_lossy().into_owned()
}

/// Makes the folders that lead to a file.
pub fn make_folder_of(path: &Path) -> Result<()> {
    let Some(folder) = path.parent() else { return Ok(()) };
    fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))
}

#[cfg(unix)]
fn symlink(target: &str, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn symlink(_: &str, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn a_blob_becomes_a_file_of_its_commit() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::of(folder.path(), "owner/model");
        let blob = folder.path().join("models--owner--model/blobs/abc");
        assert_eq!(cache.blob("abc"), blob);
        make_folder_of(&blob).unwrap();
        fs::write(&blob, "contents").unwrap();
        assert!(cache.files(COMMIT).is_empty());
        for name in ["model_index.json", "unet/config.json"] {
            cache.link(COMMIT, name, "abc").unwrap();
            cache.link(COMMIT, name, "abc").unwrap();
            let path = folder.path().join("models--owner--model/snapshots").join(COMMIT).join(name);
            assert_eq!(fs::read_to_string(path).unwrap(), "contents");
        }
        let mut files = cache.files(COMMIT);
        files.sort();
        assert_eq!(files, ["model_index.json", "unet/config.json"]);
        fs::remove_file(blob).unwrap();
        assert!(cache.files(COMMIT).is_empty(), "a link to nothing is no file");
    }

    #[test]
    fn a_branch_is_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::of(folder.path(), "owner/model");
        assert_eq!(cache.commit_of("main"), None);
        cache.set_commit("main", COMMIT).unwrap();
        cache.set_commit("refs/pr/1", COMMIT).unwrap();
        assert_eq!(fs::read_to_string(folder.path().join("models--owner--model/refs/main")).unwrap(), COMMIT);
        assert_eq!(cache.commit_of("refs/pr/1").as_deref(), Some(COMMIT));
        fs::write(folder.path().join("models--owner--model/refs/main"), "../../elsewhere").unwrap();
        assert_eq!(cache.commit_of("main"), None);
    }

    #[test]
    fn who_comes_second_waits() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::of(folder.path(), "owner/model");
        let held = cache.lock("abc", || panic!("nobody else is there")).unwrap();
        let (waits, is_told) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || cache.lock("abc", || waits.send(()).unwrap()).map(drop));
        is_told.recv().unwrap();
        drop(held);
        other.join().unwrap().unwrap();
    }
}

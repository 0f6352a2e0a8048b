//! Files that are there whole or not at all: written under a temporary name, synced, renamed.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Names that start with this are not finished; readers pass over them.
pub const UNFINISHED: char = '.';

/// The temporary name of `path`: hidden, beside it, another one for each process.
pub fn temporary_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{UNFINISHED}{name}.{}.tmp", std::process::id()))
}

/// The name that a [`temporary_name`] is to become, or None for any other file.
pub fn target_name(temporary: &str) -> Option<&str> {
    temporary.strip_prefix(UNFINISHED)?.strip_suffix(".tmp")?.rsplit_once('.').map(|(target, _pid)| target)
}

/// Writes or replaces a file in one step.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    write_whole_with(path, |file| Ok(file.write_all(bytes)?))
}

/// Writes or replaces a file in one step, its contents bit by bit.
pub fn write_whole_with(path: &Path, write_contents: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let temporary = temporary_name(path);
    let write = || -> Result<()> {
        let mut file = BufWriter::new(File::create(&temporary)?);
        write_contents(&mut file)?;
        file.into_inner().map_err(|error| error.into_error())?.sync_all()?;
        Ok(fs::rename(&temporary, path)?)
    };
    let outcome = write();
    if outcome.is_err() {
        // Half a file is of no use; if it cannot be removed either, its name says so.
        fs::remove_file(&temporary).ok();
    }
    outcome.with_context(|| format!("{}: cannot be written", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_a_file_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write_whole(&path, b"one").unwrap();
        write_whole(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn contents_that_fail_leave_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write_whole(&path, b"one").unwrap();
        let error = write_whole_with(&path, |file| {
            file.write_all(b"half")?;
            anyhow::bail!("no more")
        });
        assert!(format!("{:#}", error.unwrap_err()).ends_with("a.txt: cannot be written: no more"));
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_temporary_name_tells_what_it_becomes() {
        let temporary = temporary_name(Path::new("data/00001.0.png"));
        assert_eq!(target_name(temporary.file_name().unwrap().to_str().unwrap()), Some("00001.0.png"));
        assert_eq!(target_name("00001.0.png"), None);
        assert_eq!(target_name(".hidden"), None);
    }

    #[test]
    fn an_error_names_the_file() {
        let error = write_whole(Path::new("/no/such/folder/a.txt"), b"").unwrap_err();
        assert!(format!("{error:#}").starts_with("/no/such/folder/a.txt: cannot be written: "));
    }
}

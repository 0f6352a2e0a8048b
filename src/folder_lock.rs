//! One process at a time in a folder, or in a part of the work in it: two would ruin each other.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::whole_file::UNFINISHED;

/// Holds `name` in the folder until it is dropped or the process ends, however it ends; `verb` is what holds it. The hidden
/// file stays.
///
/// # Errors
/// Another process holds it.
pub fn hold(folder: &Path, name: &str, verb: &str) -> Result<File> {
    let path = folder.join(format!("{UNFINISHED}{name}"));
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        // Some network file systems have no locks; that is no reason not to work.
        Err(TryLockError::Error(cause)) if cause.kind() == io::ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(cause)) => Err(cause).with_context(|| path.display().to_string()),
        Err(TryLockError::WouldBlock) => bail!(
            "--out {}: another jedi {verb} is at work in it; stop that one or choose another --out",
            folder.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_refused_until_the_first_is_done_and_other_parts_are_free() {
        let folder = tempfile::tempdir().unwrap();
        let first = hold(folder.path(), "lock", "train").unwrap();
        let refused = hold(folder.path(), "lock", "train").unwrap_err().to_string();
        assert!(refused.contains("another jedi train is at work in it"), "{refused}");
        hold(folder.path(), "other", "train").unwrap();
        drop(first);
        hold(folder.path(), "lock", "train").unwrap();
    }
}

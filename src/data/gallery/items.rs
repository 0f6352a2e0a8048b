//! Finds the clips or objects below a folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::GalleryKind;
use crate::data::members::is_picture;
use crate::data::video::is_video;
use crate::whole_file::UNFINISHED;

/// Folders in folders that are searched.
const MAX_DEPTH: usize = 4;

/// One clip or object.
pub enum Item {
    /// Its pictures by name.
    Folder { path: PathBuf, pictures: Vec<String> },
    /// A file.
    Video(PathBuf),
    /// The video of the sample of this number.
    InTar(usize),
}

/// The clips or objects in a folder and the folders in it, by name.
pub fn collect(folder: &Path, kind: GalleryKind, depth: usize, items: &mut Vec<Item>) -> Result<()> {
    let mut entries = fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    let (mut pictures, mut folders) = (vec![], vec![]);
    for entry in entries {
        let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
        let ending = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        if name.starts_with(UNFINISHED) {
            continue;
        }
        if is_picture(&ending) {
            pictures.push(name);
        } else if kind == GalleryKind::Clips && is_video(&ending) {
            items.push(Item::Video(path));
        } else if path.is_dir() {
            folders.push(path);
        }
    }
    if !pictures.is_empty() {
        items.push(Item::Folder { path: folder.to_owned(), pictures });
    }
    if depth < MAX_DEPTH {
        folders.iter().try_for_each(|folder| collect(folder, kind, depth + 1, items))?;
    }
    Ok(())
}

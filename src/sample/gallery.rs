//! Where the pictures of a run go: names that replace nothing, the settings inside and beside each picture, the grid.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use image::RgbImage;
use serde_json::Value;

use super::picture_file::{Format, sidecar_of};
use crate::data::{sheet, write_png};
use crate::invalid::invalid;
use crate::whole_file::{temporary_name, write_whole};

/// A folder that pictures are added to, or the one picture's file.
pub struct Gallery {
    folder: PathBuf,
    /// The path of a gallery of one picture.
    only: Option<PathBuf>,
    /// Number of the next picture of a folder.
    next: usize,
}

impl Gallery {
    /// Opens `out` for `n_pictures`: a path with a picture's suffix holds exactly one, anything else is a folder. Fails
    /// where no file can be written, so that this is known before the work.
    pub fn open(out: &Path, n_pictures: usize) -> Result<Self> {
        let name = out.display();
        if !out.is_dir() && Format::of(out)?.is_some() {
            if n_pictures != 1 {
                return Err(invalid(format!("--out {name}: is one file for {n_pictures} pictures; name a folder")));
            }
            let folder = match out.parent() {
                Some(folder) if folder != Path::new("") => folder.to_owned(),
                _ => PathBuf::from("."),
            };
            check_writable(&folder).with_context(|| format!("--out {name}: cannot be written"))?;
            return Ok(Self { folder, only: Some(out.to_owned()), next: 1 });
        }
        check_writable(out).with_context(|| format!("--out {name}: cannot be written"))?;
        let next = last_number(out).with_context(|| format!("--out {name}: cannot be read"))? + 1;
        Ok(Self { folder: out.to_owned(), only: None, next })
    }

    /// The file that the next picture or its settings would replace; None where nothing is lost.
    pub fn replaces(&self) -> Option<PathBuf> {
        let picture = self.only.clone()?;
        [picture.with_extension("json"), picture].into_iter().rev().find(|path| path.exists())
    }

    /// Writes a picture with its settings inside and beside it, each file whole.
    pub fn add(&mut self, picture: &RgbImage, prompt: &str, seed: u64, settings: &Value) -> Result<PathBuf> {
        let path = match &self.only {
            Some(path) => path.clone(),
            None => self.folder.join(format!("{:04}-{}-{seed}.png", self.next, slug(prompt))),
        };
        self.next += 1;
        let mut sidecar = serde_json::to_vec_pretty(settings)?;
        sidecar.push(b'\n');
        write_whole(&path.with_extension("json"), &sidecar)?;
        let format = Format::of(&path)?.unwrap_or(Format::Png);
        let bytes = format.bytes(picture, settings).with_context(|| path.display().to_string())?;
        write_whole(&path, &bytes)?;
        Ok(path)
    }

    /// The pictures that are there already, with the settings that made them; in the order of their names.
    pub fn recorded(&self) -> Result<Vec<(PathBuf, Value)>> {
        let mut pictures = match &self.only {
            Some(path) => vec![path.clone()],
            None => fs::read_dir(&self.folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?,
        };
        pictures.retain(|path| path.is_file() && Format::of(path).is_ok_and(|format| format.is_some()));
        pictures.sort();
        // A picture of another origin is none of ours.
        Ok(pictures.into_iter().filter_map(|path| Some((path.clone(), sidecar_of(&path).ok()?))).collect())
    }

    /// Where a picture of the running work goes, to be replaced again and again.
    pub fn preview_path(&self) -> PathBuf {
        match &self.only {
            Some(path) => path.with_extension("preview.png"),
            None => self.folder.join("preview.png"),
        }
    }

    /// Writes rows of equally many pictures of one size as `grid.png`, or `grid-2.png` … where there is one already.
    pub fn add_grid(&self, rows: &[Vec<&RgbImage>]) -> Result<PathBuf> {
        let mut path = self.folder.join("grid.png");
        let mut number = 2;
        while path.exists() {
            path = self.folder.join(format!("grid-{number}.png"));
            number += 1;
        }
        write_png(&path, &sheet(rows, 1)?)?;
        Ok(path)
    }
}

/// Makes the folder and tries a file in it.
fn check_writable(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let probe = temporary_name(&folder.join("probe"));
    File::create(&probe)?;
    Ok(fs::remove_file(&probe)?)
}

/// Fails where a file of this path could not be written.
pub fn check_file_writable(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    ensure!(!path.is_dir(), "{}: is a folder; name a file", path.display());
    check_writable(folder).with_context(|| format!("{}: cannot be written", path.display()))
}

/// The largest number that a name in the folder begins with, as in `0012-a-robot-7.png`.
fn last_number(folder: &Path) -> Result<usize> {
    let mut last = 0;
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let number = name.split_once('-').filter(|(digits, _)| digits.len() >= 4).and_then(|(n, _)| n.parse().ok());
        last = last.max(number.unwrap_or(0));
    }
    Ok(last)
}

/// A prompt as part of a file name: its first words, `picture` where there are none.
fn slug(prompt: &str) -> String {
    const MAX_CHARS: usize = 40;
    let words = prompt.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    let mut slug = String::new();
    for word in words {
        let word: String = word.to_lowercase().chars().take(MAX_CHARS).collect();
        if !slug.is_empty() && slug.chars().count() + 1 + word.chars().count() > MAX_CHARS {
            break;
        }
        if !slug.is_empty() {
            slug.push('-');
        }
        slug.push_str(&word);
    }
    if slug.is_empty() { "picture".into() } else { slug }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_becomes_a_short_name() {
        assert_eq!(slug("A robot, in the *snow*!"), "a-robot-in-the-snow");
        assert_eq!(slug("../../etc/passwd"), "etc-passwd");
        assert_eq!(slug("Ein Bär"), "ein-bär");
        assert_eq!(slug(" … "), "picture");
        assert!(slug(&"word ".repeat(99)).len() <= 40 && slug(&"x".repeat(999)).len() == 40);
    }

    #[test]
    fn numbering_goes_on_behind_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["0007-a-1.png", "0012-b-1.json", "12-angry-men.png", "notes.txt"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let mut gallery = Gallery::open(folder.path(), 2).unwrap();
        let path = gallery.add(&RgbImage::new(8, 8), "a cat", 5, &Value::Null).unwrap();
        assert_eq!(path.file_name().unwrap(), "0013-a-cat-5.png");
        assert!(path.with_extension("json").is_file());
    }

    #[test]
    fn a_grid_has_a_row_for_each_prompt_and_replaces_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let gallery = Gallery::open(folder.path(), 2).unwrap();
        let (red, blue) = ([200, 0, 0], [0, 0, 200]);
        let [a, b] = [red, blue].map(|colour| RgbImage::from_pixel(8, 8, image::Rgb(colour)));
        let path = gallery.add_grid(&[vec![&a, &b], vec![&b, &a]]).unwrap();
        let grid = image::open(&path).unwrap().into_rgb8();
        assert_eq!(grid.dimensions(), (8 + 2 + 8, 8 + 2 + 8));
        let at = |x, y| grid.get_pixel(x, y).0;
        assert_eq!([at(7, 7), at(10, 7), at(7, 10), at(10, 10), at(8, 8)], [red, blue, blue, red, [255; 3]]);
        assert_eq!(gallery.add_grid(&[vec![&a]]).unwrap().file_name().unwrap(), "grid-2.png");
    }

    #[test]
    fn pictures_that_are_there_are_known_by_their_settings() {
        let folder = tempfile::tempdir().unwrap();
        let mut gallery = Gallery::open(folder.path(), 2).unwrap();
        let picture = RgbImage::new(8, 8);
        let first = gallery.add(&picture, "a cat", 5, &serde_json::json!({"seed": 5})).unwrap();
        let second = gallery.add(&picture, "a cat", 6, &serde_json::json!({"seed": 6})).unwrap();
        picture.save(folder.path().join("other.png")).unwrap();
        fs::remove_file(&second).unwrap();
        assert_eq!(gallery.recorded().unwrap(), [(first, serde_json::json!({"seed": 5}))]);
    }
}

//! What a language model has answered, by what it was asked: lines of JSON in files that only grow. Each process has a file of
//! its own and reads all of them, so that shards of one job profit from each other's earlier runs.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use serde::{Deserialize, Serialize};

use crate::synth::stage::{PromptAsk, Prompts};

const SUFFIX: &str = "jsonl";

/// Answers in a folder, or in memory alone.
#[derive(Debug, Default)]
pub struct Store {
    known: HashMap<String, Kept>,
    file: Option<(PathBuf, File)>,
}

/// An answer that stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kept {
    /// The prompts.
    Prompts(Prompts),
    /// There are none; why.
    GivenUp(String),
}

impl Kept {
    /// As a caller has it.
    pub fn into_result(self) -> Result<Prompts> {
        match self {
            Self::Prompts(prompts) => Ok(prompts),
            Self::GivenUp(fault) => Err(anyhow!(fault)),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Line {
    key: String,
    /// For people.
    object: String,
    #[serde(flatten)]
    kept: Kept,
}

impl Store {
    /// Keeps nothing beyond this process.
    pub fn in_memory() -> Self {
        Self::default()
    }

    /// Reads all answers in `folder`, which is made if need be, and adds new ones to the file `name`: one a process.
    pub fn open(folder: &Path, name: &str) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
        let own = folder.join(name).with_extension(SUFFIX);
        let mut known = HashMap::new();
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            paths.push(entry?.path());
        }
        paths.sort();
        for path in paths.iter().filter(|path| path.extension().is_some_and(|suffix| suffix == SUFFIX)) {
            let describe = || path.display().to_string();
            let text = fs::read(path).with_context(describe)?;
            for line in text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n")) {
                let line: Line = serde_json::from_slice(line)
                    .with_context(|| format!("{}: a line is no answer; remove the file to ask anew", describe()))?;
                known.insert(line.key, line.kept);
            }
        }
        let describe = || format!("{}: cannot be written", own.display());
        let file = OpenOptions::new().create(true).append(true).open(&own).with_context(describe)?;
        // Half a line, where a run was cut off in the middle of writing it.
        let n_whole = match fs::read(&own) {
            Ok(text) => text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1),
            Err(error) if error.kind() == ErrorKind::NotFound => 0,
            Err(error) => return Err(error).with_context(describe),
        };
        file.set_len(n_whole as u64).with_context(describe)?;
        Ok(Self { known, file: Some((own, file)) })
    }

    /// What was answered, if it was asked.
    pub fn get(&self, key: &str) -> Option<&Kept> {
        self.known.get(key)
    }

    /// Keeps an answer: it is in the file when this returns.
    pub fn put(&mut self, key: &str, ask: &PromptAsk, kept: &Kept) -> Result<()> {
        if let Some((path, file)) = &mut self.file {
            let line = Line { key: key.to_owned(), object: ask.object.to_owned(), kept: kept.clone() };
            let mut text = serde_json::to_string(&line)?;
            text.push('\n');
            let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_data());
            written.with_context(|| format!("{}: cannot be written", path.display()))?;
        }
        self.known.insert(key.to_owned(), kept.clone());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASK: PromptAsk = PromptAsk { object: "mug", n_scenes: 1, seed: 7 };

    fn prompts(object: &str) -> Kept {
        Kept::Prompts(Prompts { object: object.into(), scenes: vec!["a \"mug\"".into()] })
    }

    #[test]
    fn answers_are_there_in_the_next_process_and_in_its_neighbour() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(&folder.path().join("new"), "0-of-2").unwrap();
        store.put("a", &ASK, &prompts("one")).unwrap();
        store.put("b", &ASK, &Kept::GivenUp("refused".into())).unwrap();
        drop(store);
        for name in ["0-of-2", "1-of-2"] {
            let store = Store::open(&folder.path().join("new"), name).unwrap();
            assert_eq!(store.get("a"), Some(&prompts("one")), "{name}");
            assert_eq!(store.get("b"), Some(&Kept::GivenUp("refused".into())));
            assert_eq!(store.get("c"), None);
        }
    }

    #[test]
    fn a_line_that_was_cut_off_is_dropped_and_the_next_one_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), "x").unwrap();
        store.put("a", &ASK, &prompts("one")).unwrap();
        store.put("b", &ASK, &prompts("two")).unwrap();
        drop(store);
        let path = folder.path().join("x.jsonl");
        let text = fs::read(&path).unwrap();
        fs::write(&path, &text[..text.len() - 9]).unwrap();
        let mut store = Store::open(folder.path(), "x").unwrap();
        assert!(store.get("a").is_some() && store.get("b").is_none());
        store.put("b", &ASK, &prompts("three")).unwrap();
        assert_eq!(Store::open(folder.path(), "x").unwrap().get("b"), Some(&prompts("three")));
        fs::write(&path, "nonsense\n").unwrap();
        let error = format!("{:#}", Store::open(folder.path(), "x").unwrap_err());
        assert!(error.contains("x.jsonl: a line is no answer; remove the file"), "{error}");
    }
}

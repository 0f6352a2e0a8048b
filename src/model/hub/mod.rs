//! Models from the hub (huggingface.co, or what `HF_ENDPOINT` names): only the files that are needed, into the cache that
//! Python's huggingface_hub uses, so that what either has downloaded is there for both.
//!
//! The crate hf-hub is not what does it: its version 1.0 begins a download that was cut off anew, takes what has come for
//! whole without looking at size or checksum, knows neither `HF_HUB_OFFLINE` nor `Retry-After`, and brings an asynchronous
//! runtime. Here `client` speaks with the hub, `patience` says what is tried again, `needed` chooses the files, `download`
//! fetches one, `cache` knows where it goes.

mod cache;
mod client;
mod download;
mod name;
mod needed;
mod patience;
mod settings;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

pub use self::client::agent_settings;
pub use self::name::HubName;
pub use self::needed::{Needed, gguf_of, needed};
pub use self::patience::{Failure, Patience, asked_wait};
pub use self::settings::{Settings, Token};

use self::cache::{Cache, make_folder_of};
use self::client::{Client, Listing};
use self::download::Download;
use self::name::is_commit;
use self::needed::JEDI;
use super::Part;
use crate::invalid::invalid;

/// What happens while a model is fetched.
#[derive(Debug)]
pub enum Event<'a> {
    /// A file begins to arrive, `n_kept` bytes of which are here from an earlier try.
    File {
        /// Inside the model folder.
        name: &'a str,
        /// None: nobody says.
        n_bytes: Option<u64>,
        /// 0: a fresh start.
        n_kept: u64,
    },
    /// So many bytes of that file are here now.
    Bytes(u64),
    /// It is here, or its connection broke.
    FileEnd,
    /// Why nothing happens for a while.
    Wait(String),
    /// What may surprise.
    Warning(String),
}

/// Is told what happens.
pub type Watch<'a> = &'a mut dyn FnMut(Event);

/// What a model takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// As it is now.
    pub commit: String,
    /// Of all its needed files.
    pub n_bytes: u64,
    /// Of those that are not here.
    pub n_missing: u64,
}

/// A hub and its cache on this machine.
#[derive(Debug)]
pub struct Hub {
    settings: Settings,
    client: Client,
}

impl Hub {
    /// Opens nothing yet.
    pub fn new(settings: Settings) -> Self {
        Self { client: Client::new(&settings), settings }
    }

    /// The account of the token; None without one, or if the hub does not accept it. Fails if nothing answers.
    pub fn account(&self) -> Result<Option<String>, Failure> {
        self.client.account()
    }

    /// The folder of a model, after downloading what of `parts` the cache does not have.
    pub fn fetch(&self, name: &HubName, parts: &[Part], watch: Watch) -> Result<PathBuf> {
        let cache = Cache::of(&self.settings.cache, &name.repository);
        let cached = || self.cached(&cache, name, parts);
        if self.settings.is_offline {
            return cached().map_err(|lack| {
                invalid(format!(
                    "{name}: {lack:#}, and HF_HUB_OFFLINE keeps from downloading it; unset it, or check the name"
                ))
            });
        }
        // What a commit holds never changes, so nobody need be asked.
        if let Some(commit) = name.commit()
            && (cache.is_known_absent(commit, JEDI) || cache.snapshot(commit).join(JEDI).is_file())
            && let Ok(folder) = cached()
        {
            return Ok(folder);
        }
        match self.patiently(watch, &mut || self.client.listing(name)) {
            Ok(listing) => self.bring(&cache, name, &listing, parts, watch),
            Err(failure) => {
                let is_away = !matches!(failure, Failure::Final(_));
                let error = failure.into_error(name);
                match cached() {
                    Ok(folder) => {
                        watch(Event::Warning(format!("{error:#}; what the cache holds of it is used")));
                        Ok(folder)
                    }
                    Err(lack) if is_away => {
                        Err(anyhow!("{error:#}, and {lack:#}; check the network, or give a model folder"))
                    }
                    Err(_) => Err(error),
                }
            }
        }
    }

    /// What of a model is needed for `parts`, and how much of that is still to come. Nothing is downloaded but lists of shards.
    pub fn plan(&self, name: &HubName, parts: &[Part], watch: Watch) -> Result<Plan> {
        let cache = Cache::of(&self.settings.cache, &name.repository);
        if self.settings.is_offline {
            let folder = self.fetch(name, parts, watch)?;
            let commit = commit_of_snapshot(&folder).unwrap_or_default().to_owned();
            let files = cache.files(&commit);
            let Needed { files, .. } = needed(&files, parts, &mut |file| read(&folder.join(file)))?;
            let sizes = files.iter().map(|file| -> Result<u64> { Ok(fs::metadata(folder.join(file))?.len()) });
            return Ok(Plan { commit, n_bytes: sizes.sum::<Result<u64>>()?, n_missing: 0 });
        }
        let listing = self.patiently(watch, &mut || self.client.listing(name)).map_err(|f| f.into_error(name))?;
        let folder = cache.snapshot(&listing.commit);
        let Needed { files, missing } = needed(&listing.files, parts, &mut |file| {
            self.bring_file(&cache, name, &listing.commit, file, watch)?;
            read(&folder.join(file))
        })
        .with_context(|| name.to_string())?;
        if !missing.is_empty() {
            return Err(invalid(format!("{name}: {}", lack(&listing, &missing))));
        }
        let mut plan = Plan { commit: listing.commit, n_bytes: 0, n_missing: 0 };
        for file in &files {
            if let Ok(there) = fs::metadata(folder.join(file)) {
                plan.n_bytes += there.len();
                continue;
            }
            let ask = &mut || self.client.metadata(name, &plan.commit, file).map_err(Failure::that_may_pass);
            let metadata =
                self.patiently(watch, ask).map_err(|failure| failure.into_error(format!("{name}: {file}")))?;
            let n_bytes = metadata.n_bytes.unwrap_or_default();
            plan.n_bytes += n_bytes;
            plan.n_missing += n_bytes;
        }
        Ok(plan)
    }

    /// The folder of a model as the cache has it, or what it lacks, in words.
    fn cached(&self, cache: &Cache, name: &HubName, parts: &[Part]) -> Result<PathBuf> {
        let place = self.settings.cache.display();
        let commit = name.commit().map(str::to_owned).or_else(|| cache.commit_of(name.revision()));
        let files = commit.as_deref().map(|commit| cache.files(commit)).unwrap_or_default();
        let Some(commit) = commit.filter(|_| !files.is_empty()) else {
            return Err(anyhow!("the cache ({place}) does not hold it"));
        };
        let folder = cache.snapshot(&commit);
        let Needed { missing, .. } = needed(&files, parts, &mut |file| read(&folder.join(file)))?;
        match missing.is_empty() {
            true => Ok(folder),
            false => Err(anyhow!("the cache ({place}) holds only some of it (no {})", missing.join(", no "))),
        }
    }

    fn bring(&self, cache: &Cache, name: &HubName, listing: &Listing, parts: &[Part], watch: Watch) -> Result<PathBuf> {
        let folder = cache.snapshot(&listing.commit);
        let wanted = needed(&listing.files, parts, &mut |file| {
            self.bring_file(cache, name, &listing.commit, file, watch)?;
            read(&folder.join(file))
        });
        let Needed { files, missing } = wanted.with_context(|| name.to_string())?;
        if !missing.is_empty() {
            return Err(invalid(format!("{name}: {}", lack(listing, &missing))));
        }
        for file in &files {
            self.bring_file(cache, name, &listing.commit, file, watch)?;
        }
        if !files.iter().any(|file| file == JEDI) {
            cache.set_absent(&listing.commit, JEDI)?;
        }
        // Not before all is there: until then the cache goes on offering what it had.
        cache.set_commit(name.revision(), &listing.commit)?;
        Ok(folder)
    }

    /// One file into the cache, unless it is there.
    fn bring_file(&self, cache: &Cache, name: &HubName, commit: &str, file: &str, watch: Watch) -> Result<()> {
        if cache.snapshot(commit).join(file).is_file() {
            return Ok(());
        }
        let ask = &mut || self.client.metadata(name, commit, file).map_err(Failure::that_may_pass);
        let metadata = self.patiently(watch, ask).map_err(|failure| failure.into_error(format!("{name}: {file}")))?;
        let (blob, etag) = (cache.blob(&metadata.etag), &metadata.etag);
        let wait = || watch(Event::Wait(format!("{file}: another program downloads it; waiting for that")));
        let _lock = cache.lock(etag, wait)?;
        let n_there = fs::metadata(&blob).map(|blob| blob.len()).ok();
        if n_there.is_none() || metadata.n_bytes.is_some_and(|n_bytes| n_there != Some(n_bytes)) {
            make_folder_of(&blob)?;
            let download = Download {
                name: file,
                metadata: &metadata,
                unfinished: &cache.unfinished_blob(etag),
                blob: &blob,
                patience: self.settings.patience,
            };
            let open = |from| self.client.open(name, commit, file, from);
            download.run(&open, watch).map_err(|error| anyhow!("{name}: {error:#}"))?;
        }
        cache.link(commit, file, etag)
    }

    /// Asks until there is an answer that stands.
    fn patiently<T>(&self, watch: Watch, ask: &mut dyn FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
        let mut n_failed = 0;
        loop {
            let (cause, wait) = match ask() {
                Err(Failure::Passing { cause, wait }) => (cause, wait),
                outcome => return outcome,
            };
            n_failed += 1;
            let Some(pause) = self.settings.patience.wait(n_failed, wait) else {
                return Err(Failure::Passing { cause, wait });
            };
            watch(Event::Wait(format!("{cause}; trying again in {pause:.0?}")));
            std::thread::sleep(pause);
        }
    }
}

/// The commit of a model folder in the cache; None for any other folder.
pub fn commit_of_snapshot(folder: &Path) -> Option<&str> {
    let is_snapshot = folder.parent()?.file_name()? == "snapshots";
    folder.file_name()?.to_str().filter(|name| is_snapshot && is_commit(name))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| path.display().to_string())
}

/// Why a repository is no model, and the way out.
fn lack(listing: &Listing, missing: &[String]) -> String {
    let is_pickle = |file: &&String| [".bin", ".ckpt", ".pt"].iter().any(|suffix| file.ends_with(suffix));
    let of_missing = |file: &&String| {
        let folder = |path: &str| path.split_once('/').map(|(folder, _)| folder.to_owned());
        missing.iter().any(|missing| folder(missing) == folder(file))
    };
    let single = listing.files.iter().find(|file| !file.contains('/') && file.ends_with(".safetensors"));
    let is_pipeline = missing.iter().any(|file| file.contains('/'));
    let missing = missing.join(", no ");
    if let Some(pickle) = listing.files.iter().filter(of_missing).find(is_pickle) {
        format!(
            "has no {missing}, only the pickle {pickle}, which jedi does not open; look for a revision with safetensors \
             (owner/name@refs/pr/N), or convert it in Python"
        )
    } else if !is_pipeline {
        format!("is no model of the kind that is wanted here: no {missing}")
    } else if let Some(single) = single {
        format!(
            "is no whole model in the diffusers layout (no {missing}); download its single file, such as {single}, and name \
             that"
        )
    } else {
        format!("is no whole model in the diffusers layout: no {missing}")
    }
}

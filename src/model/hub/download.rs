//! A file's bytes into its blob: goes on where an earlier try ended, and is not a blob before size and checksum agree.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use sha1::{Digest, Sha1};

use super::client::{Metadata, Transfer};
use super::patience::{Failure, Patience};
use super::{Event, Watch};
use crate::sha256::sha256_of_file;

/// What is downloaded.
pub struct Download<'a> {
    /// For people.
    pub name: &'a str,
    /// What it must turn out to be.
    pub metadata: &'a Metadata,
    /// Where it goes while it arrives.
    pub unfinished: &'a Path,
    /// Where it goes when it is whole.
    pub blob: &'a Path,
    /// How often it is tried.
    pub patience: Patience,
}

impl Download<'_> {
    /// Downloads what is missing; `open` asks the server for the file from a byte on.
    pub fn run(&self, open: &dyn Fn(u64) -> Result<Transfer, Failure>, watch: Watch) -> Result<()> {
        let was_begun = length(self.unfinished) > 0;
        self.fetch(open, watch)?;
        if let Err(error) = self.check() {
            // It is of no use, and the next try must not build on it.
            self.discard()?;
            if !was_begun {
                return Err(error);
            }
            // Only the old part may have been wrong.
            watch(Event::Warning(format!("{error:#}; it is fetched anew")));
            self.fetch(open, watch)?;
            if let Err(error) = self.check() {
                self.discard()?;
                return Err(error);
            }
        }
        fs::rename(self.unfinished, self.blob).with_context(|| format!("{}: cannot be written", self.blob.display()))
    }

    /// All bytes into the unfinished file, in as many tries as it takes while any of them brings something.
    fn fetch(&self, open: &dyn Fn(u64) -> Result<Transfer, Failure>, watch: Watch) -> Result<()> {
        let mut n_failed = 0;
        loop {
            let before = length(self.unfinished);
            let failure = match self.attempt(open, watch) {
                Ok(()) => return Ok(()),
                Err(failure) => failure.that_may_pass(),
            };
            let Failure::Passing { cause, wait } = failure else { return Err(failure.into_error(self.name)) };
            let kept = length(self.unfinished);
            n_failed = if kept > before { 1 } else { n_failed + 1 };
            let Some(wait) = self.patience.wait(n_failed, wait) else {
                return Err(anyhow!(
                    "{}: {cause}; {kept} of {} bytes are kept, run the same command again to go on from there",
                    self.name,
                    self.metadata.n_bytes.map_or("?".to_owned(), |n| n.to_string())
                ));
            };
            watch(Event::Wait(format!("{}: {cause}; trying again in {:.0?}", self.name, wait)));
            std::thread::sleep(wait);
        }
    }

    /// One request.
    fn attempt(&self, open: &dyn Fn(u64) -> Result<Transfer, Failure>, watch: Watch) -> Result<(), Failure> {
        let expected = self.metadata.n_bytes;
        let own = |error: std::io::Error| {
            Failure::Final(
                anyhow::Error::new(error).context(format!("{}: cannot be written", self.unfinished.display())),
            )
        };
        let mut file =
            OpenOptions::new().create(true).truncate(false).write(true).open(self.unfinished).map_err(own)?;
        let mut n_kept = file.metadata().map_err(own)?.len();
        // Without a size nobody can say whether what is here is all.
        if expected.is_none_or(|expected| n_kept > expected) {
            n_kept = 0;
        }
        let is_whole = expected.is_some_and(|expected| n_kept == expected);
        if !is_whole {
            let mut transfer = open(n_kept)?;
            if transfer.from != n_kept {
                // A server that only sends whole files, or for which there is nothing behind what is here.
                n_kept = 0;
                if transfer.from != 0 {
                    return Err(Failure::passing("another part came than was asked for"));
                }
            }
            if let (Some(expected), Some(n_bytes)) = (expected, transfer.n_bytes)
                && expected != n_bytes
            {
                // What is here came from the same place.
                file.set_len(0).map_err(own)?;
                return Err(Failure::Final(anyhow!(
                    "{}: the hub tells of {expected} bytes, but {n_bytes} are sent; nothing of it is kept, try again later",
                    self.name
                )));
            }
            file.set_len(n_kept).map_err(own)?;
            file.seek(SeekFrom::Start(n_kept)).map_err(own)?;
            watch(Event::File { name: self.name, n_bytes: expected.or(transfer.n_bytes), n_kept });
            let outcome = copy(&mut transfer, &mut file, n_kept, expected, watch, &own);
            watch(Event::FileEnd);
            outcome?;
        }
        file.sync_all().map_err(own)
    }

    /// Whether the unfinished file is what the hub tells of: by its size, and by its checksum where the etag is one.
    fn check(&self) -> Result<()> {
        let (path, Metadata { etag, n_bytes }) = (self.unfinished, self.metadata);
        let n_found = length(path);
        let is_hash = etag.chars().all(|c| c.is_ascii_hexdigit());
        let found = match etag.len() {
            64 if is_hash => vec![sha256_of_file(path)?],
            // Mirrors have the contents' own.
            40 if is_hash => git_and_plain_sha1(path)?.to_vec(),
            _ => vec![etag.clone()],
        };
        let has_size = n_bytes.is_none_or(|n_bytes| n_bytes == n_found);
        if has_size && found.iter().any(|found| found.eq_ignore_ascii_case(etag)) {
            return Ok(());
        }
        let found = &found[0];
        Err(anyhow!(
            "{}: was damaged on its way: {n_found} bytes with checksum {found}, where the hub tells of {} with {etag}; \
             nothing of it is kept, try again",
            self.name,
            n_bytes.map_or("any number".to_owned(), |n| n.to_string())
        ))
    }

    fn discard(&self) -> Result<()> {
        fs::remove_file(self.unfinished).with_context(|| format!("{}: cannot be removed", self.unfinished.display()))
    }
}

/// Bytes of a file; 0 if there is none.
fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

fn copy(
    transfer: &mut Transfer,
    file: &mut File,
    n_kept: u64,
    expected: Option<u64>,
    watch: Watch,
    own: &dyn Fn(std::io::Error) -> Failure,
) -> Result<(), Failure> {
    let mut buffer = vec![0; 256 << 10];
    let mut n_there = n_kept;
    let wanted = expected.or(transfer.n_bytes);
    loop {
        let n_read = match transfer.body.read(&mut buffer) {
            Ok(n_read) => n_read,
            Err(error) => {
                return Err(Failure::passing(format!("the connection broke after {n_there} bytes ({error})")));
            }
        };
        if n_read == 0 {
            return match wanted {
                Some(wanted) if n_there < wanted => {
                    Err(Failure::passing(format!("the connection ended after {n_there} of {wanted} bytes")))
                }
                _ => Ok(()),
            };
        }
        file.write_all(&buffer[..n_read]).map_err(own)?;
        n_there += n_read as u64;
        watch(Event::Bytes(n_there));
    }
}

/// What git calls a file (the SHA-1 of a header and the contents), and the SHA-1 of the contents alone. Only small files have
/// such an etag.
fn git_and_plain_sha1(path: &Path) -> Result<[String; 2]> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    let header = format!("blob {}\0", bytes.len());
    let hex = |digest: Sha1| digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok([hex(Sha1::new().chain_update(header).chain_update(&bytes)), hex(Sha1::new().chain_update(&bytes))])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn git_names_a_file_as_git_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        // printf 'hello\n' | git hash-object --stdin; printf 'hello\n' | sha1sum
        fs::write(&path, "hello\n").unwrap();
        let sums = ["ce013625030ba8dba906f756967f9e9ca394464a", "f572d396fae9206628714fb2ce00f72e94f2258f"];
        assert_eq!(git_and_plain_sha1(&path).unwrap(), sums);
    }
}

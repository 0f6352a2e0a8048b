//! A folder that keeps what took long to compute, by the content that it was computed from. Several processes may share it. A
//! kill at any moment loses what was being written and no more; what another encoder made is not used; what is damaged is
//! computed anew; and a full disk only ends the keeping.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// At the head of each part, with the encoder's 64 hexadecimal digits and a line feed behind it.
const MAGIC: &[u8] = b"jedi cache 1\n";
const ENCODER_BYTES: usize = 64;
const HEADER_BYTES: u64 = (MAGIC.len() + ENCODER_BYTES + 1) as u64;
/// Before each payload: key (32), length (4), sums of these (4) and of the payload (8).
const RECORD_BYTES: usize = 48;

type Key = [u8; 32];

/// Hears of what the user may want to know.
pub type Warn = Arc<dyn Fn(&str) + Send + Sync>;

/// Results of one encoder.
pub struct Store {
    folder: PathBuf,
    encoder: String,
    max_bytes: u64,
    warn: Warn,
    state: Mutex<State>,
}

struct State {
    parts: Vec<Arc<File>>,
    places: HashMap<Key, Place>,
    writer: Writer,
}

#[derive(Clone, Copy)]
struct Place {
    part: u32,
    n_bytes: u32,
    /// Of the record.
    offset: u64,
}

/// The part that this process writes.
enum Writer {
    /// Nothing was written yet.
    None,
    Open {
        part: u32,
        length: u64,
    },
    /// The disk or the bound is full.
    Closed,
}

impl Store {
    /// Opens `folder`, made where it is not there, for the results of the encoder with this fingerprint (SHA-256). At most
    /// `max_bytes` (0: without bound) will be added by this process.
    pub fn open(folder: &Path, encoder: &str, max_bytes: u64, warn: Warn) -> Result<Self> {
        let describe = || format!("data.cache {}", folder.display());
        if encoder.len() != ENCODER_BYTES {
            bail!("an encoder's fingerprint has {ENCODER_BYTES} digits, not {}", encoder.len());
        }
        fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", describe()))?;
        let mut state = State { parts: vec![], places: HashMap::new(), writer: Writer::None };
        let mut stale = (0, 0);
        for path in parts_in(folder).with_context(describe)? {
            let mut file = File::open(&path).with_context(|| path.display().to_string())?;
            let length = file.metadata()?.len();
            if !has_header(&mut file, encoder)? {
                stale = (stale.0 + 1, stale.1 + length);
                continue;
            }
            let part = state.parts.len() as u32;
            index(&mut file, part, length, &mut state.places).with_context(|| path.display().to_string())?;
            state.parts.push(Arc::new(file));
        }
        if stale.0 > 0 {
            let (n, megabytes) = (stale.0, stale.1 as f64 / 1e6);
            warn(&format!(
                "{}: {n} files ({megabytes:.1} MB) are of another encoder or version and are not used; remove them if no \
                 other run needs them",
                describe()
            ));
        }
        Ok(Self { folder: folder.to_owned(), encoder: encoder.to_owned(), max_bytes, warn, state: Mutex::new(state) })
    }

    /// How many results are there.
    pub fn n_results(&self) -> usize {
        self.lock().places.len()
    }

    /// Whether there is a result for this content (64 hexadecimal digits).
    pub fn has(&self, content: &str) -> bool {
        key(content).is_some_and(|key| self.lock().places.contains_key(&key))
    }

    /// The result for this content. One that is damaged is told, and forgotten.
    pub fn get(&self, content: &str) -> Option<Vec<u8>> {
        let key = key(content)?;
        let (file, place) = {
            let state = self.lock();
            let place = *state.places.get(&key)?;
            (state.parts[place.part as usize].clone(), place)
        };
        let read = || -> Result<Vec<u8>> {
            let mut record = vec![0; RECORD_BYTES + place.n_bytes as usize];
            file.read_exact_at(&mut record, place.offset)?;
            let payload = record.split_off(RECORD_BYTES);
            if record != head(&key, &payload) {
                bail!("its checksum is another");
            }
            Ok(payload)
        };
        read()
            .map_err(|error| {
                self.lock().places.remove(&key);
                (self.warn)(&format!(
                    "data.cache {}: a result is damaged and is computed anew: {error:#}",
                    self.folder.display()
                ));
            })
            .ok() // Told, and the caller computes it.
    }

    /// Keeps a result. If it cannot be written, that is told once, and nothing more is kept.
    pub fn put(&self, content: &str, payload: &[u8]) {
        let Some(key) = key(content) else { return };
        let mut state = self.lock();
        if state.places.contains_key(&key) || matches!(state.writer, Writer::Closed) {
            return;
        }
        if let Err(error) = self.append(&mut state, key, payload) {
            state.writer = Writer::Closed;
            (self.warn)(&format!(
                "data.cache {}: {error:#}; the run goes on without adding to it",
                self.folder.display()
            ));
        }
    }

    fn append(&self, state: &mut State, key: Key, payload: &[u8]) -> Result<()> {
        let (part, length) = match state.writer {
            Writer::Open { part, length } => (part, length),
            _ => {
                let file = self.new_part().context("cannot be written")?;
                state.parts.push(Arc::new(file));
                (state.parts.len() as u32 - 1, HEADER_BYTES)
            }
        };
        let n_bytes = u32::try_from(payload.len()).context("a result is too large")?;
        let mut record = head(&key, payload);
        record.extend_from_slice(payload);
        let end = length + record.len() as u64;
        if self.max_bytes > 0 && end > self.max_bytes {
            bail!("data.cache_gb = {} are written", self.max_bytes as f64 / 1e9);
        }
        let file = &state.parts[part as usize];
        if let Err(error) = file.write_all_at(&record, length) {
            // Half a record is passed over by its length; it only takes room.
            file.set_len(length).ok();
            return Err(error).context("cannot be written");
        }
        state.writer = Writer::Open { part, length: end };
        state.places.insert(key, Place { part, n_bytes, offset: length });
        Ok(())
    }

    /// A part of this process alone.
    fn new_part(&self) -> Result<File> {
        for number in 0.. {
            let path = self.folder.join(format!("part-{number:06}.bin"));
            match File::options().read(true).write(true).create_new(true).open(&path) {
                Ok(mut file) => {
                    let header = [MAGIC, self.encoder.as_bytes(), b"\n"].concat();
                    if let Err(error) = file.write_all(&header) {
                        fs::remove_file(&path).ok(); // Without a header it is passed over.
                        return Err(error.into());
                    }
                    return Ok(file);
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(|| path.display().to_string()),
            }
        }
        bail!("too many parts")
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no panic under the lock")
    }
}

fn parts_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut parts = vec![];
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("part-") && name.ends_with(".bin") {
            parts.push(entry.path());
        }
    }
    parts.sort();
    Ok(parts)
}

/// Whether a part is of this version and encoder. One without a whole header was just begun.
fn has_header(file: &mut File, encoder: &str) -> Result<bool> {
    let mut header = vec![];
    file.take(HEADER_BYTES).read_to_end(&mut header)?;
    Ok(header == [MAGIC, encoder.as_bytes(), b"\n"].concat())
}

/// Enters the records of a part, as far as they are whole.
fn index(file: &mut File, part: u32, length: u64, places: &mut HashMap<Key, Place>) -> Result<()> {
    let mut offset = HEADER_BYTES;
    let mut reader = std::io::BufReader::with_capacity(4096, file);
    reader.seek(SeekFrom::Start(offset))?;
    let mut record = [0; RECORD_BYTES];
    while offset + RECORD_BYTES as u64 <= length {
        reader.read_exact(&mut record)?;
        let n_bytes = u32::from_le_bytes([record[32], record[33], record[34], record[35]]);
        let end = offset + RECORD_BYTES as u64 + u64::from(n_bytes);
        if record[36..40] != Sha256::digest(&record[..36])[..4] || end > length {
            break;
        }
        let mut key = [0; 32];
        key.copy_from_slice(&record[..32]);
        // A later result stands for one that was damaged.
        places.insert(key, Place { part, n_bytes, offset });
        reader.seek_relative(i64::from(n_bytes))?;
        offset = end;
    }
    Ok(())
}

/// What stands before a payload.
fn head(key: &Key, payload: &[u8]) -> Vec<u8> {
    let mut head = key.to_vec();
    head.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    let sum = Sha256::digest(&head);
    head.extend_from_slice(&sum[..4]);
    head.extend_from_slice(&Sha256::digest(payload)[..8]);
    head
}

/// 32 bytes of 64 hexadecimal digits; None: there is no content.
fn key(content: &str) -> Option<Key> {
    let mut key = [0; 32];
    if content.len() != 64 || !content.is_ascii() {
        return None;
    }
    for (idx, byte) in key.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&content[2 * idx..2 * idx + 2], 16).ok()?;
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sha256::sha256_hex;

    fn content(idx: usize) -> String {
        sha256_hex(idx.to_string().as_bytes())
    }

    fn payload(idx: usize) -> Vec<u8> {
        vec![idx as u8; 100 + idx]
    }

    /// A store, and what it has to say.
    fn open(folder: &Path, encoder: &str) -> (Store, Arc<Mutex<Vec<String>>>) {
        let told = Arc::new(Mutex::new(vec![]));
        let heard = told.clone();
        let warn = Arc::new(move |message: &str| heard.lock().unwrap().push(message.to_owned()));
        (Store::open(folder, &sha256_hex(encoder.as_bytes()), 0, warn).unwrap(), told)
    }

    fn filled(folder: &Path) {
        let (store, _) = open(folder, "a");
        (0..5).for_each(|idx| store.put(&content(idx), &payload(idx)));
    }

    #[test]
    fn what_is_put_is_there_at_the_next_start_and_for_other_processes() {
        let folder = tempfile::tempdir().unwrap();
        let ((one, _), (other, _)) = (open(folder.path(), "a"), open(folder.path(), "a"));
        (0..5).for_each(|idx| one.put(&content(idx), &payload(idx)));
        (3..8).for_each(|idx| other.put(&content(idx), &payload(idx)));
        assert_eq!((one.get(&content(4)), one.get(&content(7))), (Some(payload(4)), None));
        let (next, told) = open(folder.path(), "a");
        assert_eq!(next.n_results(), 8);
        assert!((0..8).all(|idx| next.has(&content(idx)) && next.get(&content(idx)) == Some(payload(idx))));
        assert!(!next.has(&content(8)) && !next.has("") && told.lock().unwrap().is_empty());
    }

    #[test]
    fn results_of_another_encoder_are_not_used_and_told() {
        let folder = tempfile::tempdir().unwrap();
        filled(folder.path());
        let (other, told) = open(folder.path(), "b");
        assert_eq!((other.n_results(), other.get(&content(1))), (0, None));
        assert!(told.lock().unwrap()[0].contains("1 files (0.0 MB) are of another encoder"));
        other.put(&content(1), b"another");
        drop(other);
        assert_eq!(open(folder.path(), "b").0.get(&content(1)).unwrap(), b"another");
        assert_eq!(open(folder.path(), "a").0.get(&content(1)).unwrap(), payload(1));
    }

    #[test]
    fn a_kill_at_any_byte_loses_the_last_result_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        filled(folder.path());
        let path = folder.path().join("part-000000.bin");
        let whole = fs::read(&path).unwrap();
        let ends: Vec<usize> =
            (0..=5).map(|n| HEADER_BYTES as usize + (0..n).map(|i| RECORD_BYTES + 100 + i).sum::<usize>()).collect();
        assert_eq!(ends[5], whole.len());
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let (store, _) = open(folder.path(), "a");
            let n_whole = ends.iter().filter(|&&end| end <= length).count().saturating_sub(1);
            assert_eq!(store.n_results(), n_whole, "{length} of {} bytes", whole.len());
            assert!((0..n_whole).all(|idx| store.get(&content(idx)) == Some(payload(idx))));
        }
    }

    #[test]
    fn a_damaged_result_is_told_and_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        filled(folder.path());
        let path = folder.path().join("part-000000.bin");
        let mut bytes = fs::read(&path).unwrap();
        let in_second = HEADER_BYTES as usize + 2 * RECORD_BYTES + 100 + 50;
        bytes[in_second] ^= 1;
        fs::write(&path, bytes).unwrap();
        let (store, told) = open(folder.path(), "a");
        assert_eq!((store.get(&content(1)), store.get(&content(2))), (None, Some(payload(2))));
        assert!(told.lock().unwrap()[0].contains("a result is damaged and is computed anew: its checksum"));
        store.put(&content(1), &payload(1));
        assert_eq!(open(folder.path(), "a").0.get(&content(1)), Some(payload(1)));
    }

    /// `/dev/full` takes no byte, as a full disk does.
    #[test]
    fn a_full_disk_is_told_once_and_what_is_there_is_still_given() {
        let folder = tempfile::tempdir().unwrap();
        filled(folder.path());
        let (store, told) = open(folder.path(), "a");
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        {
            let mut state = store.lock();
            state.parts.push(Arc::new(full));
            state.writer = Writer::Open { part: state.parts.len() as u32 - 1, length: HEADER_BYTES };
        }
        (5..8).for_each(|idx| store.put(&content(idx), &payload(idx)));
        let told = told.lock().unwrap();
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].contains("No space left on device") && told[0].contains("goes on without adding to it"),
            "{}",
            told[0]
        );
        assert_eq!((store.get(&content(6)), store.get(&content(4))), (None, Some(payload(4))));
    }

    #[test]
    fn no_more_is_written_than_allowed() {
        let folder = tempfile::tempdir().unwrap();
        let told = Arc::new(Mutex::new(vec![]));
        let heard = told.clone();
        let warn = Arc::new(move |message: &str| heard.lock().unwrap().push(message.to_owned()));
        let store = Store::open(folder.path(), &sha256_hex(b"a"), 400, warn).unwrap();
        (0..5).for_each(|idx| store.put(&content(idx), &payload(idx)));
        assert_eq!((store.n_results(), told.lock().unwrap().len()), (2, 1));
        assert!(fs::metadata(folder.path().join("part-000000.bin")).unwrap().len() <= 400);
    }
}

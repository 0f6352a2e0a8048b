//! A `.safetensors` file, mapped into memory or part of the binary. What has been read is handed back to the system at once:
//! pages of a mapped file count as the process's memory, and would double what a loaded model takes.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::Metadata;

use super::weights::Stored;

/// An open file: its header, and its data where they lie.
#[derive(Debug)]
pub struct WeightFile {
    bytes: Bytes,
    /// Where the header ends.
    data_start: usize,
    header: Metadata,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Embedded(&'static [u8]),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
        }
    }
}

impl WeightFile {
    /// Maps the file and reads its header, which must account for the whole file.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let describe = || format!("{}: not a readable safetensors file", path.display());
        let file = File::open(path).with_context(describe)?;
        // SAFETY: as every user of mapped files, we rely on nobody rewriting the file meanwhile; jedi itself only renames.
        let map = unsafe { Mmap::map(&file) }.with_context(describe)?;
        Self::new(Bytes::Mapped(map)).with_context(describe)
    }

    /// A file inside the binary.
    pub fn embedded(bytes: &'static [u8]) -> Result<Arc<Self>> {
        Self::new(Bytes::Embedded(bytes))
    }

    fn new(bytes: Bytes) -> Result<Arc<Self>> {
        /// The header's length in front of it.
        const N_LENGTH_BYTES: usize = 8;
        let (n_header_bytes, header) = SafeTensors::read_metadata(&bytes)?;
        Ok(Arc::new(Self { bytes, data_start: N_LENGTH_BYTES + n_header_bytes, header }))
    }

    /// What the file says of itself.
    pub fn metadata(&self) -> HashMap<String, String> {
        self.header.metadata().clone().unwrap_or_default()
    }

    /// Its tensors by name; none is read yet.
    pub fn tensors(self: &Arc<Self>) -> BTreeMap<String, Stored> {
        let stored = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
            let (start, end) = info.data_offsets;
            (name, Stored::in_file(self.clone(), start..end, info.dtype, info.shape.clone()))
        };
        self.header.tensors().into_iter().map(stored).collect()
    }

    /// Bytes behind the header.
    pub(super) fn data(&self, range: Range<usize>) -> &[u8] {
        &self.bytes[self.data_start + range.start..self.data_start + range.end]
    }

    /// Gives the memory of bytes that have been read back; reading them again is right, and slower.
    pub(super) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Bytes::Mapped(map) = &self.bytes {
            // SAFETY: the map is shared and never written to, so a dropped page comes back from the file as it was.
            let outcome = unsafe {
                map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    self.data_start + range.start,
                    range.len(),
                )
            };
            // A system that will not take the advice costs memory alone.
            outcome.ok();
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Reads every tensor of a `.safetensors` file.
pub fn read_safetensors(path: &Path) -> Result<BTreeMap<String, candle_core::Tensor>> {
    super::weights::Weights::new(path.display().to_string(), WeightFile::open(path)?.tensors()).load_all()
}

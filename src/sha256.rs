//! Fingerprints of bytes, as `sha256sum` prints them.

use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, Result};
use sha2::{Digest, Sha256};

/// SHA-256 in 64 lower-case hexadecimal digits.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// [`sha256_hex`] of a file, read piece by piece.
pub fn sha256_of_file(path: &Path) -> Result<String> {
    const N_AT_ONCE: usize = 1 << 20;
    let describe = || path.display().to_string();
    let mut file = File::open(path).with_context(describe)?;
    let mut digest = Sha256::new();
    let mut piece = vec![0; N_AT_ONCE];
    loop {
        match std::io::Read::read(&mut file, &mut piece).with_context(describe)? {
            0 => return Ok(hex(&digest.finalize())),
            n_read => digest.update(&piece[..n_read]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_the_digits_of_its_bytes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes = vec![7; (1 << 20) + 3];
        std::fs::write(file.path(), &bytes).unwrap();
        assert_eq!(sha256_of_file(file.path()).unwrap(), sha256_hex(&bytes));
    }

    #[test]
    fn gives_the_digits_that_everyone_gives() {
        // FIPS 180-2, appendix B.1.
        assert_eq!(sha256_hex(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}

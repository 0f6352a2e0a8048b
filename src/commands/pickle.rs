//! Python pickles (`.ckpt`, `.bin`, `.pt`) hold programs that run when they are opened: they are refused, with the way out.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::invalid::invalid;

/// Turns a checkpoint into safetensors, in PyTorch's mode that loads tensors and runs nothing.
const WAY_OUT: &str = "import sys, torch, safetensors.torch as s; c = torch.load(sys.argv[1], map_location='cpu', \
     weights_only=True); s.save_file({k: v.clone().contiguous() for k, v in c.get('state_dict', c).items() if \
     torch.is_tensor(v)}, sys.argv[2])";

/// Refuses the file that `option` names if it is a pickle, bare or in PyTorch's zip.
pub fn refuse(option: &str, name: &str, path: &Path) -> Result<()> {
    let mut start = [0; 9];
    let mut file = File::open(path).with_context(|| format!("{option} {name}"))?;
    // A shorter file is none; what it is, its reader will say. The header of safetensors stands behind its length, which may
    // look like anything.
    let may_be = file.read_exact(&mut start).is_ok() && start[8] != b'{';
    let has_suffix = path.extension().is_some_and(|suffix| ["ckpt", "pt", "pth", "bin"].iter().any(|s| suffix == *s));
    let is_pickle = may_be && (start.starts_with(b"PK\x03\x04") || start[0] == 0x80 && (2..=5).contains(&start[1]));
    if !has_suffix && !is_pickle {
        return Ok(());
    }
    let safe = path.with_extension("safetensors");
    Err(invalid(format!(
        "{option} {name}: is a Python pickle, which may run anything when it is opened; make a .safetensors file of it and \
         give that: python3 -c \"{WAY_OUT}\" {name} {}",
        safe.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::invalid::is_invalid;

    #[test]
    fn a_pickle_is_known_by_its_name_or_its_first_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let outcome = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            refuse("--model", "M", &path)
        };
        let (zip, bare) = (&b"PK\x03\x04 a zip"[..], &b"\x80\x02}q a pickle"[..]);
        for (name, bytes) in [("sd.ckpt", &b""[..]), ("sd.bin", b"1234"), ("sd", zip), ("sd.safetensors", bare)] {
            let error = outcome(name, bytes).unwrap_err();
            assert!(is_invalid(&error), "{error}");
            assert!(error.to_string().contains("is a Python pickle") && error.to_string().ends_with(".safetensors"));
        }
        // A safetensors header of 0x280 bytes, and a file of nothing.
        assert!(outcome("sd.safetensors", b"\x80\x02\0\0\0\0\0\0{").is_ok());
        assert!(outcome("sd.safetensors", b"").is_ok());
    }
}

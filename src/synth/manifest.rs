//! What a folder of made data holds: `dataset.json`, written before anything else, so that a second run goes on only
//! with the same settings.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

use crate::whole_file::{UNFINISHED, write_whole};

/// Name of the manifest in its folder.
pub const MANIFEST: &str = "dataset.json";

/// Makes `folder` ready for data made with `settings`, or refuses a folder that holds something else.
pub fn claim(folder: &Path, settings: &Map<String, Value>) -> Result<()> {
    let name = folder.display();
    fs::create_dir_all(folder).with_context(|| format!("{name}: cannot be made"))?;
    // Listed before the manifest is looked for: another part of the same job may be starting in this moment, and
    // writes its manifest first.
    let is_empty = is_empty(folder).with_context(|| format!("{name}: cannot be read"))?;
    let path = folder.join(MANIFEST);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if !is_empty {
                bail!("{name}: holds other files and no {MANIFEST}; choose a new folder with --out");
            }
            return write_whole(&path, &serde_json::to_vec_pretty(settings)?);
        }
        Err(error) => return Err(error).with_context(|| format!("{name}/{MANIFEST}: cannot be read")),
    };
    let found: Map<String, Value> =
        serde_json::from_slice(&bytes).with_context(|| format!("{name}/{MANIFEST}: is not a manifest"))?;
    let shown = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
    let differences: Vec<String> = settings
        .keys()
        .chain(found.keys().filter(|key| !settings.contains_key(*key)))
        .filter(|key| found.get(*key) != settings.get(*key))
        .map(|key| format!("{key} is {} there, {} now", shown(found.get(key)), shown(settings.get(key))))
        .collect();
    if !differences.is_empty() {
        let differences = differences.join(", ");
        bail!("{name}: holds data of other settings ({differences}); use the same settings or a new folder with --out");
    }
    Ok(())
}

fn is_empty(folder: &Path) -> std::io::Result<bool> {
    for entry in fs::read_dir(folder)? {
        if !entry?.file_name().to_string_lossy().starts_with(UNFINISHED) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn settings(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn the_same_settings_may_go_on_and_others_may_not() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("new/data");
        let first = settings(json!({"seed": u64::MAX, "size": 64}));
        claim(&folder, &first).unwrap();
        fs::write(folder.join("0.png"), "").unwrap();
        claim(&folder, &first).unwrap();
        let error = claim(&folder, &settings(json!({"seed": u64::MAX, "size": 32, "masks": true}))).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("size is 64 there, 32 now, masks is nothing there, true now"), "{error}");
    }

    #[test]
    fn a_folder_of_other_things_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("holiday.jpg"), "").unwrap();
        let error = claim(folder.path(), &Map::new()).unwrap_err().to_string();
        assert!(error.contains("holds other files and no dataset.json"), "{error}");
        assert!(!folder.path().join(MANIFEST).exists());
    }
}

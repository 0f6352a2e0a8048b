//! Settings from TOML: a file, then `--set key=value`, then the settings type. The types are the libraries' own, with
//! `deny_unknown_fields`; whatever is wrong is the user's to mend (`Invalid`) and is told with the file or the override.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use serde::{Serialize, de::DeserializeOwned};
use toml::{Table, Value};

use crate::invalid::invalid;

/// Reads settings from the file at `path`, changed by `overrides` (`table.key=value`, the last one wins).
pub fn load<T: DeserializeOwned>(path: &Path, overrides: &[String]) -> Result<T> {
    let name = path.display().to_string();
    let text = fs::read_to_string(path).map_err(|cause| invalid(format!("{name}: cannot be read: {cause}")))?;
    from_text(&name, &text, overrides)
}

/// Like `load`, from a text that messages call `name`.
pub fn from_text<T: DeserializeOwned>(name: &str, text: &str, overrides: &[String]) -> Result<T> {
    let file: Table = toml::from_str(text).map_err(|error| {
        invalid(format!("{name}: {}{}", line_of(text, &error), error.message().replace('\n', ", ")))
    })?;
    let mut table = file.clone();
    for assignment in overrides {
        apply(&mut table, assignment)?;
    }
    let error = match table.try_into() {
        Ok(settings) => return Ok(settings),
        Err(error) => error,
    };

    // The culprit is the first of file, first override, second override … after which this very error is there.
    let is_same = |other: &toml::de::Error| other.message() == error.message();
    let cause = error.to_string().trim().replace('\n', " ");
    if let Some(in_text) = toml::from_str::<T>(text).err().filter(is_same) {
        return Err(invalid(format!("{name}: {}{cause}", line_of(text, &in_text))));
    }
    let mut table = file;
    for assignment in overrides {
        apply(&mut table, assignment)?;
        if table.clone().try_into::<T>().err().is_some_and(|error| is_same(&error)) {
            return Err(invalid(format!("--set {assignment}: {cause}")));
        }
    }
    Err(invalid(format!("{name}: {cause}")))
}

/// The resolved settings, to print or to keep with a run.
pub fn to_toml<T: Serialize>(settings: &T) -> Result<String> {
    toml::to_string_pretty(settings).context("settings cannot be written as TOML")
}

/// Sets one value; tables on the way are made where they are missing.
fn apply(table: &mut Table, assignment: &str) -> Result<()> {
    let wrong = |cause: &str| invalid(format!("--set {assignment}: {cause}"));
    let (key, text) = assignment.split_once('=').ok_or_else(|| wrong("no `=`; use key=value"))?;
    let parts: Vec<&str> = key.trim().split('.').map(str::trim).collect();
    let (last, tables) = parts.split_last().ok_or_else(|| wrong("no key; use key=value"))?;
    if parts.iter().any(|part| part.is_empty()) {
        return Err(wrong("a part of the key is empty; use key=value or table.key=value"));
    }
    let mut table = table;
    for part in tables {
        let entry = table.entry(*part).or_insert_with(|| Value::Table(Table::new()));
        let kind = entry.type_str();
        table = entry.as_table_mut().ok_or_else(|| wrong(&format!("`{part}` is a {kind}, not a table")))?;
    }
    table.insert((*last).to_owned(), value(text.trim()));
    Ok(())
}

/// A TOML value where the text is one, else the text itself, so that strings need no quotes.
fn value(text: &str) -> Value {
    text.parse().unwrap_or_else(|_| Value::String(text.to_owned()))
}

/// `line N: `, or nothing where the error has no place.
fn line_of(text: &str, error: &toml::de::Error) -> String {
    match error.span() {
        Some(span) => format!("line {}: ", text[..span.start.min(text.len())].matches('\n').count() + 1),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::invalid::is_invalid;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Settings {
        steps: usize,
        #[serde(default)]
        optim: Optim,
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Optim {
        rate: f64,
        name: String,
    }

    const TEXT: &str = "# toys\nsteps = 10\n\n[optim]\nrate = 1e-4\n";

    fn with(text: &str, overrides: &[&str]) -> Result<Settings> {
        from_text("toys.toml", text, &overrides.iter().map(|o| o.to_string()).collect::<Vec<_>>())
    }

    /// The message of a refusal, which must be the user's to mend.
    fn refusal(text: &str, overrides: &[&str]) -> String {
        let error = with(text, overrides).unwrap_err();
        assert!(is_invalid(&error));
        let message = format!("{error:#}");
        assert!(!message.contains('\n'), "more than one line: {message}");
        message
    }

    #[test]
    fn overrides_win_and_make_tables() {
        let settings = with(TEXT, &["steps=20", "steps = 30", "optim.name=adam w"]).unwrap();
        let optim = Optim { rate: 1e-4, name: "adam w".into() };
        assert_eq!(settings, Settings { steps: 30, optim });
        let settings = with("steps = 1", &["optim.rate=0.5"]).unwrap();
        assert_eq!(settings.optim.rate, 0.5);
        assert_eq!(with("", &["steps=4"]).unwrap().steps, 4);
    }

    #[test]
    fn resolved_settings_read_back() {
        let settings = with(TEXT, &["optim.name=\"adam\""]).unwrap();
        assert_eq!(with(&to_toml(&settings).unwrap(), &[]).unwrap(), settings);
    }

    #[test]
    fn unknown_fields_are_refused_with_the_known_ones() {
        let message = refusal("steps = 1\n[optim]\nrat = 2.0\n", &[]);
        for part in ["toys.toml: line 3: ", "`rat`", "`rate`"] {
            assert!(message.contains(part), "{part} is not in: {message}");
        }
    }

    #[test]
    fn bad_syntax_names_file_and_line() {
        let message = refusal("steps = 1\nsteps 2\n", &[]);
        assert!(message.starts_with("toys.toml: line 2: "), "{message}");
    }

    #[test]
    fn wrong_types_name_the_field_and_who_set_it() {
        let message = refusal("steps = 1\n[optim]\nrate = \"fast\"\n", &["steps=2"]);
        assert!(message.starts_with("toys.toml: line 3: ") && message.contains("optim.rate"), "{message}");
        let message = refusal(TEXT, &["steps=2", "optim.rate=fast", "optim.name=adam"]);
        assert!(message.starts_with("--set optim.rate=fast: ") && message.contains("optim.rate"), "{message}");
        let message = refusal(TEXT, &["optim.momentun=0.9"]);
        assert!(message.starts_with("--set optim.momentun=0.9: ") && message.contains("`rate`"), "{message}");
    }

    #[test]
    fn bad_overrides_are_refused() {
        for wrong in ["steps", "=2", "optim.=2", "steps.x=2"] {
            assert!(refusal(TEXT, &[wrong]).starts_with(&format!("--set {wrong}: ")));
        }
    }

    #[test]
    fn missing_fields_and_files_are_named() {
        let message = refusal("[optim]\n", &[]);
        assert!(message.starts_with("toys.toml: ") && message.contains("`steps`"), "{message}");
        let error = load::<Settings>(Path::new("nowhere/toys.toml"), &[]).unwrap_err();
        assert!(is_invalid(&error) && error.to_string().starts_with("nowhere/toys.toml: "));
    }
}

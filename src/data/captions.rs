//! Where the captions of a sample come from: its text file, a key of its JSON, or a template filled from the JSON.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The rule of a source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptionRule {
    /// The text file beside the pictures.
    #[default]
    File,
    /// What stands at this key of the JSON (`a.b` is b inside a): a text for all pictures, or one a picture.
    Json(String),
    /// This text with `{key}` replaced by the sample's key and `{a.b}` by what stands there in the JSON (a list: one a
    /// picture).
    Template(String),
}

impl CaptionRule {
    /// Whether the text file is read.
    pub fn needs_file(&self) -> bool {
        *self == CaptionRule::File
    }

    /// One caption a picture. `from_file` gives those of the text file.
    pub fn captions(
        &self,
        key: &str,
        json: &Value,
        n_images: usize,
        from_file: impl FnOnce() -> Result<Vec<String>>,
    ) -> Result<Vec<String>> {
        match self {
            CaptionRule::File => from_file(),
            CaptionRule::Json(path) => from_json(json, path, n_images),
            CaptionRule::Template(template) => {
                (0..n_images).map(|idx| filled(template, key, json, idx, n_images)).collect()
            }
        }
    }
}

/// What stands at `a.b.0` of a JSON value.
pub fn at<'a>(json: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(json, |value, name| match value {
        Value::Array(items) => items.get(name.parse::<usize>().ok()?),
        _ => value.get(name),
    })
}

fn from_json(json: &Value, path: &str, n_images: usize) -> Result<Vec<String>> {
    let text = |value: &Value| {
        let text = value.as_str().with_context(|| format!(".json: {path}: holds {value}, not a text"))?;
        Ok(text.trim().to_owned())
    };
    match found(json, path)? {
        Value::Array(texts) => {
            let n_captions = texts.len();
            ensure!(
                n_captions == n_images,
                ".json: {path}: {n_captions} captions for {n_images} pictures; there must be one a picture, or one text"
            );
            texts.iter().map(text).collect()
        }
        value => Ok(vec![text(value)?; n_images]),
    }
}

fn found<'a>(json: &'a Value, path: &str) -> Result<&'a Value> {
    at(json, path).with_context(|| {
        format!(".json: the caption is missing: there is no {path}; correct the file or the caption rule")
    })
}

fn filled(template: &str, key: &str, json: &Value, idx: usize, n_images: usize) -> Result<String> {
    let mut caption = String::new();
    let mut rest = template;
    while let Some((before, behind)) = rest.split_once('{') {
        let Some((field, behind)) = behind.split_once('}') else {
            bail!("caption template {template:?}: a brace is not closed");
        };
        caption += before;
        caption += &match field {
            "key" => key.to_owned(),
            path => match found(json, path)? {
                Value::Array(values) => {
                    ensure!(
                        values.len() == n_images,
                        ".json: {path}: {} values for {n_images} pictures; there must be one a picture",
                        values.len()
                    );
                    plain(&values[idx], path)?
                }
                value => plain(value, path)?,
            },
        };
        rest = behind;
    }
    Ok(caption + rest)
}

fn plain(value: &Value, path: &str) -> Result<String> {
    match value {
        Value::String(text) => Ok(text.trim().to_owned()),
        Value::Number(number) => Ok(number.to_string()),
        other => bail!(".json: {path}: holds {other}, not a text"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn captions(rule: &CaptionRule, json: &Value, n: usize) -> Result<Vec<String>> {
        rule.captions("00/7", json, n, || panic!("the file is not asked for"))
    }

    #[test]
    fn captions_come_from_json_one_for_all_or_one_each() {
        let json = json!({"a": {"text": " a cat "}, "all": ["x", "y"], "n": 3});
        let rule = |path: &str| CaptionRule::Json(path.into());
        assert_eq!(captions(&rule("a.text"), &json, 3).unwrap(), ["a cat"; 3]);
        assert_eq!(captions(&rule("all"), &json, 2).unwrap(), ["x", "y"]);
        assert_eq!(captions(&rule("all.1"), &json, 1).unwrap(), ["y"]);
        let refusal = |path, n| format!("{:#}", captions(&rule(path), &json, n).unwrap_err());
        assert!(refusal("all", 3).starts_with(".json: all: 2 captions for 3 pictures"));
        assert!(refusal("b", 1).starts_with(".json: the caption is missing: there is no b"));
        assert!(refusal("n", 1).starts_with(".json: n: holds 3, not a text"));
    }

    #[test]
    fn a_template_is_filled_for_each_picture() {
        let json = json!({"class": "cat", "scenes": ["at home", "outside"], "year": 2019, "deep": {"x": null}});
        let fill = |text: &str, n| captions(&CaptionRule::Template(text.into()), &json, n);
        assert_eq!(
            fill("a {class}, {scenes}, {year} ({key})", 2).unwrap(),
            ["a cat, at home, 2019 (00/7)", "a cat, outside, 2019 (00/7)"]
        );
        assert_eq!(fill("", 2).unwrap(), ["", ""]);
        let refusal = |text, n| format!("{:#}", fill(text, n).unwrap_err());
        assert!(refusal("{scenes}", 3).contains("2 values for 3 pictures"));
        assert!(refusal("{clas}", 1).contains("there is no clas"));
        assert!(refusal("{deep.x}", 1).contains("holds null, not a text"));
        assert!(refusal("a {class", 1).contains("not closed"));
    }

    #[test]
    fn rules_are_written_as_in_a_config() {
        #[derive(Deserialize)]
        struct Source {
            caption: CaptionRule,
        }
        let parsed = |text: &str| toml::from_str::<Source>(text).unwrap().caption;
        assert_eq!(parsed("caption = 'file'"), CaptionRule::File);
        assert_eq!(parsed("caption = { json = 'a.b' }"), CaptionRule::Json("a.b".into()));
        assert_eq!(parsed("caption.template = 'a {class}'"), CaptionRule::Template("a {class}".into()));
    }
}

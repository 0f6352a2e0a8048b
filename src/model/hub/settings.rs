//! What the environment says of the hub, in the variables that Python's huggingface_hub reads.

use std::env;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use super::patience::Patience;
use crate::invalid::invalid;

/// Where the hub and its cache are, and how to speak with it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Without a slash at its end (`HF_ENDPOINT`).
    pub endpoint: String,
    /// The folder of `models--owner--name` (`HF_HUB_CACHE`, else `hub` in `HF_HOME`).
    pub cache: PathBuf,
    /// What opens private and gated models (`HF_TOKEN`, else the file that `hf auth login` writes).
    pub token: Option<Token>,
    /// Nothing is asked, the cache has to do (`HF_HUB_OFFLINE`).
    pub is_offline: bool,
    /// How long an answer may take.
    pub timeout: Duration,
    /// How often what fails is tried again.
    pub patience: Patience,
}

/// A secret that is never shown.
#[derive(Clone)]
pub struct Token {
    pub(super) secret: String,
    /// The variable or file that it comes from.
    pub origin: String,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Token from {}", self.origin)
    }
}

impl Settings {
    /// As the environment has it.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| env::var(name).ok())
    }

    /// The rules of `huggingface_hub/constants.py`; a variable that is empty counts as not set.
    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let first = |names: &[&str]| names.iter().find_map(|name| set(name));
        let is_true =
            |value: Option<String>| value.is_some_and(|v| ["1", "ON", "YES", "TRUE"].contains(&&*v.to_uppercase()));
        let own_home = set("HOME").or_else(|| set("USERPROFILE")).map(PathBuf::from);
        let path = |text: String| match (text.strip_prefix("~/"), &own_home) {
            (Some(rest), Some(home)) => home.join(rest),
            _ => PathBuf::from(text),
        };
        let home = match (set("HF_HOME"), set("XDG_CACHE_HOME"), &own_home) {
            (Some(home), ..) => path(home),
            (None, Some(caches), _) => path(caches).join("huggingface"),
            (None, None, Some(home)) => home.join(".cache/huggingface"),
            (None, None, None) => {
                return Err(invalid("HF_HOME: is not set, nor is HOME; set it to the folder of the hub's cache"));
            }
        };
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(invalid(format!(
                "HF_ENDPOINT {endpoint}: begins with neither https:// nor http://; name a URL"
            )));
        }
        let token_file = set("HF_TOKEN_PATH").map_or_else(|| home.join("token"), path);
        let of_variable = |name: &str| Some(Token { secret: set(name)?.trim().to_owned(), origin: name.to_owned() });
        // A file that is not there or cannot be read is no token.
        let of_file = || fs::read_to_string(&token_file).ok().map(|text| text.trim().to_owned());
        let token = of_variable("HF_TOKEN").or_else(|| of_variable("HUGGING_FACE_HUB_TOKEN")).or_else(|| {
            let secret = of_file().filter(|secret| !secret.is_empty())?;
            Some(Token { secret, origin: token_file.display().to_string() })
        });
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).map_or_else(|| home.join("hub"), path),
            token: token.filter(|_| !is_true(set("HF_HUB_DISABLE_IMPLICIT_TOKEN"))),
            is_offline: is_true(first(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])),
            timeout: Duration::from_secs(10),
            patience: Patience::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings> {
        let variables: Vec<(String, String)> = variables.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Settings::from_variables(|name| variables.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()))
    }

    #[test]
    fn the_cache_lies_where_python_has_it() {
        for (variables, cache) in [
            (&[("HOME", "/me")][..], "/me/.cache/huggingface/hub"),
            (&[("HOME", "/me"), ("XDG_CACHE_HOME", "/caches")], "/caches/huggingface/hub"),
            (&[("HOME", "/me"), ("HF_HOME", "~/hf"), ("XDG_CACHE_HOME", "/caches")], "/me/hf/hub"),
            (&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/old"),
            (&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")], "/new"),
            (&[("HF_HOME", ""), ("HOME", "/me")], "/me/.cache/huggingface/hub"),
        ] {
            assert_eq!(settings(variables).unwrap().cache, PathBuf::from(cache), "{variables:?}");
        }
        assert!(settings(&[]).unwrap_err().to_string().starts_with("HF_HOME: "));
    }

    #[test]
    fn the_endpoint_is_a_url() {
        let endpoint = |value| settings(&[("HF_HOME", "/hf"), ("HF_ENDPOINT", value)]).map(|found| found.endpoint);
        assert_eq!(endpoint("").unwrap(), "https://huggingface.co");
        assert_eq!(endpoint("http://mirror:8080/").unwrap(), "http://mirror:8080");
        assert!(endpoint("mirror").unwrap_err().to_string().contains("HF_ENDPOINT mirror: "));
    }

    #[test]
    fn offline_is_what_python_takes_for_true() {
        let is_offline = |name, value| settings(&[("HF_HOME", "/hf"), (name, value)]).unwrap().is_offline;
        assert!(["1", "on", "Yes", "TRUE"].iter().all(|value| is_offline("HF_HUB_OFFLINE", value)));
        assert!(["", "0", "off", "2"].iter().all(|value| !is_offline("HF_HUB_OFFLINE", value)));
        assert!(is_offline("TRANSFORMERS_OFFLINE", "1"));
    }

    #[test]
    fn a_token_comes_from_the_environment_or_else_the_file_and_is_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        let token = |more: &[(&str, &str)]| settings(&[&[("HF_HOME", home)], more].concat()).unwrap().token;
        assert!(token(&[]).is_none());
        fs::write(folder.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(token(&[]).unwrap().secret, "hf_file");
        let of_variable = token(&[("HF_TOKEN", " hf_variable ")]).unwrap();
        assert_eq!((&*of_variable.secret, &*of_variable.origin), ("hf_variable", "HF_TOKEN"));
        assert_eq!(format!("{of_variable:?}"), "Token from HF_TOKEN");
        assert!(token(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).is_none());
    }
}

//! The name of a model on the hub: `owner/name` or `owner/name@revision`, either behind `hf:`.

use std::fmt;

/// The branch that a name without a revision means.
const DEFAULT_REVISION: &str = "main";

/// A model on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    /// `owner/name`.
    pub repository: String,
    revision: Option<String>,
}

impl HubName {
    /// None for what is no such name, such as a path.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix("hf:").unwrap_or(text);
        let (repository, revision) = match text.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (text, None),
        };
        let (owner, model) = repository.split_once('/')?;
        let is_whole = is_word(owner) && is_word(model) && revision.is_none_or(is_revision);
        is_whole.then(|| Self { repository: repository.to_owned(), revision: revision.map(str::to_owned) })
    }

    /// A branch, a tag, `refs/pr/N` or a commit.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(DEFAULT_REVISION)
    }

    /// The commit, if it is one that is named: what is there never changes.
    pub fn commit(&self) -> Option<&str> {
        self.revision.as_deref().filter(|revision| is_commit(revision))
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match &self.revision {
            Some(revision) => write!(f, "{}@{revision}", self.repository),
            None => f.write_str(&self.repository),
        }
    }
}

/// 40 hexadecimal digits.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.chars().all(|c| c.is_ascii_hexdigit())
}

fn is_word(word: &str) -> bool {
    !word.is_empty() && !word.starts_with('.') && word.chars().all(|c| c.is_alphanumeric() || "-_.".contains(c))
}

/// It becomes a path below the cache's `refs`.
fn is_revision(revision: &str) -> bool {
    revision.split('/').all(is_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_the_hub_is_told_from_a_path() {
        let parts = |text| HubName::parse(text).map(|name| (name.repository.clone(), name.revision().to_owned()));
        let is = |repository: &str, revision: &str| Some((repository.to_owned(), revision.to_owned()));
        assert_eq!(parts("hf:owner/model@v1"), is("owner/model", "v1"));
        assert_eq!(parts("owner/sd-v1.4"), is("owner/sd-v1.4", "main"));
        assert_eq!(parts("owner/model@refs/pr/3"), is("owner/model", "refs/pr/3"));
        for path in ["model", "./model", "../model", "/owner/model", "a/b/c", "hf:model", "a/b@", "a/b@../../c"] {
            assert_eq!(parts(path), None, "{path}");
        }
    }

    #[test]
    fn a_commit_is_told_from_a_branch() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(HubName::parse(&format!("a/b@{commit}")).unwrap().commit(), Some(commit));
        assert_eq!(HubName::parse("a/b@main").unwrap().commit(), None);
        assert_eq!(HubName::parse("a/b").unwrap().commit(), None);
    }
}

//! Requests to the hub and what its answers mean.

use std::io::Read;
use std::time::Duration;

use serde::Deserialize;
use ureq::config::ConfigBuilder;
use ureq::http::{HeaderMap, Response};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::typestate::AgentScope;
use ureq::{Agent, Body};

use super::name::{HubName, is_commit};
use super::patience::{Failure, asked_wait};
use super::settings::{Settings, Token};
use crate::invalid::invalid;

/// Speaks with one hub.
#[derive(Debug)]
pub struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<Token>,
}

/// What a revision holds.
#[derive(Debug)]
pub struct Listing {
    /// The commit that the revision means now.
    pub commit: String,
    /// Names inside the model folder.
    pub files: Vec<String>,
}

/// What is known of a file before it is downloaded.
#[derive(Debug, PartialEq, Eq)]
pub struct Metadata {
    /// SHA-256 of a large file, git's SHA-1 of a small one; on other servers anything.
    pub etag: String,
    /// None where the server does not say.
    pub n_bytes: Option<u64>,
}

/// A file on its way.
pub struct Transfer {
    /// The first byte that comes: the one that was asked for, or 0 where the server only sends whole files.
    pub from: u64,
    /// Bytes of the whole file, as this answer has it.
    pub n_bytes: Option<u64>,
    /// The bytes.
    pub body: Box<dyn Read>,
}

/// What of a file is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// Its headers; a redirect that carries them is not followed.
    Metadata,
    /// It, from this byte on.
    Bytes(u64),
}

/// A listing of more would be no model's.
const MAX_LISTING_BYTES: u64 = 64 << 20;
const MAX_REDIRECTS: usize = 10;
/// A server that sends nothing for so long has lost us.
const LONGEST_SILENCE: Duration = Duration::from_secs(60);

/// An agent that trusts the certificates that this system trusts, and goes through the proxy that the environment names. Failures
/// and redirects are its caller's to judge: a key is for one server alone.
pub fn agent_settings() -> ConfigBuilder<AgentScope> {
    Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("jedi/", env!("CARGO_PKG_VERSION")))
        .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
}

impl Client {
    /// A client of the hub that the settings name.
    pub fn new(settings: &Settings) -> Self {
        let agent = agent_settings()
            .timeout_resolve(Some(settings.timeout))
            .timeout_connect(Some(settings.timeout))
            .timeout_recv_response(Some(settings.timeout * 3))
            .timeout_per_read(Some(LONGEST_SILENCE))
            .build();
        Self { agent: agent.into(), endpoint: settings.endpoint.clone(), token: settings.token.clone() }
    }

    /// The commit and the files of a revision.
    pub fn listing(&self, name: &HubName) -> Result<Listing, Failure> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            #[serde(default)]
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let url =
            format!("{}/api/models/{}/revision/{}", self.endpoint, name.repository, quoted(name.revision(), false));
        let mut response = self.request(&url, Ask::Bytes(0))?;
        if response.status() != 200 {
            return Err(self.refusal(&response, name, None));
        }
        let text = response.body_mut().with_config().limit(MAX_LISTING_BYTES).read_to_string();
        let text = text.map_err(|error| Failure::passing(format!("{} broke off: {error}", self.endpoint)))?;
        let wrong = |what: &str| Failure::Final(anyhow::anyhow!("{name}: {url} answers {what}; is HF_ENDPOINT a hub?"));
        let info: Info = serde_json::from_str(&text).map_err(|error| wrong(&format!("no list of files ({error})")))?;
        if !is_commit(&info.sha) {
            return Err(wrong("a commit that is none"));
        }
        Ok(Listing { commit: info.sha, files: info.siblings.into_iter().map(|file| file.rfilename).collect() })
    }

    /// The etag and size of a file.
    pub fn metadata(&self, name: &HubName, commit: &str, file: &str) -> Result<Metadata, Failure> {
        let url = self.url_of(name, commit, file);
        let response = self.request(&url, Ask::Metadata)?;
        if response.status() != 200 && !response.status().is_redirection() {
            return Err(self.refusal(&response, name, Some(file)));
        }
        let headers = response.headers();
        let Some(etag) = etag_of(headers) else {
            return Err(Failure::Final(anyhow::anyhow!("{name}: {url} has no usable ETag; is HF_ENDPOINT a hub?")));
        };
        let own_size = if response.status() == 200 { number(headers, "content-length") } else { None };
        Ok(Metadata { etag, n_bytes: number(headers, "x-linked-size").or(own_size) })
    }

    /// A file from byte `from` on.
    pub fn open(&self, name: &HubName, commit: &str, file: &str, from: u64) -> Result<Transfer, Failure> {
        let response = self.request(&self.url_of(name, commit, file), Ask::Bytes(from))?;
        let (from, n_bytes) = match response.status().as_u16() {
            200 => (0, number(response.headers(), "content-length")),
            206 => match content_range(response.headers()) {
                Some((start, total)) => (start, total),
                None => return Err(Failure::passing(format!("{file}: a part came without saying which"))),
            },
            // There is nothing from there on: what is here is no part of it, and the next try begins anew.
            416 => return Ok(Transfer { from: 0, n_bytes: None, body: Box::new(std::io::empty()) }),
            _ => return Err(self.refusal(&response, name, Some(file))),
        };
        Ok(Transfer { from, n_bytes, body: Box::new(response.into_body().into_reader()) })
    }

    /// Whether anything answers, and the name of the token's account, if there is a token and it is accepted.
    pub fn account(&self) -> Result<Option<String>, Failure> {
        if self.token.is_none() {
            return self.request(&self.endpoint, Ask::Metadata).map(|_| None);
        }
        let mut response = self.request(&format!("{}/api/whoami-v2", self.endpoint), Ask::Bytes(0))?;
        match response.status().as_u16() {
            200 => {}
            401 | 403 => return Ok(None),
            status => return Err(Failure::passing(format!("{} answers with status {status}", self.endpoint))),
        }
        // What is no JSON comes from no hub, and names no account.
        let answer = response.body_mut().read_to_string().ok();
        let answer = answer.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
        Ok(answer.and_then(|answer| Some(answer.get("name")?.as_str()?.to_owned())))
    }

    fn url_of(&self, name: &HubName, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{}", self.endpoint, name.repository, quoted(file, true))
    }

    /// Asks, and follows redirects. The token is for the hub alone, not for where it sends us.
    fn request(&self, url: &str, ask: Ask) -> Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..MAX_REDIRECTS {
            let mut request = match ask {
                Ask::Metadata => self.agent.head(&url),
                Ask::Bytes(_) => self.agent.get(&url),
            };
            // Sizes and parts are those of the file, not of a compressed one.
            request = request.header("accept-encoding", "identity");
            if let Ask::Bytes(from @ 1..) = ask {
                request = request.header("range", format!("bytes={from}-"));
            }
            if let Some(token) = &self.token
                && origin(&url) == origin(&self.endpoint)
            {
                request = request.header("authorization", format!("Bearer {}", token.secret));
            }
            let response = request.call().map_err(|error| Self::no_answer(&url, error))?;
            let target = response.headers().get("location").and_then(|target| target.to_str().ok()).map(str::to_owned);
            match target.filter(|_| response.status().is_redirection()) {
                // The hub redirects a large file's request elsewhere, and tells of the file in that answer's own headers.
                Some(target)
                    if ask == Ask::Metadata && is_absolute(&target) && etag_of(response.headers()).is_some() =>
                {
                    return Ok(response);
                }
                Some(target) => url = joined(&url, &target),
                None => return Ok(response),
            }
        }
        Err(Failure::Final(anyhow::anyhow!("{url}: redirected {MAX_REDIRECTS} times; is HF_ENDPOINT a hub?")))
    }

    fn no_answer(url: &str, error: ureq::Error) -> Failure {
        use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        let place = origin(url);
        match error {
            // A connection that was there and went.
            ureq::Error::Io(error)
                if [UnexpectedEof, ConnectionReset, ConnectionAborted, BrokenPipe].contains(&error.kind()) =>
            {
                Failure::passing(format!("{place} closed the connection without an answer"))
            }
            ureq::Error::Timeout(ureq::Timeout::RecvResponse) => Failure::passing(format!("{place} gives no answer")),
            ureq::Error::Io(error) => Failure::Unreachable(format!("{place} cannot be reached ({error})")),
            error => Failure::Unreachable(format!("{place} cannot be reached ({error})")),
        }
    }

    /// What an answer other than success means. `file` is None where the model was asked for.
    fn refusal(&self, response: &Response<Body>, name: &HubName, file: Option<&str>) -> Failure {
        let (status, headers) = (response.status().as_u16(), response.headers());
        let code = headers.get("x-error-code").and_then(|code| code.to_str().ok()).unwrap_or_default();
        let page = format!("{}/{}", self.endpoint, name.repository);
        let refused = |cause: String| Failure::Final(invalid(format!("{name}: {cause}")));
        match (status, file) {
            (408 | 425 | 429 | 500 | 502 | 503 | 504, _) => {
                let what = if status == 429 { "too many requests".to_owned() } else { format!("error {status}") };
                Failure::Passing { cause: format!("{} answers: {what}", self.endpoint), wait: asked_wait(headers) }
            }
            (401 | 403, _) => match &self.token {
                _ if code == "GatedRepo" => refused(format!(
                    "is a gated model; accept its terms at {page}, and set HF_TOKEN to a token of the account that did"
                )),
                None => refused(format!(
                    "the hub answers {status}: there is no such model, or it is private; check the name, or set HF_TOKEN to \
                     a token of an account that may read it (made at {}/settings/tokens)",
                    self.endpoint
                )),
                Some(token) => refused(format!(
                    "the hub answers {status}: there is no such model, or the token of {} may not read it; check both",
                    token.origin
                )),
            },
            (404, None) if code == "RevisionNotFound" => {
                refused(format!("has no revision {}; {page} lists them", name.revision()))
            }
            (404, None) => refused(format!("the hub has no model of this name; check it at {}", self.endpoint)),
            (404, Some(file)) => {
                Failure::Final(anyhow::anyhow!("{name}: the hub lists {file} but does not have it; try again later"))
            }
            _ => Failure::Final(anyhow::anyhow!("{name}: {page} answers with status {status}; try again later")),
        }
    }
}

/// The file's own etag. It becomes a file's name, so it must be fit for one.
fn etag_of(headers: &HeaderMap) -> Option<String> {
    let header = headers.get("x-linked-etag").or_else(|| headers.get("etag"))?.to_str().ok()?;
    let etag = header.trim().trim_start_matches("W/").trim_matches('"');
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.+=".contains(c);
    (!etag.is_empty() && !etag.starts_with('.') && etag.chars().all(is_plain)).then(|| etag.to_owned())
}

/// First byte and whole size of `bytes 100-199/200`.
fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let range = headers.get("content-range")?.to_str().ok()?.strip_prefix("bytes ")?;
    let (part, total) = range.split_once('/')?;
    Some((part.split_once('-')?.0.trim().parse().ok()?, total.trim().parse().ok()))
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// Scheme, host and port.
fn origin(url: &str) -> String {
    url.split('/').take(3).collect::<Vec<_>>().join("/").to_ascii_lowercase()
}

fn is_absolute(target: &str) -> bool {
    target.starts_with("http://") || target.starts_with("https://")
}

/// Where a redirect from `url` leads.
fn joined(url: &str, target: &str) -> String {
    if is_absolute(target) {
        target.to_owned()
    } else if let Some(rest) = target.strip_prefix("//") {
        format!("{}//{rest}", url.split("//").next().unwrap_or("https:"))
    } else if target.starts_with('/') {
        format!("{}{target}", origin(url))
    } else {
        format!("{}/{target}", url.rsplit_once('/').map_or(url, |(folder, _)| folder))
    }
}

/// For a URL; slashes are kept in the path of a file, not in a revision.
fn quoted(text: &str, keeps_slashes: bool) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || keeps_slashes && byte == b'/';
    text.bytes()
        .map(|byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn an_etag_is_the_files_own_and_fit_for_a_name() {
        let etag = |pairs: &[(&'static str, &str)]| etag_of(&headers(pairs));
        assert_eq!(etag(&[("etag", "W/\"abc\"")]).as_deref(), Some("abc"));
        assert_eq!(etag(&[("etag", "\"abc\""), ("x-linked-etag", "\"def\"")]).as_deref(), Some("def"));
        for wrong in ["\"../../up\"", "\"\"", "\".hidden\"", "\"a/b\""] {
            assert_eq!(etag(&[("etag", wrong)]), None, "{wrong}");
        }
    }

    #[test]
    fn redirects_lead_where_they_say() {
        let url = "https://hub.co/a/b/resolve/main/c.json";
        assert_eq!(joined(url, "https://cdn.co/x"), "https://cdn.co/x");
        assert_eq!(joined(url, "//cdn.co/x"), "https://cdn.co/x");
        assert_eq!(joined(url, "/new/name"), "https://hub.co/new/name");
        assert_eq!(joined(url, "d.json"), "https://hub.co/a/b/resolve/main/d.json");
        assert_eq!(origin("HTTPS://Hub.co:8/a"), "https://hub.co:8");
        assert_ne!(origin("https://hub.co.evil/a"), origin("https://hub.co"));
    }

    #[test]
    fn names_are_quoted_and_ranges_read() {
        assert_eq!(quoted("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(quoted("unet/a b#.json", true), "unet/a%20b%23.json");
        let range = |value| content_range(&headers(&[("content-range", value)]));
        assert_eq!(range("bytes 100-199/200"), Some((100, Some(200))));
        assert_eq!(range("bytes 5-9/*"), Some((5, None)));
        assert_eq!(range("bytes */200"), None);
    }
}

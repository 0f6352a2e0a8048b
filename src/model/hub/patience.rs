//! What went wrong between us and the hub, and whether, when and how often to try it again.

use std::time::{Duration, SystemTime};

use anyhow::anyhow;
use ureq::http::HeaderMap;

/// Why a request did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// No connection.
    Unreachable(String),
    /// It may succeed a little later; after this time, where the hub says so.
    Passing {
        /// In words.
        cause: String,
        /// What the hub asked for.
        wait: Option<Duration>,
    },
    /// It will not.
    Final(anyhow::Error),
}

impl Failure {
    /// One that may succeed if tried again at once or soon.
    pub fn passing(cause: impl Into<String>) -> Self {
        Self::Passing { cause: cause.into(), wait: None }
    }

    /// Once a connection was there, its loss is likely to pass.
    pub fn that_may_pass(self) -> Self {
        match self {
            Self::Unreachable(cause) => Self::passing(cause),
            other => other,
        }
    }

    /// For the user, behind the name of what was wanted.
    pub fn into_error(self, name: impl std::fmt::Display) -> anyhow::Error {
        match self {
            Self::Final(error) => error,
            Self::Unreachable(cause) | Self::Passing { cause, .. } => anyhow!("{name}: {cause}"),
        }
    }
}

/// How often and after which times a request is tried again.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Tries in a row without a byte of progress.
    pub tries: u32,
    /// Time before the second; it doubles from one to the next.
    pub first_wait: Duration,
    /// The longest time that is waited when the hub asks for it; beyond it, the request fails.
    pub longest_wait: Duration,
}

impl Default for Patience {
    /// Half a minute of failures; the hub counts requests over five minutes.
    fn default() -> Self {
        Self { tries: 6, first_wait: Duration::from_secs(1), longest_wait: Duration::from_secs(300) }
    }
}

impl Patience {
    /// How long to wait after so many failures in a row, or None to give up.
    pub fn wait(&self, n_failed: u32, asked: Option<Duration>) -> Option<Duration> {
        if n_failed >= self.tries || asked.is_some_and(|asked| asked > self.longest_wait) {
            return None;
        }
        let own = self.first_wait * 2u32.pow(n_failed.saturating_sub(1).min(16));
        Some(asked.unwrap_or(own.min(self.longest_wait)))
    }
}

/// How long a server asks us to wait: `Retry-After` in seconds or as a date, or the hub's own `RateLimit: …;t=SECONDS`.
pub fn asked_wait(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    if let Some(after) = text("retry-after") {
        if let Ok(seconds) = after.parse() {
            return Some(Duration::from_secs(seconds));
        }
        let date = httpdate::parse_http_date(after).ok()?;
        return Some(date.duration_since(SystemTime::now()).unwrap_or_default());
    }
    let seconds = text("ratelimit")?.split(';').find_map(|part| part.trim().strip_prefix("t="))?;
    seconds.parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn the_wait_that_is_asked_for_is_read_in_all_its_forms() {
        let wait = |name, value: &str| asked_wait(&headers(&[(name, value)]));
        assert_eq!(wait("retry-after", "7"), Some(Duration::from_secs(7)));
        let soon = SystemTime::now() + Duration::from_secs(30);
        let seconds = wait("retry-after", &httpdate::fmt_http_date(soon)).unwrap().as_secs();
        assert!((25..=30).contains(&seconds), "{seconds}");
        assert_eq!(wait("retry-after", "Fri, 01 Jan 2021 00:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(wait("ratelimit", "\"api\";r=0;t=55"), Some(Duration::from_secs(55)));
        assert_eq!(wait("retry-after", "soon"), None);
        assert_eq!(asked_wait(&headers(&[])), None);
    }

    #[test]
    fn waits_double_until_it_gives_up_and_the_hub_has_the_first_word() {
        let secs = Duration::from_secs;
        let patience = Patience { tries: 4, first_wait: secs(1), longest_wait: secs(60) };
        let waits: Vec<_> = (1..=4).map(|n| patience.wait(n, None)).collect();
        assert_eq!(waits, [Some(secs(1)), Some(secs(2)), Some(secs(4)), None]);
        assert_eq!(patience.wait(1, Some(secs(60))), Some(secs(60)));
        assert_eq!(patience.wait(1, Some(secs(61))), None);
        assert_eq!(patience.wait(3, Some(secs(0))), Some(secs(0)));
    }
}

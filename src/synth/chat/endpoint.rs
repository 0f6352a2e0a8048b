//! An endpoint that speaks OpenAI's `POST /v1/chat/completions`: the company's own, or vLLM, llama.cpp, Ollama and others.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::json;
use ureq::Agent;
use ureq::http::HeaderMap;

use super::{Chat, Question, Reply, side_by_side};
use crate::interrupt::Interrupt;
use crate::invalid::invalid;
use crate::model::hub::{Failure, Patience, agent_settings, asked_wait};

/// Where the endpoint is, and how to speak with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EndpointSettings {
    /// With its version, such as `http://localhost:8000/v1`; `/chat/completions` is added to it.
    pub url: String,
    /// As the endpoint calls it. It tells whose the answers are; the URL may change from run to run.
    pub model: String,
    /// The environment variable that holds the key; one that is not set: none is sent.
    pub key_variable: String,
    /// How freely words are drawn, 0 to 2; like `max_tokens` a setting of the questions, beside which it stands in files.
    #[serde(skip)]
    pub temperature: f64,
    /// Tokens of the longest answer.
    #[serde(skip)]
    pub max_tokens: usize,
    /// Time for one answer.
    pub timeout_secs: u64,
    /// Questions under way at a time.
    pub concurrency: usize,
    /// Tries of one question while the endpoint is busy, away or out of order.
    pub tries: u32,
    /// Time before the second of them; it doubles from one to the next.
    pub first_wait_secs: f64,
    /// The longest wait; an endpoint that asks for more is given up.
    pub longest_wait_secs: u64,
}

impl Default for EndpointSettings {
    fn default() -> Self {
        Self {
            url: String::new(),
            model: String::new(),
            key_variable: "OPENAI_API_KEY".into(),
            temperature: 1.0,
            max_tokens: 800,
            timeout_secs: 120,
            concurrency: 8,
            tries: 6,
            first_wait_secs: 1.0,
            longest_wait_secs: 300,
        }
    }
}

/// An endpoint that is asked.
pub struct Endpoint {
    settings: EndpointSettings,
    key: Option<Key>,
    agent: Agent,
    interrupt: Interrupt,
}

/// A secret that is never shown.
struct Key(String);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Key")
    }
}

/// More than this would be no answer.
const MAX_ANSWER_BYTES: u64 = 16 << 20;
/// Of what a server says, for people.
const SHOWN_CHARS: usize = 200;

impl Endpoint {
    /// Looks the key up with `variable`; asks nothing yet. Waits end when `interrupt` is raised.
    pub fn new(
        settings: EndpointSettings,
        variable: impl Fn(&str) -> Option<String>,
        interrupt: Interrupt,
    ) -> Result<Self> {
        if !settings.url.starts_with("http://") && !settings.url.starts_with("https://") {
            let url = &settings.url;
            return Err(invalid(format!("endpoint {url:?}: is no URL; name one such as http://localhost:8000/v1")));
        }
        if settings.model.is_empty() {
            return Err(invalid(format!("endpoint {}: which model? give its name", settings.url)));
        }
        let is_positive = settings.max_tokens > 0 && settings.timeout_secs > 0 && settings.concurrency > 0;
        if !is_positive || !(0.0..=3600.0).contains(&settings.first_wait_secs) {
            return Err(invalid(format!(
                "endpoint {}: max_tokens, timeout_secs and concurrency are at least 1, first_wait_secs is 0 to 3600",
                settings.url
            )));
        }
        let key = variable(&settings.key_variable).map(|key| key.trim().to_owned()).filter(|key| !key.is_empty());
        let agent = agent_settings().timeout_global(Some(Duration::from_secs(settings.timeout_secs))).build();
        Ok(Self { settings, key: key.map(Key), agent: agent.into(), interrupt })
    }

    fn patience(&self) -> Patience {
        Patience {
            tries: self.settings.tries,
            first_wait: Duration::from_secs_f64(self.settings.first_wait_secs),
            longest_wait: Duration::from_secs(self.settings.longest_wait_secs),
        }
    }

    /// Asks until there is an answer that stands.
    fn reply(&self, question: &Question) -> Result<Reply> {
        let mut n_failed = 0;
        loop {
            self.interrupt.check()?;
            let (cause, wait) = match self.ask(question) {
                Ok(reply) => return Ok(reply),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Unreachable(cause)) => (cause, None),
                Err(Failure::Passing { cause, wait }) => (cause, wait),
            };
            n_failed += 1;
            let Some(pause) = self.patience().wait(n_failed, wait) else {
                return Err(anyhow!("{}: {cause}, {n_failed} times", self.settings.url));
            };
            self.pause(pause);
        }
    }

    /// Waits, in pieces, so that Ctrl-C is heard.
    fn pause(&self, time: Duration) {
        const PIECE: Duration = Duration::from_millis(100);
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if self.interrupt.requested() {
                return;
            }
            std::thread::sleep(left.min(PIECE));
        }
    }

    fn ask(&self, question: &Question) -> Result<Reply, Failure> {
        let settings = &self.settings;
        let body = json!({
            "model": settings.model,
            "messages": [
                {"role": "system", "content": question.instruction},
                {"role": "user", "content": question.text},
            ],
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            "seed": question.seed,
        });
        let url = format!("{}/chat/completions", settings.url.trim_end_matches('/'));
        let mut request = self.agent.post(&url).header("content-type", "application/json");
        if let Some(Key(key)) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = request.send(body.to_string()).map_err(|error| self.no_answer(error))?;
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        let text = response.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string();
        if status != 200 {
            // What is said beside the status only helps people.
            return Err(self.refusal(status, &headers, &text.unwrap_or_default()));
        }
        let text = text.map_err(|error| match error {
            ureq::Error::Timeout(_) => self.no_answer(error),
            error => Failure::passing(format!("its answer broke off ({error})")),
        })?;
        read(&text).map_err(|cause| Failure::passing(format!("answers what is no chat completion ({cause})")))
    }

    fn no_answer(&self, error: ureq::Error) -> Failure {
        match error {
            ureq::Error::Timeout(_) => {
                Failure::passing(format!("gives no answer within {} s", self.settings.timeout_secs))
            }
            error => Failure::Unreachable(format!("cannot be reached ({error})")),
        }
    }

    /// What an answer other than success means.
    fn refusal(&self, status: u16, headers: &HeaderMap, text: &str) -> Failure {
        let Said { words, code } = said(text);
        let words = self.shown(&words);
        let url = &self.settings.url;
        let ends_the_run = |cause: String| Failure::Final(invalid(format!("{url}: {cause}")));
        match status {
            // There is no waiting for money.
            429 if code == "insufficient_quota" => ends_the_run(format!("its account has nothing left{words}")),
            408 | 409 | 425 | 429 | 500..=599 => {
                let what = if status == 429 { "too many requests".to_owned() } else { format!("error {status}") };
                Failure::Passing { cause: format!("answers: {what}{words}"), wait: asked_wait(headers) }
            }
            401 | 403 => ends_the_run(match self.key {
                Some(_) => format!("does not accept the key of {} ({status}{words})", self.settings.key_variable),
                None => format!("wants a key ({status}{words}); set {}", self.settings.key_variable),
            }),
            404 => ends_the_run(format!(
                "has no model {}, or is no such endpoint (404{words}); the URL ends in /v1 with most",
                self.settings.model
            )),
            300..=399 => ends_the_run(format!("sends elsewhere ({status}); name the URL that it sends to")),
            _ => Failure::Final(anyhow!("{url}: answers {status}{words}")),
        }
    }

    /// A server's words without the key, should it repeat it, and not too many; behind a colon, if there are any.
    fn shown(&self, words: &str) -> String {
        let words = match &self.key {
            Some(Key(key)) => words.replace(key.as_str(), "***"),
            None => words.to_owned(),
        };
        let words: Vec<&str> = words.split_whitespace().collect();
        let words: String = words.join(" ").chars().take(SHOWN_CHARS).collect();
        if words.is_empty() { words } else { format!(": {words}") }
    }
}

impl Chat for Endpoint {
    fn identity(&self) -> String {
        // Not its URL: a model that is served elsewhere tomorrow is the same model.
        let EndpointSettings { model, temperature, max_tokens, .. } = &self.settings;
        format!("{model} {temperature} {max_tokens}")
    }

    fn replies(&mut self, questions: &[Question]) -> Vec<Result<Reply>> {
        let this = &*self;
        side_by_side(questions, self.settings.concurrency, |question| this.reply(question))
    }
}

#[derive(Deserialize)]
struct Completion {
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    message: Message,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    content: Option<String>,
    refusal: Option<String>,
}

/// The reply in a completion, or why it is none.
fn read(text: &str) -> Result<Reply, String> {
    let completion: Completion = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let choice = completion.choices.into_iter().next().ok_or("no choices")?;
    let Message { content, refusal } = choice.message;
    let refusal = refusal.filter(|words| !words.is_empty());
    match (choice.finish_reason.as_deref(), refusal, content) {
        (Some("content_filter"), refusal, _) => Ok(Reply::Refused(refusal.unwrap_or_else(|| "content filter".into()))),
        (_, Some(words), _) => Ok(Reply::Refused(words)),
        (Some("length"), None, _) => Ok(Reply::Cut),
        (_, None, Some(content)) => Ok(Reply::Whole(content)),
        (_, None, None) => Err("no content".into()),
    }
}

struct Said {
    words: String,
    code: String,
}

/// `{"error": {"message": …, "code": …}}`, or whatever else is short enough to be shown.
fn said(text: &str) -> Said {
    let json: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
    let error = &json["error"];
    let words = error["message"].as_str().or(error.as_str()).or(json["message"].as_str());
    let code = error["code"].as_str().or(error["type"].as_str()).unwrap_or_default();
    Said { words: words.unwrap_or_default().to_owned(), code: code.to_owned() }
}

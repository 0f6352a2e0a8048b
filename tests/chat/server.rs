//! An endpoint on the loopback: chat completions as OpenAI's, and the mishaps that a test asks for.

use std::collections::VecDeque;
use std::io::{BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::http::Head;

/// What is answered.
#[derive(Clone, Debug)]
pub enum Act {
    /// What was asked for.
    Good,
    /// A completion with this content.
    Says(&'static str),
    /// A completion that ends for this reason, with half of an answer.
    Ends(&'static str),
    /// A completion with a refusal and no content.
    Refuses(&'static str),
    /// A status, with these headers and this body.
    Status(u16, Vec<(&'static str, &'static str)>, &'static str),
    /// Half of a good answer's bytes, then the connection is closed.
    Breaks,
    /// A good answer after this time.
    Late(Duration),
}

/// What was asked.
#[derive(Clone, Debug)]
pub struct Asked {
    pub line: String,
    pub key: Option<String>,
    pub body: Value,
}

#[derive(Default)]
struct State {
    acts: VecDeque<Act>,
    log: Vec<Asked>,
}

/// Serves until it is dropped.
pub struct Server {
    state: Arc<Mutex<State>>,
    is_over: Arc<AtomicBool>,
    most_at_once: Arc<AtomicUsize>,
    address: String,
}

impl Server {
    /// Does these one after the other, then what was asked for.
    pub fn new(acts: &[Act]) -> Self {
        let state = Arc::new(Mutex::new(State { acts: acts.iter().cloned().collect(), log: vec![] }));
        let (is_over, most_at_once) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("the port that it got").to_string();
        let (now, most) = (Arc::new(AtomicUsize::new(0)), most_at_once.clone());
        let (shared, over) = (state.clone(), is_over.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let (state, now, most) = (shared.clone(), now.clone(), most.clone());
                thread::spawn(move || {
                    let open = Open::among(now, &most);
                    // A client that goes away in the middle is what some tests are about.
                    stream.map(|stream| answer(&stream, &state, open)).ok();
                });
            }
        });
        Self { state, is_over, most_at_once, address }
    }

    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// What was asked since the last call.
    pub fn log(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state.lock().expect("no panic while held").log)
    }

    /// Questions that waited for an answer at one time.
    pub fn most_at_once(&self) -> usize {
        self.most_at_once.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        // Wakes the listener, so that it sees that it is over, and gives the port back.
        TcpStream::connect(&self.address).ok();
    }
}

/// A question that waits for its answer.
struct Open(Arc<AtomicUsize>);

impl Open {
    fn among(now: Arc<AtomicUsize>, most: &AtomicUsize) -> Self {
        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        Self(now)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn answer(stream: &TcpStream, state: &Mutex<State>, open: Open) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let Some(head) = Head::read(&mut reader)? else { return Ok(()) };
    let n_bytes = head.field("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; n_bytes];
    reader.read_exact(&mut body)?;
    let body: Value = serde_json::from_slice(&body).expect("a question in JSON");
    let act = {
        let mut state = state.lock().expect("no panic while held");
        state.log.push(Asked { key: head.field("authorization"), line: head.line, body: body.clone() });
        state.acts.pop_front().unwrap_or(Act::Good)
    };
    let whole = |message: Value, reason: &str| {
        json!({"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": reason}]}).to_string()
    };
    let content = |text: &str| json!({"role": "assistant", "content": text});
    let good = whole(content(&wanted(&body)), "stop");
    let (status, headers, body) = match act {
        Act::Good | Act::Breaks => (200, vec![], good),
        Act::Says(text) => (200, vec![], whole(content(text), "stop")),
        Act::Ends(reason) => (200, vec![], whole(content("{\"object\": \"a mu"), reason)),
        Act::Refuses(words) => {
            (200, vec![], whole(json!({"role": "assistant", "content": null, "refusal": words}), "stop"))
        }
        Act::Status(status, ref headers, body) => (status, headers.clone(), body.to_owned()),
        Act::Late(time) => {
            thread::sleep(time);
            (200, vec![], good)
        }
    };
    let mut text = format!("HTTP/1.1 {status} Any\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    let sent = if matches!(act, Act::Breaks) { &body[..body.len() / 2] } else { &body };
    // Whoever has the answer may ask the next question before this thread comes to its end.
    drop(open);
    let mut writer = stream;
    writer.write_all(format!("{text}\r\n{sent}").as_bytes())?;
    stream.shutdown(Shutdown::Write)
}

/// What the question asks for, told by its words.
fn wanted(body: &Value) -> String {
    let question = body["messages"][1]["content"].as_str().expect("a question");
    let object = question.split_once("The object: ").and_then(|(_, rest)| rest.split_once(".\n")).expect("an object").0;
    let n_scenes = question.split_once("with ").and_then(|(_, rest)| rest.split_once(" strings in the list"));
    let n_scenes = n_scenes.map(|(number, _)| number.rsplit(' ').next().expect("a word"));
    let n_scenes: usize = n_scenes.and_then(|number| number.parse().ok()).expect("a number of scenes");
    let scenes: Vec<String> = (0..n_scenes).map(|index| format!("A {object} in place {index}.")).collect();
    json!({"object": format!("A blue {object}."), "scenes": scenes}).to_string()
}

//! A hub on the loopback: one model, served as huggingface.co does it (large files from another origin, by redirect), and the
//! mishaps that a test asks for.

use std::collections::BTreeMap;
use std::io::{BufReader, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use jedi::sha256::sha256_hex;
use sha1::{Digest as _, Sha1};

use crate::http::Head;

pub const REPOSITORY: &str = "someone/toybox";
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files by their names in the model folder.
pub type Model = BTreeMap<String, Vec<u8>>;

/// What goes wrong, in place of the answer.
#[derive(Clone, Debug)]
pub enum Mishap {
    /// A status, with these headers.
    Status(u16, Vec<(&'static str, String)>),
    /// So many bytes of the body, then the connection is closed.
    CutAfter(usize),
    /// The whole file, whatever part was asked for, cut like that.
    WholeCutAfter(usize),
    /// A shorter file than the hub tells of.
    Shorter,
    /// One byte is another.
    Damaged,
}

/// What was asked.
#[derive(Clone, Debug)]
pub struct Request {
    /// Method and path.
    pub line: String,
    pub range: Option<String>,
    pub token: Option<String>,
}

struct Planned {
    on: &'static str,
    times: usize,
    mishap: Mishap,
}

#[derive(Default)]
struct State {
    model: Model,
    commit: String,
    planned: Vec<Planned>,
    log: Vec<Request>,
}

/// Serves until it is dropped.
pub struct Server {
    state: Arc<Mutex<State>>,
    is_over: Arc<AtomicBool>,
    /// Of the hub, and of where it sends for large files.
    addresses: [String; 2],
    listeners: Vec<JoinHandle<()>>,
}

impl Server {
    pub fn new(model: Model) -> Self {
        let state = State { model, commit: COMMIT.to_owned(), ..State::default() };
        let (state, is_over) = (Arc::new(Mutex::new(state)), Arc::new(AtomicBool::new(false)));
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
        let addresses =
            [0, 1].map(|i: usize| format!("http://{}", listeners[i].local_addr().expect("the port that it got")));
        let listen = |listener: TcpListener| {
            let (state, is_over, large) = (state.clone(), is_over.clone(), addresses[1].clone());
            thread::spawn(move || {
                for stream in listener.incoming() {
                    if is_over.load(Ordering::SeqCst) {
                        return;
                    }
                    let (state, large) = (state.clone(), large.clone());
                    // A client that goes away in the middle is what some tests are about.
                    thread::spawn(move || stream.map(|stream| answer(&stream, &state, &large)).ok());
                }
            })
        };
        let listeners = listeners.into_iter().map(listen).collect();
        Self { state, is_over, addresses, listeners }
    }

    pub fn url(&self) -> &str {
        &self.addresses[0]
    }

    /// The mishap happens to the first `times` requests whose line contains `on`.
    pub fn plan(&self, on: &'static str, times: usize, mishap: Mishap) {
        self.state.lock().expect("no panic while held").planned.push(Planned { on, times, mishap });
    }

    /// What was asked since the last call.
    pub fn log(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().expect("no panic while held").log)
    }

    /// Another commit of the model.
    pub fn push(&self, commit: &str, model: Model) {
        let mut state = self.state.lock().expect("no panic while held");
        (state.commit, state.model) = (commit.to_owned(), model);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        for address in &self.addresses {
            // Wakes the listener, so that it sees that it is over, and gives the port back.
            TcpStream::connect(address.trim_start_matches("http://")).ok();
        }
        // A client that comes before the port is closed would find a connection that is cut, not a hub that is away.
        for listener in self.listeners.drain(..) {
            listener.join().ok();
        }
    }
}

/// All files below a folder.
pub fn model_of(folder: &Path) -> Model {
    let mut model = Model::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in at.read_dir().expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).expect("a path below it").display().to_string();
                model.insert(name, std::fs::read(&path).expect("a file"));
            }
        }
    }
    model
}

/// The etag that the hub gives a file: the name of its blob.
pub fn etag(name: &str, bytes: &[u8]) -> String {
    if is_large(name) {
        return sha256_hex(bytes);
    }
    let digest = Sha1::new().chain_update(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Kept in git's large file storage.
fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

/// What is sent: a status, headers, and of the body so many bytes.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    sent: usize,
}

impl Answer {
    fn new(status: u16, headers: Vec<(&'static str, String)>, body: Vec<u8>) -> Self {
        Self { status, headers, sent: body.len(), body }
    }

    fn error(status: u16, code: &str) -> Self {
        Self::new(status, vec![("x-error-code", code.to_owned())], b"no".to_vec())
    }
}

fn answer(stream: &TcpStream, state: &Mutex<State>, large: &str) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let Some(head) = Head::read(&mut reader)? else { return Ok(()) };
    let (range, token) = (head.field("range"), head.field("authorization"));
    let request = Request { line: head.line, range, token };
    let answer = {
        let mut state = state.lock().expect("no panic while held");
        state.log.push(request.clone());
        respond(&mut state, &request, large)
    };
    let mut text = format!("HTTP/1.1 {} Any\r\nconnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        text += &format!("{name}: {value}\r\n");
    }
    let length = answer.body.len();
    let mut writer = stream;
    writer.write_all(format!("{text}content-length: {length}\r\n\r\n").as_bytes())?;
    if !request.line.starts_with("HEAD") {
        writer.write_all(&answer.body[..answer.sent.min(length)])?;
    }
    stream.shutdown(Shutdown::Write)
}

fn respond(state: &mut State, request: &Request, large: &str) -> Answer {
    let planned = state.planned.iter_mut().find(|planned| planned.times > 0 && request.line.contains(planned.on));
    let mishap = planned.map(|planned| {
        planned.times -= 1;
        planned.mishap.clone()
    });
    if let Some(Mishap::Status(status, headers)) = mishap {
        return Answer::new(status, headers, b"no".to_vec());
    }
    let (method, path) = request.line.split_once(' ').expect("a method and a path");
    if path == "/api/whoami-v2" {
        return match request.token.as_deref() {
            Some("Bearer right") => Answer::new(200, vec![], br#"{"name": "somebody"}"#.to_vec()),
            _ => Answer::error(401, ""),
        };
    }
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{REPOSITORY}/revision/")) {
        if revision != "main" && revision != state.commit {
            return Answer::error(404, "RevisionNotFound");
        }
        let files: Vec<_> = state.model.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let listing = serde_json::json!({ "id": REPOSITORY, "sha": state.commit, "siblings": files });
        return Answer::new(200, vec![], listing.to_string().into_bytes());
    }
    if let Some(name) = path.strip_prefix(&format!("/{REPOSITORY}/resolve/{}/", state.commit)) {
        let Some(bytes) = state.model.get(name) else { return Answer::error(404, "EntryNotFound") };
        let etag = format!("\"{}\"", etag(name, bytes));
        let commit = ("x-repo-commit", state.commit.clone());
        return match is_large(name) {
            true => {
                let target = ("location", format!("{large}/large/{name}"));
                let own = [("x-linked-etag", etag), ("x-linked-size", bytes.len().to_string())];
                Answer::new(302, [vec![commit, target], own.to_vec()].concat(), b"there".to_vec())
            }
            false => sent(bytes, request, vec![commit, ("etag", etag)], mishap),
        };
    }
    if let Some(name) = path.strip_prefix("/large/") {
        assert!(method == "GET" && request.token.is_none(), "the token is for the hub alone: {request:?}");
        let Some(bytes) = state.model.get(name) else { return Answer::error(404, "") };
        // Where large files are kept they have other etags.
        return sent(bytes, request, vec![("etag", "\"other\"".to_owned())], mishap);
    }
    // What the hub says of models that are not there, to those who are not known.
    Answer::error(if request.token.is_some() { 404 } else { 401 }, "RepoNotFound")
}

/// A file, or the part of it that was asked for.
fn sent(bytes: &[u8], request: &Request, mut headers: Vec<(&'static str, String)>, mishap: Option<Mishap>) -> Answer {
    let mut bytes = bytes.to_vec();
    let n_bytes = bytes.len();
    match mishap {
        Some(Mishap::Shorter) => bytes.truncate(n_bytes / 2),
        Some(Mishap::Damaged) => bytes[n_bytes / 2] ^= 1,
        _ => {}
    }
    let first = request.range.as_deref().map_or(0, |range| {
        let first = range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
        first.and_then(|first| first.parse::<usize>().ok()).expect("a range that begins somewhere")
    });
    let mut answer = match first {
        _ if matches!(mishap, Some(Mishap::WholeCutAfter(_))) => Answer::new(200, headers, bytes),
        0 => Answer::new(200, headers, bytes),
        first if first < n_bytes => {
            headers.push(("content-range", format!("bytes {first}-{}/{n_bytes}", n_bytes - 1)));
            Answer::new(206, headers, bytes.split_off(first))
        }
        _ => Answer::error(416, ""),
    };
    if let Some(Mishap::CutAfter(n) | Mishap::WholeCutAfter(n)) = mishap {
        answer.sent = n;
    }
    answer
}

//! Models from a hub on the loopback: `mishaps` has what goes wrong on the way, `cache` what is kept, `verbs` the binary.

mod cache;
#[path = "../harness/mod.rs"]
#[allow(dead_code)] // Here every run has an environment of its own.
mod harness;
#[path = "../harness/http.rs"]
mod http;
mod mishaps;
mod server;
#[path = "../tiny_model/mod.rs"]
#[allow(dead_code)] // Families that other tests need.
mod tiny_model;
mod verbs;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use jedi::model::Part;
use jedi::model::hub::{Event, Hub, HubName, Patience, Settings};
use jedi::rng::Rng;
use server::{Model, Server};
use tempfile::TempDir;

/// The largest file of [`model`].
const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
/// Its size: many reads long.
const UNET_BYTES: usize = 1_000_003;

/// Files with the names of a model and any contents: nothing here looks inside.
fn model() -> Model {
    let mut model = Model::new();
    for name in [
        "README.md",
        "jedi.json",
        "model_index.json",
        "safety_checker/model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
    ] {
        model.insert(name.to_owned(), format!("{{\"is\": \"{name}\"}}").into_bytes());
    }
    model.insert("model_index.json".into(), b"{}".to_vec());
    for (name, n_bytes) in [
        ("text_encoder/model.safetensors", 1000),
        (UNET, UNET_BYTES),
        ("vae/diffusion_pytorch_model.safetensors", 2000),
    ] {
        let mut rng = Rng::new(1, name, 0);
        model.insert(name.to_owned(), (0..n_bytes).map(|_| rng.below(256) as u8).collect());
    }
    model
}

/// A server and a cache of its own.
struct World {
    server: Server,
    folder: TempDir,
}

impl World {
    fn new() -> Self {
        Self { server: Server::new(model()), folder: tempfile::tempdir().expect("a temporary folder") }
    }

    fn settings(&self) -> Settings {
        let patience =
            Patience { tries: 3, first_wait: Duration::from_millis(10), longest_wait: Duration::from_secs(5) };
        let cache = self.folder.path().join("hub");
        let (endpoint, timeout) = (self.server.url().to_owned(), Duration::from_secs(5));
        Settings { endpoint, cache, token: None, is_offline: false, timeout, patience }
    }

    /// A path in the model's place in the cache.
    fn at(&self, path: &str) -> PathBuf {
        self.folder.path().join("hub/models--someone--toybox").join(path)
    }

    fn blob(&self, name: &str) -> PathBuf {
        self.at("blobs").join(server::etag(name, &model()[name]))
    }

    fn unfinished_blob(&self, name: &str) -> PathBuf {
        self.at("blobs").join(format!("{}.incomplete", server::etag(name, &model()[name])))
    }

    fn fetch(&self) -> Result<PathBuf> {
        fetch(self.settings(), server::REPOSITORY, Part::ALL).map(|(folder, _)| folder)
    }

    /// Every file in `snapshots` is whole.
    fn assert_nothing_half(&self) {
        let Ok(commits) = self.at("snapshots").read_dir() else { return };
        for commit in commits {
            let commit = commit.expect("an entry").path();
            for (name, bytes) in server::model_of(&commit) {
                assert!(model()[&name] == bytes, "{name} is not what the hub has");
            }
        }
    }
}

/// The model folder, and what was said.
fn fetch(settings: Settings, name: &str, parts: &[Part]) -> Result<(PathBuf, Vec<String>)> {
    let mut said = Vec::new();
    let name = HubName::parse(name).expect("a name of the hub");
    let folder = Hub::new(settings).fetch(&name, parts, &mut |event| match event {
        Event::Wait(text) | Event::Warning(text) => said.push(text),
        _ => {}
    })?;
    Ok((folder, said))
}

fn refusal(outcome: Result<PathBuf>) -> String {
    let message = format!("{:#}", outcome.expect_err("a refusal"));
    assert_eq!(message.lines().count(), 1, "{message}");
    message
}

fn names(folder: &Path) -> Vec<String> {
    server::model_of(folder).into_keys().collect()
}

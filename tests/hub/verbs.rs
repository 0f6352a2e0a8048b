//! The verbs with models from the hub, as the environment names it.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use crate::harness::{Outcome, command};
use crate::server::{COMMIT, Model, Server, model_of};
use crate::tiny_model::{self, Family};

/// Of the environment, with their values.
type Variables<'a> = &'a [(&'a str, &'a str)];

/// Runs the binary with `home` for the hub's folder and nothing else of this machine's own settings.
fn jedi(home: &TempDir, endpoint: &str, variables: Variables, args: &[&str]) -> Outcome {
    let mut command = command(args);
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"] {
        command.env_remove(name);
    }
    for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "http_proxy"] {
        command.env_remove(name);
    }
    command.env("HF_HOME", home.path()).env("HF_ENDPOINT", endpoint).envs(variables.iter().copied());
    let output = command.output().expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("the binary writes UTF-8");
    Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn toybox() -> Model {
    let mut model = model_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/toybox/model"));
    model.insert("README.md".into(), b"a model".to_vec());
    model
}

fn tiny() -> Model {
    let folder = tempfile::tempdir().expect("a temporary folder");
    tiny_model::write(folder.path(), Family::Joint);
    model_of(folder.path())
}

/// Asks for little of a model: its text encoder and tokenizer.
fn encode(home: &TempDir, endpoint: &str, variables: Variables, model: &str) -> Outcome {
    let out = home.path().join("text.safetensors").display().to_string();
    jedi(home, endpoint, variables, &["inspect", "text", "--model", model, "--prompt", "a robot", "--outputs", &out])
}

#[test]
fn a_model_from_the_hub_paints_the_picture_that_it_paints_from_a_folder() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::new(toybox()));
    let robot = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/toybox/examples/robot.png").display().to_string();
    let paint = |model: &str, endpoint: &str, variables: Variables| {
        let out = home.path().join("picture.png").display().to_string();
        let flags = ["--prompt", "a robot on the beach", "--steps", "2", "--device", "cpu"];
        let args = [&["sample", "--model", model, "--ref", &robot, "--out", &out], &flags[..]].concat();
        let outcome = jedi(&home, endpoint, variables, &args);
        assert_eq!(outcome.code, Some(0), "{model}: {}", outcome.stderr);
        let picture = image::open(&out).unwrap().into_rgb8();
        let record = fs::read_to_string(Path::new(&out).with_extension("json")).unwrap();
        fs::remove_file(&out).unwrap();
        let record: serde_json::Value = serde_json::from_str(&record).unwrap();
        (picture, outcome.stderr, record["model"].as_str().expect("a name").to_owned())
    };
    let (expected, ..) = paint("toybox", "http://127.0.0.1:9", &[]);
    let (picture, said, name) = paint("hf:someone/toybox", server.url(), &[("HF_TOKEN", "right")]);
    assert!(picture == expected, "another picture");
    assert_eq!(name, format!("hf:someone/toybox@{COMMIT}"), "to be repeated with what it was made with");
    assert!(said.contains("someone/toybox: downloading unet/diffusion_pytorch_model.safetensors, "), "{said}");
    let log = server.log();
    assert!(log.iter().all(|asked| !asked.line.contains("README")), "{log:?}");
    let of_hub = log.iter().filter(|asked| !asked.line.contains("/large/"));
    assert!(
        of_hub.clone().count() > 10 && of_hub.into_iter().all(|asked| asked.token.as_deref() == Some("Bearer right"))
    );
    let (picture, said, _) = paint("someone/toybox", server.url(), &[("HF_HUB_OFFLINE", "1")]);
    assert!(picture == expected && server.log().is_empty() && !said.contains("downloading"), "{said}");
    let url = server.url().to_owned();
    drop(server);
    let (picture, said, _) = paint("someone/toybox", &url, &[]);
    assert!(picture == expected && said.contains("warning: someone/toybox: "), "{said}");
}

#[test]
fn refusals_name_the_flag_and_the_way_out() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::new(tiny()));
    let cases: [(&str, Variables, &str, &str); 6] = [
        ("no/body", &[], "error: --model no/body: the hub answers 401: ", "set HF_TOKEN"),
        ("no/body", &[], "error: --model no/body: ", "(nor is there a folder of this name)"),
        ("hf:no/body", &[("HF_TOKEN", "wrong")], "error: --model no/body: the hub has no model of this name", ""),
        ("hf:someone/toybox@v9", &[], "error: --model someone/toybox@v9: has no revision v9", ""),
        ("hf:someone", &[], "error: --model hf:someone: is no name of a model on the hub", "hf:OWNER/NAME"),
        ("someone/toybox", &[("HF_HUB_OFFLINE", "1")], "error: --model someone/toybox: the cache (", "unset it"),
    ];
    for (model, variables, start, part) in cases {
        let outcome = encode(&home, server.url(), variables, model);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{model}: {}", outcome.stderr);
        assert!(outcome.stderr.starts_with(start) && outcome.stderr.contains(part), "{model}: {}", outcome.stderr);
        assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.stderr);
    }
    let url = server.url().to_owned();
    drop(server);
    let outcome = encode(&home, &url, &[], "someone/toybox");
    assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
    assert!(
        outcome.stderr.contains("cannot be reached") && outcome.stderr.contains("does not hold it"),
        "{}",
        outcome.stderr
    );
    let outcome = encode(&home, "mirror", &[], "someone/toybox");
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("HF_ENDPOINT mirror: begins with neither"), "{}", outcome.stderr);
}

#[test]
fn training_starts_from_a_model_on_the_hub_and_its_record_names_it() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::new(tiny()));
    let config = home.path().join("run.toml");
    let text = "objective = 'autoencoder'\n[model]\narchitecture = 'someone/toybox'\nstart_from = 'someone/toybox@main'\n\
                [data]\nsource = 'toybox'\nsets = 4\nsize = 32\n[run]\nsteps = 1\nimages_per_step = 4\n";
    fs::write(&config, text).unwrap();
    let (config, out) = (config.display().to_string(), home.path().join("run"));
    let out_text = out.display().to_string();
    let train = |variables: Variables| {
        let args = ["train", "--config", &config, "--out", &out_text, "--device", "cpu"];
        jedi(&home, server.url(), variables, &args)
    };
    let outcome = train(&[]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let record = fs::read_to_string(out.join("config.toml")).unwrap();
    assert!(record.contains("architecture = \"someone/toybox\"") && record.contains("someone/toybox@main"), "{record}");
    assert!(server.log().iter().all(|asked| !asked.line.contains("unet")), "the VAE alone is needed");
    // The same run goes on, from the cache.
    assert_eq!(train(&[("HF_HUB_OFFLINE", "1")]).code, Some(0));
}

#[test]
fn the_doctor_says_what_the_hub_and_its_cache_are_like() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::new(tiny()));
    let line = |endpoint: &str, variables: Variables, check: &str| {
        let outcome = jedi(&home, endpoint, variables, &["doctor", "--device", "cpu"]);
        assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
        let is_it = |line: &&str| line[6..].starts_with(check);
        outcome.stdout.lines().find(is_it).unwrap_or_else(|| panic!("{}", outcome.stdout)).to_owned()
    };
    assert!(line(server.url(), &[], "cache").contains("will be made"));
    assert_eq!(encode(&home, server.url(), &[], "someone/toybox").code, Some(0));
    assert!(line(server.url(), &[], "cache").ends_with("hub; models of the hub there: 1"));
    assert!(line(server.url(), &[("HF_TOKEN", "right")], "hub").contains("s, to somebody"));
    let wrong = line(server.url(), &[("HF_TOKEN", "wrong")], "hub");
    assert!(wrong.starts_with("warn") && wrong.contains("does not accept the token of HF_TOKEN"), "{wrong}");
    assert!(
        line(server.url(), &[("HF_HUB_OFFLINE", "1")], "hub").starts_with("ok    hub         HF_HUB_OFFLINE is set")
    );
    let away = line("http://127.0.0.1:9", &[], "hub");
    assert!(away.starts_with("warn") && away.contains("http://127.0.0.1:9 cannot be reached"), "{away}");
}

#[test]
fn a_plan_of_a_data_set_tells_what_will_be_downloaded_and_downloads_nothing() {
    let network = Model::from([
        ("config.json".to_owned(), b"{}".to_vec()),
        ("model.safetensors".to_owned(), vec![0; 60_000_000]),
        ("README.md".to_owned(), b"a network".to_vec()),
    ]);
    let (home, server) = (tempfile::tempdir().unwrap(), Server::new(network));
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/synth-toybox.toml");
    let out = home.path().join("sets").display().to_string();
    let args = ["synth-data", "--config", config, "--sets", "8", "--dry-run", "--out", &out, "--device", "cpu"];
    let args = [&args[..], &["--set", "affinity.model=someone/toybox"]].concat();
    let outcome = jedi(&home, server.url(), &[], &args);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("someone/toybox (0.1 GB, 0.1 GB of it to be downloaded)"), "{}", outcome.stderr);
    assert!(
        server.log().iter().all(|asked| !asked.line.starts_with("GET") || asked.line.contains("/api/")),
        "{:?}",
        server.log()
    );
}

#[test]
fn a_plan_of_a_data_set_counts_painters_without_downloading_them() {
    let mut model = tiny();
    model.insert("unet/diffusion_pytorch_model.safetensors".to_owned(), vec![0; 70_000_000]);
    let (home, server) = (tempfile::tempdir().unwrap(), Server::new(model));
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/synth-toybox.toml");
    let out = home.path().join("sets").display().to_string();
    let args = ["synth-data", "--config", config, "--sets", "8", "--dry-run", "--out", &out, "--device", "cpu"];
    let stages = ["collage", "compose", "stylise"];
    let settings = stages.map(|stage| format!("{stage}.model=someone/toybox"));
    let changes = settings.iter().flat_map(|setting| ["--set", setting.as_str()]);
    let outcome = jedi(&home, server.url(), &[], &args.into_iter().chain(changes).collect::<Vec<_>>());
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    for stage in stages {
        let line = format!("{stage}: someone/toybox (0.1 GB, 0.1 GB of it to be downloaded)");
        assert!(outcome.stderr.contains(&line), "{line}: {}", outcome.stderr);
    }
    let is_download = |line: &str| line.starts_with("GET") && !line.contains("/api/");
    assert!(
        server.log().iter().all(|asked| !is_download(&asked.line) || asked.line.contains("model_index.json")),
        "{:?}",
        server.log()
    );
}

#[test]
fn a_plan_of_a_data_set_counts_language_models_without_downloading_them() {
    let model = Model::from([
        ("config.json".to_owned(), b"{}".to_vec()),
        ("model.safetensors".to_owned(), vec![0; 60_000_000]),
        ("m-q4_k_m.gguf".to_owned(), vec![0; 80_000_000]),
        ("m-f16.gguf".to_owned(), vec![0; 1000]),
    ]);
    let (home, server) = (tempfile::tempdir().unwrap(), Server::new(model));
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/synth-models.toml");
    let out = home.path().join("sets").display().to_string();
    let args = ["synth-data", "--config", config, "--sets", "8", "--dry-run", "--out", &out, "--device", "cpu"];
    let models = ["--set", "caption.model=someone/toybox", "--set", "prompts.model=someone/toybox"];
    let outcome = jedi(&home, server.url(), &[], &[&args[..], &models[..]].concat());
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    for words in ["caption: someone/toybox (0.1 GB, 0.1 GB of it", "prompts: someone/toybox (0.1 GB, 0.1 GB of it"] {
        assert!(outcome.stderr.contains(words), "{words}: {}", outcome.stderr);
    }
    let is_download = |line: &str| line.starts_with("GET") && !line.contains("/api/");
    assert!(server.log().iter().all(|asked| !is_download(&asked.line)), "{:?}", server.log());
}

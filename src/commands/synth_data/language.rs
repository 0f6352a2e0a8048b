//! The models of language that a config names: who writes the prompts, who describes the pictures.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::networks::network;
use crate::commands::{downloads, models};
use crate::device::Runtime;
use crate::interrupt::Interrupt;
use crate::model::Part;
use crate::model::blip::Search;
use crate::model::hub::{HubName, commit_of_snapshot};
use crate::model::language::{Choice, LanguageModel};
use crate::sha256::sha256_of_file;
use crate::synth::captioner::{self, Describer};
use crate::synth::chat::{self, Chat, ChatPrompter, Endpoint, EndpointSettings, LocalChat, Store};
use crate::synth::settings::SynthConfig;
use crate::synth::stage::{Captioner, Prompter};
use crate::synth::tool::{Model, Tool};
use crate::synth::{BlipCaptioner, Job};

/// Words are drawn from the likeliest that together have this probability.
const TOP_P: f64 = 0.9;
/// Room for what a model works with besides its weights.
const WORKING_BYTES: u64 = 1_000_000_000;
/// Folder of answers in that of unfinished work.
const ANSWERS: &str = "answers";

/// The endpoint of the config; it is asked nothing yet.
pub fn endpoint(job: &Job, interrupt: &Interrupt) -> Result<Tool<dyn Prompter>> {
    let prompts = &job.config.prompts;
    let settings = EndpointSettings {
        temperature: prompts.temperature,
        max_tokens: prompts.max_tokens,
        ..job.config.endpoint.clone()
    };
    let interrupt = interrupt.clone();
    let open = move || Endpoint::new(settings.clone(), |name| std::env::var(name).ok(), interrupt.clone());
    // What is wrong with its settings shows before anything is done.
    open()?;
    let model = Model { is_elsewhere: true, ..Model::code(&job.config.endpoint.model, chat::VERSION) };
    let kept = Kept::of(job);
    Ok(Tool::<dyn Prompter>::new(model, move || kept.prompter(Box::new(open()?))))
}

/// The GGUF file of `prompts.model`. What the hub has of it is downloaded first, unless the work is only `is_planned`.
pub fn local(job: &Job, runtime: &Runtime, interrupt: &Interrupt, is_planned: bool) -> Result<Tool<dyn Prompter>> {
    const OPTION: &str = "prompts.model";
    let prompts = &job.config.prompts;
    let name = prompts.model.clone();
    let mut model = Model { name: name.clone(), version: chat::VERSION, ..Model::default() };
    let mut file = None;
    match HubName::parse(&name).filter(|_| is_planned && !Path::new(&name).exists()) {
        Some(on_hub) => {
            let plan = downloads::plan(&on_hub, &[Part::Gguf]).context(OPTION)?;
            (model.hash, model.disk_bytes, model.missing_bytes) = (plan.commit, plan.n_bytes, plan.n_missing);
        }
        None => {
            let path = models::language_model(OPTION, &name)?;
            model.disk_bytes = path.metadata().with_context(|| path.display().to_string())?.len();
            model.hash = match path.parent().and_then(commit_of_snapshot) {
                // One commit has several sizes of a model.
                Some(commit) => format!("{commit}/{}", path.file_name().unwrap_or_default().display()),
                None => sha256_of_file(&path)?,
            };
            file = Some(path);
        }
    }
    // The table of words is unpacked.
    model.memory_bytes = model.disk_bytes + model.disk_bytes / 2 + WORKING_BYTES;
    let choice = Choice { temperature: prompts.temperature, top_p: TOP_P, max_tokens: prompts.max_tokens };
    let (kept, device, hash) = (Kept::of(job), runtime.device.clone(), model.hash.clone());
    let interrupt = interrupt.clone();
    Ok(Tool::<dyn Prompter>::new(model, move || {
        let file = file.as_ref().with_context(|| format!("{OPTION} {name}: is not downloaded"))?;
        let model = LanguageModel::open(file, &device).context(OPTION)?;
        kept.prompter(Box::new(LocalChat { model, name: hash.clone(), choice, interrupt: interrupt.clone() }))
    }))
}

/// The BLIP or BLIP-2 of `caption.model`; downloaded as [`local`] is.
pub fn captioner(config: &SynthConfig, runtime: &Runtime, is_planned: bool) -> Result<Tool<dyn Captioner>> {
    const OPTION: &str = "caption.model";
    let caption = config.caption.clone();
    let (mut model, files) = network(OPTION, &caption.model, captioner::VERSION, is_planned)?;
    if let Some(files) = &files {
        // Files may hold halves.
        let n_values: usize = files.weights("")?.tensors().values().map(|tensor| tensor.n_values()).sum();
        model.memory_bytes = (n_values * runtime.dtype.size_in_bytes()) as u64 + WORKING_BYTES;
    }
    let search =
        Search { beams: caption.beams, max_new_tokens: caption.max_tokens, length_exponent: caption.length_exponent };
    let runtime = runtime.clone();
    Ok(Tool::<dyn Captioner>::new(model, move || {
        let files = files.as_ref().with_context(|| format!("{OPTION} {}: is not downloaded", caption.model))?;
        let captioner = BlipCaptioner::load(files, &runtime).context(OPTION)?;
        Ok(Box::new(Describer { captioner, prompt: caption.starts_with.clone(), search }))
    }))
}

/// Where answers are kept, and how often is asked for one.
struct Kept {
    folder: PathBuf,
    /// One file a part, so that no two processes write into one.
    file: String,
    tries: usize,
}

impl Kept {
    fn of(job: &Job) -> Self {
        let prompts = &job.config.prompts;
        let folder = match prompts.answers.as_str() {
            "" => job.work_root().join(ANSWERS),
            folder => PathBuf::from(folder),
        };
        let part = job.shards().first().map_or(0, |shard| shard.number);
        Self { folder, file: format!("from-{part:05}"), tries: prompts.tries }
    }

    fn prompter(&self, chat: Box<dyn Chat>) -> Result<Box<dyn Prompter>> {
        let store = Store::open(&self.folder, &self.file)?;
        Ok(Box::new(ChatPrompter::new(chat, store, self.tries)))
    }
}

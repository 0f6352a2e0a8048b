//! The models that a config names: each stage's name becomes a tool. A new model is one more arm here.

use anyhow::Result;

use super::language;
use crate::commands::models;
use crate::device::Runtime;
use crate::interrupt::Interrupt;
use crate::invalid::invalid;
use crate::model::Files;
use crate::sample::Pipeline;
use crate::sha256::sha256_hex;
use crate::synth::Job;
use crate::synth::embedded::{
    Filter, Grammar, Layout, Palette, PipelinePainter, PlainGround, PromptAsCaption, Scenes, filter, grammar, layout,
    painter, palette, plain_ground, repeat,
};
use crate::synth::settings::{ENDPOINT, SynthConfig};
use crate::synth::stage::{Captioner, CollagePainter, Detector, Embedder, Inpainter, Prompter, Segmenter, Styler};
use crate::synth::tool::{Model, Tool, Tools};
use crate::synth::toybox::sheet::{self, ToySheets};

/// The tools, none of them open yet. What the hub has of them is downloaded first, unless the work is only `is_planned`. What
/// waits for others stops waiting when `interrupt` is raised.
pub fn open(job: &Job, runtime: &Runtime, interrupt: &Interrupt, is_planned: bool) -> Result<Tools> {
    let config = &job.config;
    Ok(Tools {
        prompts: prompts(job, runtime, interrupt, is_planned)?,
        collage: collage(config)?,
        detect: detector(config)?,
        segment: segmenter(config)?,
        identity: embedder("affinity.model", &config.affinity.model)?,
        copies: match config.affinity.copies_model.as_str() {
            "" => None,
            name => Some(embedder("affinity.copies_model", name)?),
        },
        compose: compose(config, runtime)?,
        stylise: stylise(config)?,
        caption: caption(config, runtime, is_planned)?,
    })
}

fn unknown(option: &str, name: &str, known: &str) -> anyhow::Error {
    invalid(format!("{option} {name}: is no model that this stage knows; use {known}"))
}

fn prompts(job: &Job, runtime: &Runtime, interrupt: &Interrupt, is_planned: bool) -> Result<Tool<dyn Prompter>> {
    let config = &job.config;
    let scenes = match config.prompts.scenes.as_str() {
        "any" => Scenes::Any,
        "toybox" => Scenes::Toybox,
        other => return Err(invalid(format!("prompts.scenes {other}: use any or toybox"))),
    };
    match config.prompts.model.as_str() {
        name @ "grammar" => {
            Ok(Tool::<dyn Prompter>::new(Model::code(name, grammar::VERSION), move || Ok(Box::new(Grammar { scenes }))))
        }
        ENDPOINT => language::endpoint(job, interrupt),
        other if models::is_name(other) => language::local(job, runtime, interrupt, is_planned),
        other => Err(unknown(
            "prompts.model",
            other,
            "grammar, endpoint, or a language model's .gguf file, folder or OWNER/NAME on the hub",
        )),
    }
}

fn collage(config: &SynthConfig) -> Result<Tool<dyn CollagePainter>> {
    match config.collage.model.as_str() {
        name @ "toybox" => {
            Ok(Tool::<dyn CollagePainter>::new(Model::code(name, sheet::VERSION), || Ok(Box::new(ToySheets))))
        }
        other => Err(unknown("collage.model", other, "toybox")),
    }
}

fn detector(config: &SynthConfig) -> Result<Tool<dyn Detector>> {
    match config.instances.detector.as_str() {
        name @ "plain-ground" => {
            Ok(Tool::<dyn Detector>::new(Model::code(name, plain_ground::VERSION), || Ok(Box::new(PlainGround))))
        }
        other => Err(unknown("instances.detector", other, "plain-ground")),
    }
}

fn segmenter(config: &SynthConfig) -> Result<Tool<dyn Segmenter>> {
    match config.instances.segmenter.as_str() {
        name @ "plain-ground" => {
            Ok(Tool::<dyn Segmenter>::new(Model::code(name, plain_ground::VERSION), || Ok(Box::new(PlainGround))))
        }
        other => Err(unknown("instances.segmenter", other, "plain-ground")),
    }
}

fn embedder(option: &str, name: &str) -> Result<Tool<dyn Embedder>> {
    match name {
        "palette" => Ok(Tool::<dyn Embedder>::new(Model::code(name, palette::VERSION), || Ok(Box::new(Palette)))),
        "layout" => Ok(Tool::<dyn Embedder>::new(Model::code(name, layout::VERSION), || Ok(Box::new(Layout)))),
        other => Err(unknown(option, other, "palette or layout")),
    }
}

fn compose(config: &SynthConfig, runtime: &Runtime) -> Result<Tool<dyn Inpainter>> {
    match config.compose.model.as_str() {
        "toybox" => {
            let files = models::open("toybox", None)?;
            let model = embedded_model("toybox", &files);
            let (steps, guidance, runtime) = (config.compose.steps, config.compose.guidance, runtime.clone());
            Ok(Tool::<dyn Inpainter>::new(model, move || {
                let files = models::open("toybox", None)?;
                let pipeline = Pipeline::load(&files, &runtime, true)?;
                Ok(Box::new(PipelinePainter::new(pipeline, steps, guidance)))
            }))
        }
        other => Err(unknown("compose.model", other, "toybox")),
    }
}

fn embedded_model(name: &str, files: &Files) -> Model {
    let (mut hashes, mut disk_bytes) = (String::new(), 0);
    if let Files::Embedded(files) = files {
        for (file, bytes) in *files {
            hashes += &format!("{file} {}\n", sha256_hex(bytes));
            disk_bytes += bytes.len() as u64;
        }
    }
    Model {
        name: name.to_owned(),
        version: painter::VERSION,
        hash: sha256_hex(hashes.as_bytes()),
        // Its files lie in the program.
        disk_bytes: 0,
        // Stored in f16, computed in f32, and room for a batch on its way.
        memory_bytes: 2 * disk_bytes + 500_000_000,
        ..Model::default()
    }
}

fn stylise(config: &SynthConfig) -> Result<Tool<dyn Styler>> {
    match config.stylise.model.as_str() {
        name @ "filter" => Ok(Tool::<dyn Styler>::new(Model::code(name, filter::VERSION), || Ok(Box::new(Filter)))),
        other => Err(unknown("stylise.model", other, "filter")),
    }
}

fn caption(config: &SynthConfig, runtime: &Runtime, is_planned: bool) -> Result<Tool<dyn Captioner>> {
    match config.caption.model.as_str() {
        name @ "prompt" => {
            Ok(Tool::<dyn Captioner>::new(Model::code(name, repeat::VERSION), || Ok(Box::new(PromptAsCaption))))
        }
        other if models::is_name(other) => language::captioner(config, runtime, is_planned),
        other => {
            Err(unknown("caption.model", other, "prompt, or the folder or OWNER/NAME on the hub of a BLIP or BLIP-2"))
        }
    }
}

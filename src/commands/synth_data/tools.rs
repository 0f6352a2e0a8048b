//! The models that a config names: each stage's name becomes a tool. A new model is one more arm here.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::language;
use super::networks::network;
use super::painters::{self, Painting};
use crate::commands::models;
use crate::device::Runtime;
use crate::interrupt::Interrupt;
use crate::invalid::invalid;
use crate::model::{Files, HubName};
use crate::synth::embedded::{
    Filter, Grammar, Layout, Palette, PlainGround, PromptAsCaption, Scenes, filter, grammar, layout, palette,
    plain_ground, repeat,
};
use crate::synth::settings::{ENDPOINT, SynthConfig};
use crate::synth::stage::{Captioner, CollagePainter, Detector, Embedder, Inpainter, Prompter, Segmenter, Styler};
use crate::synth::tool::{Model, Tool, Tools};
use crate::synth::toybox::sheet::{self, ToySheets};
use crate::synth::{Job, SEEING_VERSION};
use crate::vision::{ImageEmbedder, ObjectDetector, ObjectSegmenter};

/// The tools, none of them open yet. What the hub has of them is downloaded first, unless the work is only `is_planned`. What
/// waits for others stops waiting when `interrupt` is raised.
pub fn open(job: &Job, runtime: &Runtime, interrupt: &Interrupt, is_planned: bool) -> Result<Tools> {
    let config = &job.config;
    let seeing = Seeing { runtime, is_planned };
    let painting = Painting::new(config, runtime, interrupt, is_planned)?;
    let prompts = prompts(job, runtime, interrupt, is_planned)?;
    let (compose, side) = compose(config, &painting)?;
    Ok(Tools {
        prompts,
        collage: collage(config, &painting)?,
        detect: detector(config, seeing)?,
        segment: segmenter(config, seeing)?,
        identity: embedder("affinity.model", &config.affinity.model, seeing)?,
        copies: match config.affinity.copies_model.as_str() {
            "" => None,
            name => Some(embedder("affinity.copies_model", name, seeing)?),
        },
        score_identity: scorer("score.model", &config.score.model, &config.affinity.model, seeing)?,
        score_copies: scorer("score.copies_model", &config.score.copies_model, &config.affinity.copies_model, seeing)?,
        compose,
        stylise: stylise(config, side, &painting)?,
        caption: caption(config, runtime, is_planned)?,
    })
}

/// Where a Stable Diffusion model may be.
const PAINTER: &str = "a Stable Diffusion model's folder, .safetensors file or OWNER/NAME on the hub";

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

fn collage(config: &SynthConfig, painting: &Painting) -> Result<Tool<dyn CollagePainter>> {
    match config.collage.model.as_str() {
        name @ "toybox" => {
            Ok(Tool::<dyn CollagePainter>::new(Model::code(name, sheet::VERSION), || Ok(Box::new(ToySheets))))
        }
        name if models::is_name(name) => painters::collages(config, painting),
        other => Err(unknown("collage.model", other, &format!("toybox, or {PAINTER}"))),
    }
}

/// What networks that look at pictures are opened with.
#[derive(Clone, Copy)]
struct Seeing<'a> {
    runtime: &'a Runtime,
    is_planned: bool,
}

impl Seeing<'_> {
    /// A network in transformers' layout, by `load`, that `option` names; `known` are the other answers.
    fn tool<T: ?Sized + 'static>(
        self,
        (option, name, known): (&'static str, &str, &str),
        load: impl Fn(&Files, &Runtime) -> Result<Box<T>> + 'static,
    ) -> Result<Tool<T>> {
        if !Path::new(name).is_dir() && HubName::parse(name).is_none() {
            let known = format!("{known}, a network's folder, or OWNER/NAME on the hub");
            return Err(unknown(option, name, &known));
        }
        let (model, files) = network(option, name, SEEING_VERSION, self.is_planned)?;
        let (name, runtime) = (name.to_owned(), self.runtime.clone());
        Ok(Tool::new(model, move || {
            let files = files.as_ref().with_context(|| format!("{option} {name}: is not downloaded"))?;
            load(files, &runtime).with_context(|| option)
        }))
    }
}

fn detector(config: &SynthConfig, seeing: Seeing) -> Result<Tool<dyn Detector>> {
    match config.instances.detector.as_str() {
        name @ "plain-ground" => {
            Ok(Tool::<dyn Detector>::new(Model::code(name, plain_ground::VERSION), || Ok(Box::new(PlainGround))))
        }
        name => seeing.tool::<dyn Detector>(("instances.detector", name, "plain-ground"), |files, runtime| {
            Ok(Box::new(ObjectDetector::load(files, runtime)?))
        }),
    }
}

fn segmenter(config: &SynthConfig, seeing: Seeing) -> Result<Tool<dyn Segmenter>> {
    match config.instances.segmenter.as_str() {
        name @ "plain-ground" => {
            Ok(Tool::<dyn Segmenter>::new(Model::code(name, plain_ground::VERSION), || Ok(Box::new(PlainGround))))
        }
        name => seeing.tool::<dyn Segmenter>(("instances.segmenter", name, "plain-ground"), |files, runtime| {
            Ok(Box::new(ObjectSegmenter::load(files, runtime)?))
        }),
    }
}

fn embedder(option: &'static str, name: &str, seeing: Seeing) -> Result<Tool<dyn Embedder>> {
    match name {
        "palette" => Ok(Tool::<dyn Embedder>::new(Model::code(name, palette::VERSION), || Ok(Box::new(Palette)))),
        "layout" => Ok(Tool::<dyn Embedder>::new(Model::code(name, layout::VERSION), || Ok(Box::new(Layout)))),
        name => seeing.tool::<dyn Embedder>((option, name, "palette, layout"), |files, runtime| {
            Ok(Box::new(ImageEmbedder::load(files, runtime)?))
        }),
    }
}

/// A model that compares final pictures; None where it is the `usual` one, which is opened already.
fn scorer(option: &'static str, name: &str, usual: &str, seeing: Seeing) -> Result<Option<Tool<dyn Embedder>>> {
    match name {
        name if name.is_empty() || name == usual => Ok(None),
        name => Ok(Some(embedder(option, name, seeing)?)),
    }
}

fn compose(config: &SynthConfig, painting: &Painting) -> Result<(Tool<dyn Inpainter>, Option<usize>)> {
    match config.compose.model.as_str() {
        name if name == "toybox" || models::is_name(name) => painters::scenes(config, painting),
        other => Err(unknown("compose.model", other, &format!("toybox, or {PAINTER}"))),
    }
}

fn stylise(config: &SynthConfig, side: Option<usize>, painting: &Painting) -> Result<Tool<dyn Styler>> {
    match config.stylise.model.as_str() {
        name @ "filter" => {
            // What it does not know shows before anything is done.
            config.stylise.styles_among(Filter.styles())?;
            Ok(Tool::<dyn Styler>::new(Model::code(name, filter::VERSION), || Ok(Box::new(Filter))))
        }
        name if models::is_name(name) => painters::styles(config, side, painting),
        other => Err(unknown("stylise.model", other, &format!("filter, or InstructPix2Pix: {PAINTER}"))),
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

//! `jedi inspect prompts`: what a language model makes of the names of objects.

use anyhow::{Result, bail};
use serde_json::json;

use super::models;
use crate::cli::InspectPromptsArgs;
use crate::device::Runtime;
use crate::interrupt::{Interrupt, is_interrupted};
use crate::invalid::{invalid, is_invalid};
use crate::model::language::{Choice, LanguageModel};
use crate::report;
use crate::synth::chat::{Chat, ChatPrompter, Endpoint, EndpointSettings, LocalChat, Store, Tally};
use crate::synth::stage::{PromptAsk, Prompter as _};

/// Words are drawn from the likeliest that together have this probability (Qwen3's own advice is 0.8 without thinking).
const TOP_P: f64 = 0.9;

pub fn run(args: InspectPromptsArgs) -> Result<()> {
    if !(0.0..=2.0).contains(&args.temperature) {
        return Err(invalid(format!("--temperature {}: is not between 0 and 2", args.temperature)));
    }
    if let Some(odd) = args.objects.iter().find(|object| object.trim().is_empty()) {
        return Err(invalid(format!("--object {odd:?}: names nothing; give a noun such as teapot")));
    }
    let store = match &args.store {
        Some(folder) => Store::open(folder, "inspect")?,
        None => Store::in_memory(),
    };
    let mut prompter = ChatPrompter::new(open(&args)?, store, args.tries);
    let mut n_missing = 0;
    for object in &args.objects {
        let ask = PromptAsk { object, n_scenes: args.scenes, seed: args.seed };
        for prompts in prompter.prompts(&[ask]) {
            match prompts {
                Ok(prompts) => report::result(
                    json!({"name": object, "object": prompts.object, "scenes": prompts.scenes}).to_string(),
                )?,
                Err(error) if is_invalid(&error) || is_interrupted(&error) => return Err(error),
                Err(error) => {
                    n_missing += 1;
                    report::warn(format!("{error:#}"));
                }
            }
        }
    }
    let Tally { asked, kept, refused, cut, malformed, failed, .. } = prompter.tally();
    report::note(format!(
        "{asked} questions, {kept} answers from the store; {refused} refused, {cut} cut off, {malformed} not what was asked \
         for, {failed} without an answer"
    ));
    if n_missing > 0 {
        bail!("{n_missing} of {} objects have no prompts", args.objects.len());
    }
    Ok(())
}

fn open(args: &InspectPromptsArgs) -> Result<Box<dyn Chat>> {
    if let Some(url) = &args.endpoint {
        let settings = EndpointSettings {
            url: url.clone(),
            model: args.model.clone(),
            key_variable: args.key_variable.clone(),
            temperature: args.temperature,
            max_tokens: args.max_tokens,
            ..EndpointSettings::default()
        };
        let endpoint = Endpoint::new(settings, |name| std::env::var(name).ok(), Interrupt::install()?)?;
        return Ok(Box::new(endpoint));
    }
    let file = models::language_model("--model", &args.model)?;
    let model = LanguageModel::open(&file, &Runtime::open(args.device.name())?.device)?;
    let choice = Choice { temperature: args.temperature, top_p: TOP_P, max_tokens: args.max_tokens };
    Ok(Box::new(LocalChat { model, name: args.model.clone(), choice, interrupt: Interrupt::install()? }))
}

//! `jedi inspect dataset`: what a data set, or each source of a training config, holds, and what is wrong with it.

use std::path::Path;

use anyhow::{Result, bail};
use serde_json::json;

use super::{contact_sheet, sources};
use crate::cli::{DatasetLayout, InspectDatasetArgs};
use crate::data::survey::{Survey, SurveySettings, survey};
use crate::invalid::invalid;
use crate::train::TrainConfig;
use crate::train::data_settings::{DataLayout, SourceConfig};
use crate::{config, report};

/// Side of the pictures on the contact sheet.
const THUMBNAIL_PX: u32 = 160;
/// Broken and passed over samples that the text names.
const MAX_LISTED: usize = 20;

pub fn run(args: &InspectDatasetArgs) -> Result<()> {
    let mut seen = vec![];
    for source in wanted(args)? {
        let opened = sources::open(&source, THUMBNAIL_PX)?;
        let settings =
            SurveySettings { decodes: !args.quick, n_shown: if args.html.is_some() { args.shown } else { 0 } };
        let bar = report::progress(opened.n_sets() as u64, "samples");
        let survey = survey(opened.as_ref(), settings, &|| bar.inc(1));
        bar.finish_and_clear();
        let lines = described(&survey);
        if args.json {
            report::result(as_json(source.name(), &survey).to_string())?;
        } else {
            report::result(source.name())?;
            lines.iter().try_for_each(report::result)?;
        }
        seen.push((source.name().to_owned(), lines, survey));
    }
    if let Some(path) = &args.html {
        contact_sheet::write(path, &seen)?;
        report::note(format!("wrote {}", path.display()));
    }
    match seen.iter().find(|(_, _, survey)| survey.n_sets() == 0) {
        Some((name, ..)) => bail!("{name}: holds no set that could be trained on"),
        None => Ok(()),
    }
}

/// The source that is asked for, or all of a config.
fn wanted(args: &InspectDatasetArgs) -> Result<Vec<SourceConfig>> {
    let path = Path::new(&args.place);
    let is_config = path.extension().is_some_and(|ending| ending == "toml") && path.is_file();
    match (is_config, args.layout) {
        (true, None) => {
            let settings: TrainConfig = config::load(path, &[])?;
            settings.data.validate(&settings.joint.set_sizes)?;
            Ok(settings.data.all_sources())
        }
        (true, Some(_)) => Err(invalid("--layout: a config says the layouts of its sources; leave the flag out")),
        (false, layout) => {
            let layout = match layout.unwrap_or(DatasetLayout::Sets) {
                DatasetLayout::Sets => DataLayout::Sets,
                DatasetLayout::Single => DataLayout::Single,
                DatasetLayout::Clips => DataLayout::Clips,
                DatasetLayout::Views => DataLayout::Views,
            };
            Ok(vec![SourceConfig { layout, ..SourceConfig::plain(&args.place) }])
        }
    }
}

fn described(survey: &Survey) -> Vec<String> {
    let line = |name: &str, text: String| format!("  {name:<13}{text}");
    let mut lines = vec![line("samples", survey.n_samples.to_string())];
    let sizes: Vec<String> = survey.set_sizes.iter().map(|(n, sets)| format!("{sets} of {n}")).collect();
    lines.push(line("sets", format!("{}, pictures each: {}", survey.n_sets(), sizes.join(", "))));
    let sides = match &survey.short_sides[..] {
        [] => String::new(),
        all => {
            format!(", shorter side {} to {} pixels, median {}", all[0], all[all.len() - 1], all[all.len() / 2])
        }
    };
    lines.push(line("pictures", format!("{}{sides}", survey.n_images())));
    let captions = &survey.captions;
    let mean = captions.n_words as f64 / captions.n_captions.max(1) as f64;
    let mut text = format!(
        "{}, {} different, {} empty, {mean:.1} words on average",
        captions.n_captions, captions.n_different, captions.n_empty
    );
    if let Some((words, label)) = &captions.longest {
        text += &format!(", at most {words} ({label})");
    }
    lines.push(line("captions", text));
    for (name, all) in [("passed over", &survey.passed_over), ("broken", &survey.broken)] {
        lines.push(line(name, all.len().to_string()));
        lines.extend(all.iter().take(MAX_LISTED).map(|each| format!("    {each}")));
        if all.len() > MAX_LISTED {
            lines.push(format!("    and {} more, which --json and --html list", all.len() - MAX_LISTED));
        }
    }
    if survey.n_lost > 0 {
        lines.push(line("lost", format!("about {} samples, in shards that cannot be read", survey.n_lost)));
    }
    lines
}

fn as_json(name: &str, survey: &Survey) -> serde_json::Value {
    let captions = &survey.captions;
    let sides = &survey.short_sides;
    json!({
        "source": name,
        "samples": survey.n_samples,
        "sets": survey.n_sets(),
        "images": survey.n_images(),
        "set_sizes": survey.set_sizes.iter().map(|(n, sets)| (n.to_string(), json!(sets))).collect::<serde_json::Map<_, _>>(),
        "short_side": { "min": sides.first(), "median": sides.get(sides.len() / 2), "max": sides.last() },
        "captions": {
            "count": captions.n_captions, "different": captions.n_different, "empty": captions.n_empty,
            "words": captions.n_words, "longest": captions.longest.as_ref().map(|(words, _)| words),
        },
        "passed_over": survey.passed_over,
        "broken": survey.broken,
        "lost": survey.n_lost,
    })
}

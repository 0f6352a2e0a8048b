//! Models from the hub, with what is shown while they come.

use std::path::PathBuf;

use anyhow::Result;
use indicatif::ProgressBar;

use crate::model::hub::{Event, Hub, Plan, Settings};
use crate::model::{HubName, Part};
use crate::report;

/// Files that are announced where no bars are drawn: those that take a while.
const LARGE_BYTES: u64 = 1_000_000;

/// The folder of a model, downloaded as far as `parts` need it and the cache does not have it.
pub fn folder(name: &HubName, parts: &[Part]) -> Result<PathBuf> {
    let mut bar = None;
    Hub::new(Settings::from_env()?).fetch(name, parts, &mut |event| show(name, &mut bar, event))
}

/// What a model on the hub takes, and how much of it is still to come.
pub fn plan(name: &HubName, parts: &[Part]) -> Result<Plan> {
    let mut bar = None;
    Hub::new(Settings::from_env()?).plan(name, parts, &mut |event| show(name, &mut bar, event))
}

fn show(name: &HubName, bar: &mut Option<ProgressBar>, event: Event) {
    match event {
        Event::File { name: file, n_bytes, n_kept } => {
            let size = n_bytes.unwrap_or_default();
            let fresh = report::download(size, file);
            fresh.set_position(n_kept);
            // The rate is that of this connection.
            fresh.reset_eta();
            *bar = Some(fresh);
            if !report::has_bars() && size >= LARGE_BYTES {
                let kept = if n_kept > 0 { format!(", going on from {}", megabytes(n_kept)) } else { String::new() };
                report::note(format!("{name}: downloading {file}, {}{kept}", megabytes(size)));
            }
        }
        Event::Bytes(n_bytes) => {
            if let Some(bar) = bar {
                bar.set_position(n_bytes);
            }
        }
        Event::FileEnd => {
            if let Some(bar) = bar.take() {
                bar.finish_and_clear();
            }
        }
        Event::Wait(why) => report::note(why),
        Event::Warning(what) => report::warn(what),
    }
}

fn megabytes(n_bytes: u64) -> String {
    format!("{:.1} MB", n_bytes as f64 / 1e6)
}

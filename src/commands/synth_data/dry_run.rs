//! `jedi synth-data --dry-run`: what a job needs, before it is begun.

use std::fs;

use anyhow::Result;

use crate::config;
use crate::report;
use crate::synth::Job;
use crate::synth::job::{different_models, memory};
use crate::synth::page::yields_in;
use crate::synth::stage::Stage;
use crate::synth::tool::Tools;

/// Bytes of a pixel of a stored picture: PNG takes about this much of painted ones.
const BYTES_A_PIXEL: f64 = 2.2;

/// Notes the needs, prints the resolved config.
pub fn print(job: &Job, tools: &Tools) -> Result<()> {
    let gigabytes = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
    for stage in Stage::ALL {
        let models = tools.models(stage).into_iter().map(|model| match (model.disk_bytes, model.missing_bytes) {
            _ if model.is_elsewhere => format!("{} (over the network)", model.name),
            (0, 0) => format!("{} (in the program)", model.name),
            (disk, 0) => format!("{} ({} on disk)", model.name, gigabytes(disk)),
            (disk, missing) => {
                format!("{} ({}, {} of it to be downloaded)", model.name, gigabytes(disk), gigabytes(missing))
            }
        });
        report::note(format!("{}: {}", stage.name(), models.collect::<Vec<_>>().join(", ")));
    }
    let all = different_models(tools, &Stage::ALL);
    let to_download: u64 = all.iter().map(|model| model.missing_bytes).sum();
    let groups = job.groups(tools);
    let largest = groups.iter().map(|group| memory(tools, group)).max().unwrap_or(0);
    report::note(format!(
        "models: {} to be downloaded; at most {} of memory, in {} groups of stages under sets.memory_gb = {}",
        gigabytes(to_download),
        gigabytes(largest),
        groups.len(),
        job.config.sets.memory_gb
    ));
    let sets: usize = job.shards().iter().map(|shard| shard.sets.len()).sum();
    let pictures = sets * job.config.sets.max_images * job.config.sets.sets_per_collage;
    report::note(format!("work: {sets} set numbers in {} shards, {pictures} pictures at most", job.shards().len()));

    // Of what is there a shard tells size and speed; before that only the embedded model's are known.
    let measured = yields_in(&job.folder)?;
    let shards: Vec<u64> = job
        .shards()
        .iter()
        .filter_map(|shard| fs::metadata(job.shard_path(shard)).ok())
        .map(|file| file.len())
        .collect();
    let disk = match (shards.is_empty(), job.config.compose.model.as_str()) {
        (false, _) => {
            let mean = shards.iter().sum::<u64>() as f64 / shards.len() as f64;
            Some(mean * job.shards().len() as f64)
        }
        (true, "toybox") => Some(pictures as f64 * (64.0 * 64.0 * BYTES_A_PIXEL + 2000.0)),
        (true, _) => None,
    };
    match disk {
        Some(bytes) => report::note(format!("disk: about {} for the shards", gigabytes(bytes as u64))),
        None => report::note("disk: not known yet; make a shard (--limit), then ask again"),
    }
    match measured.as_ref().and_then(|yields| yields.sets_per_hour()) {
        Some(rate) => report::note(format!("time: about {:.1} hours, as fast as the shards there", sets as f64 / rate)),
        None => report::note("time: not known yet; make a shard or a few sets (--limit 8), then ask again"),
    }
    Ok(report::result(config::to_toml(&job.config)?.trim_end())?)
}

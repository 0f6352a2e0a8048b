//! The flags of `jedi synth-data`.

use std::path::PathBuf;

use clap::{Args, ValueEnum, builder::RangedU64ValueParser};

use super::values::{Device, Shard};

/// Run the same command again to go on with one that was stopped.
///
/// With --config the pipeline of the paper's Algorithm 1 makes the sets, stage by stage: prompts, collage, instances, affinity,
/// compose, stylise, caption, score. Without it they are drawn.
#[derive(Debug, Args)]
pub struct SynthDataArgs {
    /// Settings of the pipeline, a TOML file; without one made-up toys are drawn
    #[arg(long, value_name = "FILE", conflicts_with_all = ["source", "images", "size", "per_shard", "masks"])]
    pub config: Option<PathBuf>,
    /// Change one setting of the config, `table.key=value`; wins over the file; repeat for more
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    pub overrides: Vec<String>,
    /// Without --config: where the pictures come from
    #[arg(long, value_enum, default_value_t = SynthSource::Toybox)]
    pub source: SynthSource,
    /// Sets to make, in all parts together
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub sets: usize,
    /// Without --config: pictures in each set
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = RangedU64ValueParser::<usize>::new().range(1..=64))]
    pub images: usize,
    /// Without --config: side of the pictures in pixels
    #[arg(long, value_name = "PX", default_value_t = 64, value_parser = super::pixels())]
    pub size: usize,
    /// Seed: the same seed gives the same sets [default: the config's `sets.seed`, else 0]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Folder for the sets
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Without --config: sets per WebDataset tar; 0 = loose files in the folder
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub per_shard: usize,
    /// Without --config: also write a mask of the subject for each picture (with it: `sets.masks`)
    #[arg(long)]
    pub masks: bool,
    /// Make only part I of N, counted from 0: one part a machine
    #[arg(long, value_name = "I/N", default_value = "0/1")]
    pub shard: Shard,
    /// Stop behind this stage; shards are written behind the last one alone. What earlier stages have saved under the same
    /// settings is used, so that a changed setting of a stage makes it work on its saved input again [default: score]
    #[arg(long, value_enum, value_name = "STAGE", requires = "config")]
    pub stage: Option<SynthStage>,
    /// Work on so many set numbers of this part only, rounded up to whole batches [default: all]
    #[arg(long, value_name = "N", requires = "config", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub limit: Option<usize>,
    /// Folder where stages keep their results for good [default: .work in --out, emptied as shards are done]
    #[arg(long, value_name = "DIR", requires = "config")]
    pub work: Option<PathBuf>,
    /// Write rejected attempts, too: collage, reason and record, into rejected/ in --out
    #[arg(long, requires = "config")]
    pub keep_rejected: bool,
    /// Print models, sizes, disk and time that the job needs, and the resolved config, and stop
    #[arg(long, requires = "config")]
    pub dry_run: bool,
    /// Where to compute: `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SynthSource {
    /// Made-up toys drawn by the program
    Toybox,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SynthStage {
    /// What collage and scenes are painted from
    Prompts,
    /// One picture of many photos of the same thing
    Collage,
    /// The things in it, cut out
    Instances,
    /// Which of them are one subject
    Affinity,
    /// Each in a scene of its own
    Compose,
    /// Some in another style
    Stylise,
    /// A caption a picture
    Caption,
    /// How alike the pictures of a set are
    Score,
}

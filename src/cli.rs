//! The command line as clap types and nothing else: parsing reads no file and opens no device. The `commands` turn
//! these into settings; the value parsers (what a single flag may hold) are in `cli/values.rs`.

mod convert;
mod inspect;
mod sample;
mod steering;
mod synth;
mod values;

pub use convert::{ConvertArgs, Prediction, WeightDtype};
pub use inspect::{
    DatasetLayout, InspectAttentionArgs, InspectCaptionArgs, InspectCheckpointArgs, InspectCommand, InspectDatasetArgs,
    InspectEpsArgs, InspectObjectsArgs, InspectPromptsArgs, InspectSimilarityArgs, InspectTextArgs, InspectVaeArgs,
};
pub use sample::{Dtype, Fit, SampleArgs};
pub use steering::{Guidance, Sampler, SteeringArgs};
pub use synth::{SynthDataArgs, SynthSource, SynthStage};
pub use values::{Device, Lora, Point, Reference, Shard};

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, builder::RangedU64ValueParser};

/// Personalised pictures without fine-tuning: a joint-image diffusion model (JeDi).
#[derive(Debug, Parser)]
#[command(name = "jedi", version, arg_required_else_help = true, max_term_width = 120)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage or config.")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make new pictures of the subject that the reference pictures show
    Sample(Box<SampleArgs>),
    /// Train a model, or go on with a run that was stopped
    Train(TrainArgs),
    /// Make sets of pictures that share a subject, to train on
    SynthData(Box<SynthDataArgs>),
    /// Measure how well a model keeps the subject and follows the prompt
    Eval(Box<EvalArgs>),
    /// Write a model in another layout or number format, without training state
    Convert(ConvertArgs),
    /// Look inside a model or a file; lets other programs check the networks
    #[command(subcommand)]
    Inspect(InspectCommand),
    /// Check what this machine, this build and a model can do
    Doctor(DoctorArgs),
    /// Print the completions of a shell, to be sourced by it
    Completions(CompletionsArgs),
    /// Write the manual pages
    Man(ManArgs),
}

/// One line a check: ok, warn, or FAIL with the way out. Exit code 1 if a check fails.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Model folder (diffusers layout), single .safetensors file, OWNER/NAME(@REVISION) on the hub, or `toybox`: the small
    /// model inside this program
    #[arg(long, value_name = "M", default_value = "toybox")]
    pub model: String,
    /// Folder of CLIP's tokenizer (vocab.json, merges.txt), which single files lack [default: `tokenizer/` beside the file]
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Where to compute: `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
    /// Print the checks to stdout as JSON, one object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// Folder for jedi.1 and a page a verb
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Run the same command again to go on with a run that was stopped.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Settings of the run, a TOML file
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Change one setting, `table.key=value`; wins over the file; repeat for more
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Run folder, for TensorBoard too [default: runs/ and the name of the config file]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Set all up, print the resolved config, the data found and what memory and time the run would take to stdout, and stop
    /// before the first step
    #[arg(long)]
    pub dry_run: bool,
    /// Where to compute: `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    /// What is measured
    #[arg(long, value_enum, default_value_t = Protocol::Toybox)]
    pub protocol: Protocol,
    /// Model folder (diffusers layout), single .safetensors file, OWNER/NAME(@REVISION) on the hub, or `toybox`: the small
    /// model inside this program
    #[arg(long, value_name = "M", default_value = "toybox")]
    pub model: String,
    /// Folder of CLIP's tokenizer (vocab.json, merges.txt), which single files lack [default: `tokenizer/` beside the file]
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Held-out toys to measure on, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = RangedU64ValueParser::<usize>::new().range(1..=64))]
    pub toys: usize,
    #[command(flatten)]
    pub steering: SteeringArgs,
    /// Seed of all random numbers
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Folder for report.json and sheet.png [default: neither is written]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Measure only this row; repeat for more [default: all three]
    #[arg(long, value_enum, value_name = "ROW")]
    pub only: Vec<EvalRow>,
    /// Where to compute: `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
    /// Print the results to stdout as JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// Held-out toys of the drawn world
    Toybox,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EvalRow {
    /// The method as it is
    Coupled,
    /// References given, self-attention kept inside each picture
    Uncoupled,
    /// No references given
    NoReference,
}

fn steps() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=1000)
}

fn pixels() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(8..=4096)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn every_flag_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_have_help() {
        fn check(command: &clap::Command) {
            for arg in command.get_arguments().filter(|arg| !["help", "version"].contains(&arg.get_id().as_str())) {
                assert!(arg.get_help().is_some(), "{} {}: no help", command.get_name(), arg.get_id());
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for flags in [["--steps", "0"], ["--steps", "1001"], ["--num-images", "0"], ["--size", "4"], ["--scale", "-1"]]
        {
            let parsed = Cli::try_parse_from(["jedi", "sample", "--prompt", "a robot"].into_iter().chain(flags));
            assert!(parsed.is_err(), "{flags:?} passed");
        }
    }

    #[test]
    fn sample_needs_a_prompt_but_no_reference() {
        assert!(Cli::try_parse_from(["jedi", "sample", "--ref", "a.png"]).is_err());
        let parsed = Cli::try_parse_from(["jedi", "sample", "--prompt", "a", "--prompt", "b"]);
        let Ok(Cli { command: Command::Sample(args) }) = parsed else { panic!("{parsed:?}") };
        assert_eq!(args.prompts, ["a", "b"]);
        assert!(args.references.is_empty());
    }
}

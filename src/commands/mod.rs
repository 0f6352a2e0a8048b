//! One file a verb: arguments and files become settings, the library does the work, `report` prints.

mod contact_sheet;
mod convert;
mod doctor;
mod downloads;
mod eval;
mod inspect;
mod inspect_attention;
mod inspect_caption;
mod inspect_checkpoint;
mod inspect_dataset;
mod inspect_eps;
mod inspect_objects;
mod inspect_prompts;
mod inspect_similarity;
mod manual;
pub mod models;
mod pickle;
mod preview;
mod sample;
mod sources;
mod steering;
mod synth_data;
mod toybox_trials;
mod train;

use std::{io, process::ExitCode};

use anyhow::{Result, anyhow};
use clap::Parser as _;

use crate::{
    cli::{Cli, Command},
    invalid::is_invalid,
    ops,
    ranks::{self, watch::Loss},
    report,
};

/// Runs the program; the exit code is 0 done, 1 failed, 2 wrong usage or config.
pub fn run() -> ExitCode {
    ops::fit_threads(ranks::launch::own_cpus(None));
    ops::keep_freed_memory();
    match Cli::try_parse() {
        Ok(cli) => exit_code(dispatch(cli.command)),
        // Help and version come this way too; nobody is left to hear that the reader of either went away.
        Err(answer) => {
            report::usage(&answer).ok();
            ExitCode::from(if answer.use_stderr() { WRONG_USAGE } else { DONE })
        }
    }
}

fn dispatch(command: Command) -> Result<()> {
    match command {
        Command::Sample(args) => sample::run(*args),
        Command::Train(args) => train::run(args),
        Command::SynthData(args) => synth_data::run(*args),
        Command::Eval(args) => eval::run(&args),
        Command::Convert(args) => convert::run(args),
        Command::Inspect(command) => inspect::run(command),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions(args) => manual::completions(&args),
        Command::Man(args) => manual::pages(&args),
    }
}

/// Ends this process at once: one that it works with is gone, and its main thread waits for that one in a call that has no
/// way out. What is being written has a temporary name.
fn end_without(loss: Loss) {
    if !loss.is_told {
        let advice = "the last checkpoint stays as it was; run the same command again to go on";
        report::error(&anyhow!("{}; {advice}", loss.message));
    }
    signal_hook::low_level::exit(FAILED.into());
}

const DONE: u8 = 0;
const FAILED: u8 = 1;
const WRONG_USAGE: u8 = 2;

fn exit_code(outcome: Result<()>) -> ExitCode {
    let Err(error) = outcome else { return ExitCode::from(DONE) };
    if is_broken_pipe(&error) {
        return ExitCode::from(DONE);
    }
    report::error(&error);
    ExitCode::from(if is_invalid(&error) { WRONG_USAGE } else { FAILED })
}

/// The reader of our stdout went away (`| head`): it has what it wanted.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let is_broken = |cause: &io::Error| cause.kind() == io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref().is_some_and(is_broken))
}

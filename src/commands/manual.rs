//! `jedi completions` and `jedi man`: the command line for shells and for `man`.

use std::fs;

use anyhow::{Context as _, Result};
use clap::{Command, CommandFactory as _};
use clap_mangen::Man;

use crate::cli::{Cli, CompletionsArgs, ManArgs};
use crate::report;
use crate::whole_file::write_whole;

/// The shell's script on stdout.
pub fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "jedi", &mut script);
    Ok(report::result(String::from_utf8(script).context("completions that are no text")?.trim_end())?)
}

/// jedi.1, and a page a verb beside it.
pub fn pages(args: &ManArgs) -> Result<()> {
    fs::create_dir_all(&args.out).with_context(|| format!("--out {}", args.out.display()))?;
    let mut command = Cli::command();
    command.build();
    pages_of(&command, "jedi", args)
}

fn pages_of(command: &Command, name: &str, args: &ManArgs) -> Result<()> {
    let mut page = Vec::new();
    Man::new(command.clone()).title(name.to_uppercase()).render(&mut page)?;
    let path = args.out.join(format!("{name}.1"));
    write_whole(&path, &page)?;
    report::result(path.display().to_string())?;
    let verbs = command.get_subcommands().filter(|verb| verb.get_name() != "help");
    for verb in verbs {
        pages_of(verb, &format!("{name}-{}", verb.get_name()), args)?;
    }
    Ok(())
}

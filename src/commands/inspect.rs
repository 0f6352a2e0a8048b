//! `jedi inspect`: the openings through which other programs check the networks.

use anyhow::{Result, bail};

use super::inspect_checkpoint;
use crate::cli::{InspectCommand, InspectEpsArgs, InspectTextArgs, InspectVaeArgs};

pub fn run(command: InspectCommand) -> Result<()> {
    match command {
        InspectCommand::Eps(args) => eps(args),
        InspectCommand::Text(args) => text(args),
        InspectCommand::Vae(args) => vae(args),
        InspectCommand::Checkpoint(args) => inspect_checkpoint::run(args),
    }
}

fn eps(_args: InspectEpsArgs) -> Result<()> {
    bail!("not built yet")
}

fn text(_args: InspectTextArgs) -> Result<()> {
    bail!("not built yet")
}

fn vae(_args: InspectVaeArgs) -> Result<()> {
    bail!("not built yet")
}

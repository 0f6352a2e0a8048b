//! `jedi synth-data`: sets that share a subject, to train on.

use anyhow::{Result, bail};

use crate::cli::SynthDataArgs;

pub fn run(_args: SynthDataArgs) -> Result<()> {
    bail!("not built yet")
}

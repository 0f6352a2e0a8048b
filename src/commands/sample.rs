//! `jedi sample`: references and prompts become pictures.

use anyhow::{Result, bail};

use crate::cli::SampleArgs;

pub fn run(_args: SampleArgs) -> Result<()> {
    bail!("not built yet")
}

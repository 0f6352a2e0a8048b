//! `jedi eval`: how well a model keeps the subject and follows the prompt.

use anyhow::{Result, bail};

use crate::cli::EvalArgs;

pub fn run(_args: EvalArgs) -> Result<()> {
    bail!("not built yet")
}

//! `jedi train`: a config file becomes a run folder.

use anyhow::{Result, bail};

use crate::{cli::TrainArgs, config, report};

pub fn run(args: TrainArgs) -> Result<()> {
    let settings: toml::Table = config::load(&args.config, &args.overrides)?;
    if args.dry_run {
        return Ok(report::result(config::to_toml(&settings)?.trim_end())?);
    }
    bail!("not built yet")
}

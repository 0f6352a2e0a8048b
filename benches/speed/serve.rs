//! Measures on request: a JSON line on stdin asks, a JSON line on stdout answers. `scripts/bench_vs_torch.py` keeps one
//! such process beside PyTorch's and lets them take turns. The work asked for last stays in memory.
//!
//! `{"case": NAME, "times": K}` → `{"seconds": [K numbers], "flops": F or null, "variants": ["jedi"], "peak_bytes": B}` or
//! `{"error": TEXT}`. With `"trim": true` one run that is not counted comes first, and freed memory goes back to the
//! system behind the last one. What PyTorch's side calls a variant has one value here.

use std::io::{self, BufRead as _};

use anyhow::{Context as _, Result};
use jedi::report;
use serde::{Deserialize, Serialize};

use super::case::{self, Case};
use super::operations::Run;
use super::prepare;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    case: String,
    times: usize,
    #[serde(default)]
    trim: bool,
    /// Only there for PyTorch's side.
    #[serde(default, rename = "variant")]
    _variant: Option<String>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Answer {
    Measured { seconds: Vec<f64>, flops: Option<f64>, variants: [&'static str; 1], peak_bytes: u64 },
    Failed { error: String },
}

/// Answers until stdin ends.
pub fn serve() -> Result<()> {
    let mut server = Server { cases: case::all()?, held: None };
    for line in io::stdin().lock().lines() {
        let answer = server.answer(&line?).unwrap_or_else(|error| Answer::Failed { error: format!("{error:#}") });
        report::result(serde_json::to_string(&answer)?)?;
    }
    Ok(())
}

struct Server {
    cases: Vec<Case>,
    /// Name, and the work ready to run.
    held: Option<(String, Run)>,
}

impl Server {
    fn answer(&mut self, line: &str) -> Result<Answer> {
        let request: Request = serde_json::from_str(line).context("not a request")?;
        let case = self.cases.iter().find(|case| case.name == request.case);
        let case = case.with_context(|| format!("no case {:?} in benches/cases.json", request.case))?;
        let mut is_warm = !request.trim;
        if self.held.as_ref().is_none_or(|(name, _)| *name != case.name) {
            self.held = None;
            trim();
            self.held = Some((case.name.clone(), prepare(&case.work)?));
            is_warm = false;
        }
        let Some((_, run)) = &mut self.held else { anyhow::bail!("nothing is held") };
        if !is_warm {
            run()?;
        }
        let seconds = (0..request.times).map(|_| run()).collect::<Result<_>>()?;
        if request.trim {
            trim();
        }
        Ok(Answer::Measured { seconds, flops: case.work.flops(), variants: ["jedi"], peak_bytes: peak_bytes()? })
    }
}

/// Hands freed memory back to the system: the other side needs it, and `ops::keep_freed_memory` keeps it otherwise.
fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim takes the allocator's own locks and touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The most memory that this process has held (VmHWM); 0 where the system does not tell.
fn peak_bytes() -> Result<u64> {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return Ok(0) };
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("/proc/self/status: no VmHWM")?;
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse().context("/proc/self/status: VmHWM")?;
    Ok(kilobytes * 1024)
}

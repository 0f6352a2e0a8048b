//! How fast jedi is: every operation at Stable Diffusion 1.4's and the toybox's shapes, and whole networks.
//!
//! `cargo bench` measures all of `benches/cases.json` and prints a line each, `cargo bench -- NAME… --json` some of them
//! for a script, `cargo bench -- --profile` where a U-Net's time goes. `scripts/bench_vs_torch.py` runs it with `--serve`.

mod case;
mod instructions;
mod networks;
mod operations;
mod place;
mod profile;
mod serve;
mod walk;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use jedi::shape::SetShape;
use jedi::{ops, report};
use serde_json::json;

use case::Work;
use operations::Run;

/// Measures jedi's operations and networks
#[derive(Parser)]
#[command(name = "cargo bench --")]
struct Args {
    /// Parts of case names; with none all are measured
    names: Vec<String>,
    /// A JSON line a case: name, seconds of each run, GFLOP/s
    #[arg(long)]
    json: bool,
    /// Seconds that a case is repeated for, three times at least
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS")]
    seconds: f64,
    /// Names of all cases
    #[arg(long)]
    list: bool,
    /// Time by operation of the SD1.4 U-Net's forward pass
    #[arg(long)]
    profile: bool,
    /// What the CPU's multiply-adds reach by themselves, in f32 and bf16
    #[arg(long)]
    instructions: bool,
    /// Profile: images of a set; 1 is Stable Diffusion itself
    #[arg(long, default_value_t = 1, value_name = "N")]
    images: usize,
    /// Profile: side of the pictures in pixels, a multiple of 64
    #[arg(long, default_value_t = 512, value_name = "PIXELS")]
    size: usize,
    /// cpu, cuda or cuda:N; on a GPU the cases of benches/gpu_cases.json are measured, in bf16
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: String,
    /// Answer requests on stdin, a JSON line each
    #[arg(long)]
    serve: bool,
    /// Cargo's own
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    ops::fit_threads(std::thread::available_parallelism().ok().map(usize::from));
    ops::keep_freed_memory();
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report::error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    place::settle(&args.device)?;
    let patience = Patience { seconds: args.seconds };
    if args.serve {
        return serve::serve();
    }
    if args.instructions {
        return instructions::instructions();
    }
    if args.profile {
        ensure!(args.size > 0 && args.size.is_multiple_of(64), "--size {}: not a multiple of 64", args.size);
        ensure!(args.images > 0, "--images 0: a set holds at least one image");
        return profile::profile(SetShape::new(1, args.images), args.size, patience);
    }
    let is_named = |name: &str| args.names.is_empty() || args.names.iter().any(|part| name.contains(part.as_str()));
    let cases: Vec<_> = case::all()?.into_iter().filter(|case| is_named(&case.name)).collect();
    ensure!(!cases.is_empty(), "{}: no case has this in its name; see --list", args.names.join(", "));
    for case in cases {
        if args.list {
            report::result(&case.name)?;
            continue;
        }
        let measured = match measure(&case.work, patience) {
            Ok(measured) => measured,
            // Not every case is built yet for every number format; the others are still worth knowing.
            Err(error) => {
                report::warn(format!("{}: {error:#}", case.name));
                continue;
            }
        };
        let gflops = case.work.flops().map(|flops| flops / measured.median / 1e9);
        report::result(match (args.json, gflops) {
            (true, _) => json!({"case": case.name, "seconds": measured.seconds, "gflops": gflops}).to_string(),
            (false, Some(gflops)) => {
                format!("{:<70}{:>12.3} ms{gflops:>8.0} GFLOP/s", case.name, measured.median * 1e3)
            }
            (false, None) => format!("{:<70}{:>12.3} ms", case.name, measured.median * 1e3),
        })?;
    }
    Ok(())
}

/// The work in memory, ready to be done again and again.
fn prepare(work: &Work) -> Result<Run> {
    match work {
        Work::Unet { .. }
        | Work::TrainStep { .. }
        | Work::VaeDecode { .. }
        | Work::TextEncoder { .. }
        | Work::Sample { .. } => networks::prepare(work),
        _ => operations::prepare(work),
    }
}

/// How long a work is repeated.
#[derive(Clone, Copy)]
struct Patience {
    seconds: f64,
}

struct Measured {
    /// Of each run, in order.
    seconds: Vec<f64>,
    median: f64,
    fastest: f64,
}

/// Runs a work once to warm up, then at least three times.
fn measure(work: &Work, patience: Patience) -> Result<Measured> {
    let mut run = prepare(work)?;
    run()?;
    let limit = Duration::from_secs_f64(patience.seconds.max(0.0));
    let started = Instant::now();
    let mut seconds = Vec::new();
    while seconds.len() < 3 || started.elapsed() < limit {
        seconds.push(run()?);
    }
    let mut sorted = seconds.clone();
    sorted.sort_by(f64::total_cmp);
    Ok(Measured { median: sorted[sorted.len() / 2], fastest: sorted[0], seconds })
}

//! How fast training data is read, decoded and turned into the network's numbers, without a network: one side of
//! `scripts/bench_data.py`.
//!
//! `cargo bench --bench data -- --source 'shards/{00000..00003}.tar'` prints images a second; with `--serve` each line on stdin
//! is a turn of so many seconds, and its answer a JSON line.

use std::io::BufRead as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use candle_core::Device;
use clap::Parser;
use jedi::data::{
    DatasetSource, Feed, FeedSettings, Layout, MixedSource, Mixture, NothingKnown, SetSource, tensor_from_images,
};
use jedi::{ops, report};
use serde_json::json;

/// Measures data loading alone
#[derive(Parser)]
#[command(name = "cargo bench --bench data --")]
struct Args {
    /// Folder, tar or tars by a pattern, of strips
    #[arg(long)]
    source: String,
    /// Side of the training pictures in pixels
    #[arg(long, default_value_t = 512, value_name = "PIXELS")]
    size: u32,
    /// Images of a set
    #[arg(long, default_value_t = 3, value_name = "N")]
    images: usize,
    /// Images a step
    #[arg(long, default_value_t = 24, value_name = "N")]
    batch: usize,
    /// Threads that decode
    #[arg(long, default_value_t = 2, value_name = "N")]
    workers: usize,
    /// Seconds of a turn
    #[arg(long, default_value_t = 5.0, value_name = "SECONDS")]
    seconds: f64,
    /// Answer turns asked for on stdin
    #[arg(long)]
    serve: bool,
    /// Cargo's own
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    // As the program itself does.
    ops::keep_freed_memory();
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report::error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let source = Arc::new(DatasetSource::open(&args.source, Layout::Sets, args.size)?);
    if !args.serve {
        let (images, seconds) = turn(args, source, args.seconds)?;
        return Ok(report::result(format!("{:.1} images/s", images as f64 / seconds))?);
    }
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let seconds: f64 = line.trim().parse().with_context(|| format!("{line}: not a number of seconds"))?;
        let (images, seconds) = turn(args, source.clone(), seconds)?;
        report::result(json!({"images": images, "seconds": seconds}).to_string())?;
    }
    Ok(())
}

/// Images made into tensors in about so many seconds, and the seconds; nothing is made ahead before the clock starts.
fn turn(args: &Args, source: Arc<dyn SetSource>, seconds: f64) -> Result<(usize, f64)> {
    let mixed = MixedSource { name: "strips".into(), source, weight: 1.0, set_sizes: Some(vec![args.images]) };
    let (on_broken, warn) = (Arc::new(|_: &_| {}), Arc::new(|message: &str| report::warn(message)));
    let mixture = Mixture { sources: vec![mixed], max_bad_fraction: 0.0, workers: args.workers, on_broken, warn };
    let loader = mixture.loader(0, args.batch, &[])?;
    let mut feed = Feed::new(mixture, loader, FeedSettings { seed: 0, size: args.size, masks: false }, NothingKnown);
    let (started, mut n_images) = (Instant::now(), 0);
    for step in 0.. {
        let mut images = vec![];
        for fed in feed.sets(step, 0..args.batch / args.images)? {
            images.extend(fed.set.and_then(|set| set.images).context("a set without pictures")?);
        }
        let tensor = tensor_from_images(&images, &Device::Cpu)?; // [b·n, 3, h, w]
        ensure!(tensor.dim(0)? == args.batch, "a set of another size");
        n_images += args.batch;
        if started.elapsed().as_secs_f64() >= seconds {
            break;
        }
    }
    Ok((n_images, started.elapsed().as_secs_f64()))
}

//! Where the time of an SD1.4 U-Net's forward pass goes: every operation of it timed alone at its shapes, against the
//! whole pass. What is left over lies between the operations (allocation, caches that the one before left cold).

use std::collections::BTreeMap;

use anyhow::Result;
use jedi::report;
use jedi::shape::SetShape;

use super::case::{Model, Pass, Precision, Work};
use super::networks::unet_config;
use super::walk::unet_works;
use super::{Measured, Patience, measure};

/// Matrix products whose best is called the peak: `ops::linear`, the shapes where it is fastest.
const PEAK_PRODUCTS: [(usize, usize, usize); 3] = [(2048, 2048, 2048), (1024, 1280, 1280), (4096, 1280, 1280)];

/// Prints the profile of one pass over `shape` of pictures of `size` pixels.
pub fn profile(shape: SetShape, size: usize, patience: Patience) -> Result<()> {
    let peak = peak(patience)?;
    report::result(format!("matrix product: {:.0} GFLOP/s, called peak\n", peak / 1e9))?;
    let mut rows = Vec::new();
    for (work, count) in unet_works(&unet_config(Model::Sd14)?, shape, size / 8)? {
        let Measured { median, .. } = measure(&work, patience)?;
        rows.push(Row { count, seconds: median * count as f64, work });
    }
    rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    let sum: f64 = rows.iter().map(|row| row.seconds).sum();
    let head = format!("{:>9}{:>7}{:>9}{:>7}", "ms", "share", "GFLOP/s", "peak");
    report::result(format!("{:<58}{:>6}{:>9}{head}", "operation", "times", "ms each"))?;
    for row in &rows {
        let each = row.seconds / row.count as f64;
        let name = format!("{} {}", row.work.kind(), row.work.shapes());
        let figures = figures(row.seconds, sum, row.flops(), peak);
        report::result(format!("{name:<58}{:>6}{:>9.2}{figures}", row.count, each * 1e3))?;
    }

    let mut kinds: BTreeMap<&str, (usize, f64, f64)> = BTreeMap::new();
    for row in &rows {
        let (count, seconds, flops) = kinds.entry(row.work.kind()).or_default();
        (*count, *seconds, *flops) = (*count + row.count, *seconds + row.seconds, *flops + row.flops());
    }
    let mut kinds: Vec<_> = kinds.into_iter().collect();
    kinds.sort_by(|(_, a), (_, b)| b.1.total_cmp(&a.1));
    report::result(format!("\n{:<20}{:>6}{head}", "kind", "times"))?;
    for (kind, (count, seconds, flops)) in kinds {
        report::result(format!("{kind:<20}{count:>6}{}", figures(seconds, sum, flops, peak)))?;
    }

    let (model, dtype) = (Model::Sd14, Precision::F32);
    let SetShape { sets, images } = shape;
    let whole = measure(
        &Work::Unet { model, sets, images, size, pass: Pass::Forward, dtype, checkpointing: false, update: false },
        patience,
    )?
    .median;
    let flops: f64 = rows.iter().map(Row::flops).sum();
    report::result(format!("\n{:<26}{}", "sum of the operations", figures(sum, sum, flops, peak)))?;
    report::result(format!("{:<26}{}", "whole forward pass", figures(whole, sum, flops, peak)))?;
    report::result(format!("{:<26}{}", "at peak", figures(flops / peak, sum, flops, peak)))?;
    Ok(())
}

struct Row {
    work: Work,
    count: usize,
    /// Of all `count`.
    seconds: f64,
}

impl Row {
    fn flops(&self) -> f64 {
        self.work.flops().unwrap_or(0.0) * self.count as f64
    }
}

/// Milliseconds, share of `sum`, GFLOP/s, share of the peak; the last two only where there are products.
fn figures(seconds: f64, sum: f64, flops: f64, peak: f64) -> String {
    let share = format!("{:>9.1}{:>6.1}%", seconds * 1e3, 100.0 * seconds / sum);
    if flops == 0.0 {
        return share;
    }
    let rate = flops / seconds;
    format!("{share}{:>9.0}{:>6.0}%", rate / 1e9, 100.0 * rate / peak)
}

/// The best rate of a matrix product, in operations a second.
fn peak(patience: Patience) -> Result<f64> {
    let mut best: f64 = 0.0;
    for (rows, inputs, outputs) in PEAK_PRODUCTS {
        let work = Work::Linear { rows, inputs, outputs, pass: Pass::Forward };
        let Measured { fastest, .. } = measure(&work, patience)?;
        best = best.max(work.flops().unwrap_or(0.0) / fastest);
    }
    Ok(best)
}

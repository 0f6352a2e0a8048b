//! What a run will take: memory by what it is for, and time. Memory is found by trials of the networks themselves on small
//! inputs: for every operation forward and back, what is held grows with the number of sets and with the area, in straight
//! lines that three trials fix.

use std::time::Instant;

use anyhow::Result;
use candle_core::{Device, Tensor};

use super::objective::Objective;
use super::optimizer::Optimizer;
use super::settings::{OnHost, TrainConfig};
use super::share::Share;
use super::trainer::{parts, pass};
use crate::ops::{self, Gradients, resident_bytes, trace_memory};

/// What an objective holds and computes, as far as memory and time depend on it.
#[derive(Clone, Debug)]
pub struct Footprint {
    /// Bytes of weights that are not trained, the VAE's included.
    pub untrained_bytes: u64,
    /// Bytes that what is remembered of the data will grow to.
    pub cache_bytes: u64,
    /// Sets of the data.
    pub n_sets: usize,
    /// Pictures in the largest sets that are trained on.
    pub images: usize,
    /// Side of what the networks see, and the smallest side of which it must be a multiple.
    pub side: usize,
    /// See `side`.
    pub smallest_side: usize,
    /// The same two for what is done to a set before it is trained on (encoding); None: nothing is.
    pub preparation: Option<(usize, usize)>,
}

/// Bytes by what they are for.
#[derive(Clone, Copy, Debug)]
pub struct MemoryPlan {
    /// All networks.
    pub weights: u64,
    /// Of the trained parameters.
    pub gradients: u64,
    /// Moments and averaged weights, where the parameters are.
    pub optimizer: u64,
    /// And those that are kept in the host's memory while the parameters are on a GPU.
    pub optimizer_on_host: u64,
    /// What a step holds beside all of these at its worst moment; None where it was not tried (on a GPU).
    pub activations: Option<u64>,
    /// The copy that checkpoints are written from.
    pub snapshot: u64,
    /// Remembered data.
    pub cache: u64,
    /// The program, and all else that is there already.
    pub rest: u64,
}

impl MemoryPlan {
    /// For a run whose networks are there, but no optimizer yet, and for a rank with its own share of every batch. On the CPU
    /// it tries the networks, which takes about as long as a step of a few pictures at most.
    pub fn of(config: &TrainConfig, objective: &mut dyn Objective, own: Share, device: &Device) -> Result<Self> {
        let trained: u64 = objective.parameters().values().map(|var| bytes_of(var.as_tensor())).sum();
        let footprint = objective.footprint();
        let averages = if config.optimizer.ema_decay > 0.0 { trained } else { 0 };
        let all_moments = 2 * trained + averages;
        let is_sharded = config.run.shard_optimizer && own.count > 1;
        let owned = |bytes: u64| if is_sharded { bytes / own.count as u64 } else { bytes };
        let optimizer_on_host = match config.optimizer.on_host {
            _ if device.is_cpu() => 0,
            OnHost::Nothing => 0,
            OnHost::Averages => owned(averages),
            OnHost::All => owned(all_moments),
        };
        let optimizer = owned(all_moments) - optimizer_on_host;
        let weights = trained + footprint.untrained_bytes;
        // Moments and averages are made later.
        let own_weights = if device.is_cpu() { weights } else { 0 };
        let rest = resident_bytes().map_or(0, |resident| resident.saturating_sub(own_weights));
        let snapshot = match (own.index, config.run.save_beside, is_sharded) {
            (0, true, _) => trained + all_moments,
            // The first rank writes the moments of all.
            (0, false, true) => all_moments,
            _ => 0,
        };
        let (step, is_in_parts) = (0, parts(objective, 0, own, config.run.micro_batch) > 1);
        let n_sets = objective.shape(step).total().div_ceil(footprint.images).div_ceil(own.count);
        let sets = match config.run.micro_batch {
            0 => n_sets,
            images => (images / footprint.images).clamp(1, n_sets),
        };
        let activations = match device {
            Device::Cpu => {
                let (side, smallest) = (footprint.side, footprint.smallest_side);
                let mut at_step = extrapolated(sets, side, smallest, |sets, side| {
                    let (done, trace) = trace_memory(|| Ok(ops::backward(objective.trial_loss(sets, side)?)?));
                    done.map(|_: Gradients| trace)
                })?;
                // The gradients of the parts before are held meanwhile.
                at_step = (at_step + if is_in_parts { trained } else { 0 }).saturating_sub(trained);
                let before = match footprint.preparation {
                    None => 0,
                    Some((side, smallest)) => extrapolated(1, side, smallest, |_, side| {
                        let (done, trace) = trace_memory(|| objective.trial_preparation(side));
                        done.map(|()| trace)
                    })?,
                };
                Some(at_step.max(before.saturating_sub(trained)))
            }
            _ => None,
        };
        let (gradients, cache) = (trained, footprint.cache_bytes);
        Ok(Self { weights, gradients, optimizer, optimizer_on_host, activations, snapshot, cache, rest })
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let mut near = vec![("weights", self.weights), ("gradients", self.gradients), ("optimizer", self.optimizer)];
        let far = [("checkpoint copy", self.snapshot), ("cache", self.cache), ("program", self.rest)];
        let total = |parts: &[(&str, u64)]| gigabytes(parts.iter().map(|(_, bytes)| bytes).sum());
        let named = |parts: &[(&str, u64)]| -> String {
            parts.iter().map(|(name, bytes)| format!("{name} {}", gigabytes(*bytes))).collect::<Vec<_>>().join(", ")
        };
        let Some(activations) = self.activations else {
            let far = [vec![("optimizer", self.optimizer_on_host)], far.to_vec()].concat();
            return format!(
                "memory plan: {} on the GPU, and activations, which are not known before the first step: {}; {} in the host's \
                 memory: {}",
                total(&near),
                named(&near),
                total(&far),
                named(&far)
            );
        };
        near.push(("activations", activations));
        near.extend(far);
        format!("memory plan: {} in all: {}", total(&near), named(&near))
    }
}

fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
}

/// Bytes of tensors together.
pub fn total_bytes<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> u64 {
    tensors.into_iter().map(bytes_of).sum()
}

/// `1.234 GB` (10⁹ bytes).
pub fn gigabytes(bytes: u64) -> String {
    format!("{:.3} GB", bytes as f64 / 1e9)
}

/// The highest of what `trial(sets, side)` tells for each of its operations, at a number of sets and a side that are not
/// tried themselves if they are large.
fn extrapolated(
    sets: usize,
    side: usize,
    smallest: usize,
    mut trial: impl FnMut(usize, usize) -> Result<Vec<usize>>,
) -> Result<u64> {
    /// Large enough that the kernels are those of large inputs.
    const SIDE: usize = 16;
    let large = (2 * SIDE.next_multiple_of(smallest)).min(side);
    let small = (large / 2 / smallest * smallest).max(smallest.min(large));
    // Buffers that stay are made at the first use.
    trial(1, small)?;
    let traces = [trial(1, small)?, trial(1, large)?, trial(2, small)?];
    let length = traces.iter().map(Vec::len).min().unwrap_or(0);
    let is_alike = traces.iter().all(|trace| trace.len() == length);
    let at = |trace: &Vec<usize>, i: usize| match is_alike {
        true => trace[i] as f64,
        // The operations are not the same ones: what is left are the traces' own highest points.
        false => trace.iter().copied().max().unwrap_or(0) as f64,
    };
    let area = |side: usize| (side * side) as f64;
    let grown = match large == small {
        true => 0.0,
        false => (area(side) - area(small)) / (area(large) - area(small)),
    };
    let value = |i: usize| {
        let [one, wide, two] = traces.each_ref().map(|trace| at(trace, i));
        one + (sets - 1) as f64 * (two - one) + sets as f64 * (wide - one) * grown
    };
    Ok((0..length).map(value).fold(0.0, f64::max) as u64)
}

/// How long steps take.
#[derive(Clone, Copy, Debug)]
pub struct TimePlan {
    /// Of a step.
    pub secs_per_step: f64,
    /// Passes forward and back that were timed.
    pub n_passes: usize,
    /// Images in each.
    pub images: usize,
}

impl TimePlan {
    /// Times a part of a rank's share of the first step until it has run three times behind a first one, or for 20 seconds, and
    /// one update. The weights move by it: what was trialled is not to be trained on.
    pub fn of(
        config: &TrainConfig,
        objective: &mut dyn Objective,
        own: Share,
        optimizer: &mut Optimizer,
    ) -> Result<Self> {
        const SECS: f64 = 20.0;
        let shape = objective.shape(0);
        let count = parts(objective, 0, own, config.run.micro_batch);
        let part = own.part(0, count);
        let images = part.range(shape.sets).len() * shape.images;
        let (began, mut passes, mut last) = (Instant::now(), vec![], None);
        while passes.len() < 4 && (passes.is_empty() || began.elapsed().as_secs_f64() < SECS) {
            let start = Instant::now();
            last = Some(pass(objective, 0, part)?.1);
            passes.push(start.elapsed().as_secs_f64());
        }
        objective.set_share(own);
        let start = Instant::now();
        last.map(|gradients| optimizer.update(gradients)).transpose()?;
        let update = start.elapsed().as_secs_f64();
        // The first one reads data and makes buffers.
        let timed = if passes.len() > 1 { &passes[1..] } else { &passes[..] };
        let mean = timed.iter().sum::<f64>() / timed.len() as f64;
        let own_images = own.range(shape.sets).len() * shape.images;
        let secs_per_step = mean * own_images as f64 / images as f64 + update;
        Ok(Self { secs_per_step, n_passes: timed.len(), images })
    }

    /// One line for people.
    pub fn describe(&self, steps: u64) -> String {
        format!(
            "time: {} for {steps} steps of {:.3} s, from {} timed passes of {} images and an update; validation, checkpoints, \
             previews and what processes send each other come on top",
            duration(self.secs_per_step * steps as f64),
            self.secs_per_step,
            self.n_passes,
            self.images
        )
    }
}

/// `3 d 4 h`, `2 h 5 min`, `7 min 3 s` or `42 s`.
pub fn duration(secs: f64) -> String {
    let secs = secs.round().max(0.0) as u64;
    let (minutes, hours, days) = (secs / 60, secs / 3600, secs / 86_400);
    match secs {
        0..60 => format!("{secs} s"),
        60..3600 => format!("{minutes} min {} s", secs % 60),
        3600..86_400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn straight_lines_are_followed_and_the_highest_taken() {
        // Two operations: one that grows with the area, one that does not.
        let trial = |sets: usize, side: usize| Ok(vec![100 + sets * (10 + 3 * side * side), 5000 + 7 * sets]);
        assert_eq!(extrapolated(5, 64, 4, trial).unwrap(), (100 + 5 * (10 + 3 * 64 * 64)) as u64);
        assert_eq!(extrapolated(1, 8, 8, trial).unwrap(), 5007);
        // Where the side itself is tried.
        assert_eq!(extrapolated(3, 8, 4, |sets, side| Ok(vec![sets * side * side])).unwrap(), 3 * 64);
    }

    #[test]
    fn what_is_on_a_gpu_is_told_apart_from_what_is_in_the_hosts_memory() {
        let gb = 1_000_000_000;
        let plan = MemoryPlan {
            weights: 4 * gb,
            gradients: 3 * gb,
            optimizer: 6 * gb,
            optimizer_on_host: 0,
            activations: Some(5 * gb),
            snapshot: 12 * gb,
            cache: 2 * gb,
            rest: gb,
        };
        assert!(
            plan.describe().starts_with("memory plan: 33.000 GB in all: weights 4.000 GB, "),
            "{}",
            plan.describe()
        );
        let plan = MemoryPlan { optimizer: 0, optimizer_on_host: 9 * gb, activations: None, ..plan };
        let text = plan.describe();
        assert!(text.starts_with("memory plan: 7.000 GB on the GPU, and activations, "), "{text}");
        assert!(
            text.contains("; 24.000 GB in the host's memory: optimizer 9.000 GB, checkpoint copy 12.000 GB, "),
            "{text}"
        );
    }

    #[test]
    fn durations_are_read_at_a_glance() {
        let texts = [0.4, 42.0, 423.0, 7500.0, 273_700.0].map(duration);
        assert_eq!(texts, ["0 s", "42 s", "7 min 3 s", "2 h 5 min", "3 d 4 h"]);
    }
}

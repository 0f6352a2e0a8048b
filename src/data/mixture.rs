//! The sources that a run mixes, and what becomes of the samples that are broken.

use std::sync::Arc;

use anyhow::{Result, anyhow};

use super::loader::{Loader, Share};
use super::sources::SetSource;
use super::store::Warn;

/// All that a run is shown.
#[derive(Clone)]
pub struct Mixture {
    /// At least one.
    pub sources: Vec<MixedSource>,
    /// Share of a source's samples that may be broken before the run ends; 0: none.
    pub max_bad_fraction: f64,
    /// Threads that decode ahead of the step; 0: half of the CPUs that the process may use.
    pub workers: usize,
    /// Hears of every broken sample once.
    pub on_broken: Arc<dyn Fn(&BrokenSample) + Send + Sync>,
    /// Hears of what else goes wrong beside the work.
    pub warn: Warn,
}

/// One source of a mixture.
#[derive(Clone)]
pub struct MixedSource {
    /// For messages.
    pub name: String,
    /// Its sets.
    pub source: Arc<dyn SetSource>,
    /// Its share of the images, over the sum of all weights.
    pub weight: f64,
    /// Images of a set; None: what the objective says.
    pub set_sizes: Option<Vec<usize>>,
}

/// A sample that could not be dealt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokenSample {
    /// The name of its source.
    pub source: String,
    /// File, cause and way out.
    pub message: String,
    /// Broken samples of this source so far, this one included.
    pub n_broken: usize,
}

impl Mixture {
    /// One source alone, of which no sample may be broken.
    pub fn of(source: Arc<dyn SetSource>) -> Self {
        let source = MixedSource { name: "data".into(), source, weight: 1.0, set_sizes: None };
        Self {
            sources: vec![source],
            max_bad_fraction: 0.0,
            workers: 0,
            on_broken: Arc::new(|_| {}),
            warn: Arc::new(|_| {}),
        }
    }

    /// The dealer of these sources; `set_sizes` for those that have none of their own.
    pub fn loader(&self, seed: u64, images_per_step: usize, set_sizes: &[usize]) -> Result<Loader> {
        let share = |mixed: &MixedSource| Share {
            n_sets: mixed.source.n_sets(),
            weight: mixed.weight,
            set_sizes: mixed.set_sizes(set_sizes).to_vec(),
            variants: mixed.source.variants(),
            runs: mixed.source.runs(),
        };
        Loader::new(seed, images_per_step, self.sources.iter().map(share).collect())
    }

    /// Refuses more broken samples of a source than are let pass: the allowed share of those met, counted as a thousand (or
    /// all that there are) before so many are met.
    pub fn check_broken(&self, mixed: &MixedSource, n_broken: usize, n_met: usize) -> Result<()> {
        let n_sets = mixed.source.n_sets();
        let n_counted = n_met.clamp(n_sets.min(1000), n_sets);
        if n_broken as f64 <= self.max_bad_fraction * n_counted as f64 {
            return Ok(());
        }
        Err(anyhow!(
            "{}: {n_broken} of {n_met} samples met are broken, more than data.max_bad_fraction = {} allows; mend or remove \
             them (`jedi inspect dataset` lists them), or allow more; the last one",
            mixed.name,
            self.max_bad_fraction
        ))
    }

    /// Sets of all sources.
    pub fn n_sets(&self) -> usize {
        self.sources.iter().map(|mixed| mixed.source.n_sets()).sum()
    }

    /// Different cuts of sets that are dealt again and again.
    pub fn n_kept(&self) -> u64 {
        self.sources.iter().map(|mixed| mixed.source.n_sets() as u64 * mixed.source.variants()).sum()
    }

    /// Threads that decode ahead.
    pub fn n_workers(&self) -> usize {
        match self.workers {
            0 => Self::workers_of(std::thread::available_parallelism().map_or(1, |n| n.get())),
            n => n,
        }
    }

    /// Threads that decode ahead by themselves where the work has so many CPUs.
    pub fn workers_of(cpus: usize) -> usize {
        (cpus / 2).max(1)
    }
}

impl MixedSource {
    /// Its own set sizes, else these.
    pub fn set_sizes<'a>(&'a self, others: &'a [usize]) -> &'a [usize] {
        self.set_sizes.as_deref().unwrap_or(others)
    }
}

impl<S: SetSource + 'static> From<Arc<S>> for Mixture {
    fn from(source: Arc<S>) -> Self {
        Self::of(source)
    }
}

//! The data of a training config, opened; and the record of samples that are broken.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};

use crate::data::{
    BrokenSample, Cut, DatasetSettings, DatasetSource, GalleryKind, GallerySettings, GallerySource, Layout,
    MixedSource, Mixture, Rules, SetSource,
};
use crate::report;
use crate::synth::toybox::ToyboxSource;
use crate::train::data_settings::{DataConfig, DataLayout, SourceConfig, TOYBOX};

/// Opens all sources; `broken` hears of samples that cannot be dealt.
pub fn mixture(data: &DataConfig, broken: &Arc<BrokenSamples>) -> Result<Mixture> {
    let mixed = |source: &SourceConfig| {
        Ok(MixedSource {
            name: source.name().to_owned(),
            source: open(source, data.size)?,
            weight: source.weight,
            set_sizes: match source.layout {
                DataLayout::Single => Some(source.set_sizes(&[]).to_vec()),
                _ => source.set_sizes.clone(),
            },
        })
    };
    let broken = broken.clone();
    Ok(Mixture {
        sources: data.all_sources().iter().map(mixed).collect::<Result<_>>()?,
        max_bad_fraction: data.max_bad_fraction,
        workers: data.workers,
        on_broken: Arc::new(move |sample| broken.add(sample)),
        warn: Arc::new(|message| report::warn(message)),
    })
}

/// Opens one source; its pictures will have `size` pixels a side.
pub fn open(config: &SourceConfig, size: u32) -> Result<Arc<dyn SetSource>> {
    let SourceConfig { variants, shuffle_window, images, apart, .. } = *config;
    let place = config.source.as_str();
    if place == TOYBOX {
        return Ok(Arc::new(ToyboxSource { seed: config.seed, sets: config.sets, images, size }));
    }
    let rules = Rules {
        caption: config.caption.clone(),
        filters: config.filters.clone(),
        min_side: config.min_side,
        max_aspect: config.max_aspect,
        cut: Cut { crop: config.crop, flip: config.flip },
    };
    let files = |layout| DatasetSettings { layout, size, rules: rules.clone(), variants, shuffle_window };
    let gallery = |kind| GallerySettings { kind, images, apart, size, rules: rules.clone(), variants, shuffle_window };
    Ok(match config.layout {
        DataLayout::Sets => Arc::new(DatasetSource::with_settings(place, files(Layout::Sets))?),
        DataLayout::Single => Arc::new(DatasetSource::with_settings(place, files(Layout::Single))?),
        DataLayout::Clips => Arc::new(GallerySource::open(place, gallery(GalleryKind::Clips))?),
        DataLayout::Views => Arc::new(GallerySource::open(place, gallery(GalleryKind::Views))?),
    })
}

/// Samples that could not be dealt: the first are told one by one, all are written down.
pub struct BrokenSamples {
    /// In the run folder.
    list: PathBuf,
    n_met: AtomicUsize,
    writing: Mutex<()>,
}

impl BrokenSamples {
    /// Told one by one; then at every doubling of their number.
    const MAX_TOLD: usize = 10;

    /// To be listed in the run folder `run`, once it is there.
    pub fn new(run: &Path) -> Arc<Self> {
        let list = run.join("broken-samples.txt");
        Arc::new(Self { list, n_met: AtomicUsize::new(0), writing: Mutex::new(()) })
    }

    fn add(&self, sample: &BrokenSample) {
        let n_met = self.n_met.fetch_add(1, Ordering::Relaxed) + 1;
        if n_met <= Self::MAX_TOLD || n_met.is_power_of_two() {
            let count = if n_met > 1 { format!(" ({n_met} so far)") } else { String::new() };
            report::warn_of_any(format!("broken, skipped: {}{count}", sample.message));
        }
        // A dry run has no folder.
        if !self.list.parent().is_some_and(Path::is_dir) {
            return;
        }
        let write = || -> Result<()> {
            let _alone = self.writing.lock().expect("no panic under the lock");
            let mut file = OpenOptions::new().create(true).append(true).open(&self.list)?;
            // In one write, so that the lines of many processes do not mix.
            Ok(file.write_all(format!("{}: {}\n", sample.source, sample.message.replace('\n', " ")).as_bytes())?)
        };
        if let Err(error) = write().with_context(|| self.list.display().to_string())
            && n_met <= Self::MAX_TOLD
        {
            report::warn_of_any(format!("broken samples cannot be listed: {error:#}"));
        }
    }

    /// What to say at the end, if there were any.
    pub fn summary(&self) -> Option<String> {
        let n_met = self.n_met.load(Ordering::Relaxed);
        (n_met > 0).then(|| format!("{n_met} broken samples were met and skipped; {} lists them", self.list.display()))
    }
}

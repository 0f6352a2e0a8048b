//! The sets of each step, read and decoded by threads ahead of it. A sample that is broken, passed over by its source's rules
//! or too small for the step is replaced by another one of its source, which follows from the seed and its position alone: what
//! is dealt depends on neither workers nor ranks.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use anyhow::{Error, Result, anyhow, ensure};

use super::ahead::Ahead;
use super::deal::{Dealt, DealtSet, Wanted};
use super::known::Known;
use super::loader::{BatchPlan, Loader, Slot, part_of};
use super::mixture::{BrokenSample, MixedSource, Mixture};
use crate::rng::Rng;

/// Other samples that are tried for one that cannot be dealt.
const MAX_TRIES: usize = 1000;
/// Decoded pictures that may wait, in bytes.
const MAX_WAITING_BYTES: u64 = 1 << 30;

/// A set of a step.
pub struct Fed {
    /// The set that is dealt: the planned one, or what replaces it.
    pub slot: Slot,
    /// None where [`Known::n_images`] said that it need not be read.
    pub set: Option<DealtSet>,
}

/// How a run is fed.
#[derive(Clone, Copy, Debug)]
pub struct FeedSettings {
    /// Of all draws.
    pub seed: u64,
    /// Side of the training pictures in pixels, which says how many may wait.
    pub size: u32,
    /// Whether masks of the subjects are wanted.
    pub masks: bool,
}

/// Deals out the steps of a mixture.
pub struct Feed {
    table: Arc<Table>,
    settings: FeedSettings,
    /// The rank that is fed, and how many there are: each gets its part of every step.
    rank: (usize, usize),
    loader: Loader,
    stream: Option<Stream>,
}

struct Stream {
    /// Step and place of the set that comes next.
    next: (u64, usize),
    sets: Ahead<Result<Fed>>,
}

/// What the workers share.
struct Table {
    mixture: Mixture,
    seed: u64,
    masks: bool,
    known: Box<dyn Known>,
    /// Sets that were met and cannot be dealt (to a step of many images), by source and number.
    unfit: Mutex<HashMap<(usize, usize), Unfit>>,
    tally: Mutex<Vec<Tally>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Unfit {
    Broken,
    PassedOver,
    /// Holds so many pictures.
    Small(usize),
}

/// Of one source.
#[derive(Clone, Copy, Default)]
struct Tally {
    n_met: usize,
    n_broken: usize,
}

impl Feed {
    /// Feeds from `loader`, which must be that of the mixture; `known` needs no decoding.
    pub fn new(mixture: Mixture, loader: Loader, settings: FeedSettings, known: impl Known + 'static) -> Self {
        let tally = Mutex::new(vec![Tally::default(); mixture.sources.len()]);
        let (FeedSettings { seed, masks, .. }, known) = (settings, Box::new(known));
        let table = Arc::new(Table { mixture, seed, masks, known, unfit: Mutex::default(), tally });
        Self { table, settings, rank: (0, 1), loader, stream: None }
    }

    /// All sets of a step.
    pub fn plan(&mut self, step: u64) -> BatchPlan {
        self.loader.plan(step)
    }

    /// The fewest sets that a step can have.
    pub fn fewest_sets(&self) -> usize {
        self.loader.fewest_sets()
    }

    /// The most images that a set of a step can hold.
    pub fn most_images(&self) -> usize {
        self.loader.images_per_step() / self.loader.fewest_sets()
    }

    /// These sets of a step, by their places in it, which must lie in this rank's part. They are ready early where they
    /// follow those asked for before.
    pub fn sets(&mut self, step: u64, places: Range<usize>) -> Result<Vec<Fed>> {
        let own = self.own(step);
        ensure!(
            own.start <= places.start && places.end <= own.end,
            "the sets {places:?} of step {step} are asked for by a rank that has {own:?}"
        );
        let mut stream = match self.stream.take() {
            Some(stream) if stream.next == (step, places.start) => stream,
            _ => self.start(step, places.start),
        };
        let sets = stream.sets.by_ref().take(places.len()).collect::<Result<Vec<Fed>>>()?;
        let is_last = places.end == own.end;
        stream.next = if is_last { (step + 1, self.own(step + 1).start) } else { (step, places.end) };
        self.stream = Some(stream);
        Ok(sets)
    }

    /// Feeds this rank of so many from now on.
    pub fn set_rank(&mut self, rank: usize, n_ranks: usize) {
        self.rank = (rank, n_ranks);
        self.stream = None;
    }

    /// The places of a step that this rank has.
    fn own(&self, step: u64) -> Range<usize> {
        let (rank, n_ranks) = self.rank;
        part_of(self.loader.shape_of(step).sets, rank, n_ranks)
    }

    /// The mixture that it feeds from.
    pub fn mixture(&self) -> &Mixture {
        &self.table.mixture
    }

    /// Whether a set may be dealt in the same cut again.
    pub fn comes_again(&self, slot: &Slot) -> bool {
        self.table.mixture.sources[slot.source].source.variants() != 0
    }

    /// A dealt set with its pictures, whatever is known of it.
    pub fn decoded(&self, slot: &Slot, n_images: usize) -> Result<DealtSet> {
        let wanted = Wanted { n_images, variant: slot.variant, is_known: None, masks: self.table.masks };
        let mixed = &self.table.mixture.sources[slot.source];
        match mixed.source.deal(slot.set_idx, wanted)? {
            Dealt::Set(set) => Ok(set),
            _ => Err(anyhow!("{}: set number {} has changed while the run used it", mixed.name, slot.set_idx)),
        }
    }

    fn start(&self, first_step: u64, first_place: usize) -> Stream {
        // One of its own, which runs ahead.
        let (mut loader, (rank, n_ranks)) = (self.loader.clone(), self.rank);
        let jobs = (first_step..).flat_map(move |step| {
            let BatchPlan { shape, slots } = loader.plan(step);
            let Range { start, end } = part_of(slots.len(), rank, n_ranks);
            let start = if step == first_step { first_place } else { start };
            slots.into_iter().skip(start).take(end - start).map(move |slot| (slot, shape.images))
        });
        let n_workers = self.table.mixture.n_workers();
        let largest = self.most_images() as u64;
        let set_bytes = 3 * u64::from(self.settings.size).pow(2) * largest;
        let two_steps = 2 * self.loader.images_per_step() as u64 / largest;
        let n_waiting = (two_steps.min(MAX_WAITING_BYTES / set_bytes) as usize).max(2 * n_workers);
        let table = self.table.clone();
        let sets = Ahead::start(n_workers, n_waiting, jobs, move |(slot, n)| table.dealt(slot, n));
        Stream { next: (first_step, first_place), sets }
    }
}

impl Table {
    fn dealt(&self, planned: Slot, n_images: usize) -> Result<Fed> {
        let mixed = &self.mixture.sources[planned.source];
        // Made when it is needed, which is seldom.
        let mut others = None;
        let mut slot = planned;
        for _ in 0..MAX_TRIES {
            if let Some(fed) = self.tried(mixed, slot, n_images)? {
                return Ok(fed);
            }
            let others = others.get_or_insert_with(|| {
                Rng::new(self.seed, &format!("replacement in source {}", planned.source), planned.position)
            });
            slot = Slot { set_idx: others.below(mixed.source.n_sets()), ..planned };
        }
        Err(anyhow!(
            "{}: none of {MAX_TRIES} samples drawn from it can be dealt to a step with sets of {n_images}; see what its \
             filters let through with `jedi inspect dataset`",
            mixed.name
        ))
    }

    /// The set, unless it cannot be dealt.
    fn tried(&self, mixed: &MixedSource, slot: Slot, n_images: usize) -> Result<Option<Fed>> {
        let place = (slot.source, slot.set_idx);
        match self.unfit.lock().expect("no panic under the lock").get(&place) {
            Some(Unfit::Small(n)) if *n >= n_images => {}
            Some(_) => return Ok(None),
            None => {}
        }
        if let Some(n) = self.known.n_images(&slot) {
            return Ok((n >= n_images).then_some(Fed { slot, set: None }));
        }
        // The content of a cut that does not come again is of no use.
        let is_known = self.known.has_content().filter(|_| mixed.source.variants() != 0);
        let wanted = Wanted { n_images, variant: slot.variant, is_known, masks: self.masks };
        let unfit = match mixed.source.deal(slot.set_idx, wanted) {
            Ok(Dealt::Set(set)) => {
                self.tally.lock().expect("no panic under the lock")[slot.source].n_met += 1;
                return Ok(Some(Fed { slot, set: Some(set) }));
            }
            Ok(Dealt::PassedOver(_)) => Unfit::PassedOver,
            Ok(Dealt::TooSmall(n)) => Unfit::Small(n),
            Err(error) => {
                self.count_broken(mixed, place, error)?;
                return Ok(None);
            }
        };
        self.unfit.lock().expect("no panic under the lock").insert(place, unfit);
        Ok(None)
    }

    fn count_broken(&self, mixed: &MixedSource, place: (usize, usize), error: Error) -> Result<()> {
        let known = self.unfit.lock().expect("no panic under the lock").insert(place, Unfit::Broken);
        if known == Some(Unfit::Broken) {
            return Ok(());
        }
        let tally = {
            let tally = &mut self.tally.lock().expect("no panic under the lock")[place.0];
            tally.n_met += 1;
            tally.n_broken += 1;
            *tally
        };
        let message = format!("{error:#}");
        let sample = BrokenSample { source: mixed.name.clone(), message, n_broken: tally.n_broken };
        (self.mixture.on_broken)(&sample);
        self.mixture.check_broken(mixed, tally.n_broken, tally.n_met).map_err(|limit| error.context(limit))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use anyhow::bail;
    use image::RgbImage;

    use super::*;
    use crate::data::{ImageSet, NothingKnown, SetSource};

    /// Sets of 1 to 4 pictures that show their own number; every seventh is broken, every fifth passed over.
    #[derive(Default)]
    struct Numbers {
        n_sets: usize,
        n_read: AtomicUsize,
    }

    impl SetSource for Numbers {
        fn n_sets(&self) -> usize {
            self.n_sets
        }

        fn read(&self, set_idx: usize) -> Result<ImageSet> {
            self.n_read.fetch_add(1, Ordering::Relaxed);
            if set_idx % 7 == 3 {
                bail!("number {set_idx} is broken");
            }
            let n_images = 1 + set_idx % 4;
            let images = vec![RgbImage::from_pixel(1, 1, image::Rgb([set_idx as u8; 3])); n_images];
            Ok(ImageSet { images, captions: vec![set_idx.to_string(); n_images], ..Default::default() })
        }

        fn deal(&self, set_idx: usize, wanted: Wanted) -> Result<Dealt> {
            let set = self.read(set_idx)?;
            if set_idx % 5 == 2 {
                return Ok(Dealt::PassedOver("a five".into()));
            }
            Ok(super::super::deal::deal_whole(set, wanted))
        }
    }

    fn mixture(workers: usize, max_bad_fraction: f64) -> (Mixture, Arc<Mutex<Vec<BrokenSample>>>) {
        let heard = Arc::new(Mutex::new(vec![]));
        let told = heard.clone();
        let sources = [40, 90].map(|n_sets| MixedSource {
            name: format!("numbers to {n_sets}"),
            source: Arc::new(Numbers { n_sets, ..Default::default() }),
            weight: 1.0,
            set_sizes: Some(if n_sets == 40 { vec![1, 2] } else { vec![2, 4] }),
        });
        let on_broken = Arc::new(move |sample: &BrokenSample| told.lock().unwrap().push(sample.clone()));
        (Mixture { sources: sources.into(), max_bad_fraction, workers, on_broken, warn: Arc::new(|_| {}) }, heard)
    }

    fn feed(mixture: Mixture, rank: (usize, usize)) -> Feed {
        let loader = mixture.loader(1, 8, &[]).unwrap();
        let mut feed = Feed::new(mixture, loader, FeedSettings { seed: 1, size: 1, masks: false }, NothingKnown);
        feed.set_rank(rank.0, rank.1);
        feed
    }

    fn caption(fed: &Fed) -> String {
        fed.set.as_ref().unwrap().captions[0].clone()
    }

    /// Images a set, and all sets of the rank.
    fn own_sets(feed: &mut Feed, step: u64) -> Result<(usize, Vec<Fed>)> {
        let own = feed.own(step);
        Ok((feed.plan(step).shape.images, feed.sets(step, own)?))
    }

    fn captions(feed: &mut Feed, steps: impl Iterator<Item = u64>) -> Vec<Vec<String>> {
        steps.map(|step| own_sets(feed, step).unwrap().1.iter().map(caption).collect()).collect()
    }

    #[test]
    fn what_is_dealt_depends_on_neither_workers_nor_ranks_nor_where_the_run_began() {
        let whole = captions(&mut feed(mixture(1, 1.0).0, (0, 1)), 0..40);
        for workers in [2, 5] {
            assert_eq!(captions(&mut feed(mixture(workers, 1.0).0, (0, 1)), 0..40), whole);
        }
        for n_ranks in [2, 3] {
            let mut joined = vec![vec![]; 40];
            for rank in 0..n_ranks {
                let part = captions(&mut feed(mixture(2, 1.0).0, (rank, n_ranks)), 0..40);
                joined.iter_mut().zip(part).for_each(|(step, part)| step.extend(part));
            }
            assert_eq!(joined, whole);
        }
        let mut late = feed(mixture(2, 1.0).0, (0, 1));
        assert_eq!(captions(&mut late, 25..30), whole[25..30]);
        assert_eq!(captions(&mut late, 3..5), whole[3..5]);
        // Piece by piece, as micro-batches ask.
        for (step, whole) in whole.iter().enumerate().skip(5).take(10) {
            let (n_sets, middle) = (whole.len(), whole.len() / 3);
            let pieces = [0..middle, middle..n_sets].map(|places| late.sets(step as u64, places).unwrap());
            assert_eq!(pieces.iter().flatten().map(caption).collect::<Vec<_>>(), *whole);
        }
        assert!(feed(mixture(1, 1.0).0, (1, 2)).sets(0, 0..1).is_err());
    }

    #[test]
    fn only_sets_that_fit_are_dealt_and_each_broken_one_is_told_once() {
        let (mixture, heard) = mixture(3, 1.0);
        let mut feed = feed(mixture, (0, 1));
        for step in 0..200 {
            let (images, sets) = own_sets(&mut feed, step).unwrap();
            for Fed { slot, set } in sets {
                let set = set.unwrap();
                assert!(set.n_images() >= images && slot.set_idx % 7 != 3 && slot.set_idx % 5 != 2);
                assert_eq!(set.images.unwrap()[0].get_pixel(0, 0).0[0] as usize, slot.set_idx);
            }
        }
        drop(feed);
        let mut messages: Vec<String> = heard.lock().unwrap().iter().map(|s| s.source.clone() + &s.message).collect();
        // 3, 10 … 38 and 3 … 87.
        assert_eq!(messages.len(), 6 + 13);
        messages.sort();
        messages.dedup();
        assert_eq!(messages.len(), 6 + 13);
    }

    #[test]
    fn too_many_broken_samples_end_the_run_with_the_last_one_named() {
        let (mixture, heard) = mixture(2, 0.05);
        let mut feed = feed(mixture, (0, 1));
        let error = (0..200).find_map(|step| own_sets(&mut feed, step).err()).unwrap();
        let message = format!("{error:#}");
        assert!(message.contains("data.max_bad_fraction") && message.contains("is broken"), "{message}");
        // 5 % of 40 are 2, of 90 are 4.
        assert!(heard.lock().unwrap().len() >= 3);
    }

    #[test]
    fn a_source_that_nothing_can_be_dealt_from_is_told() {
        struct Small;
        impl SetSource for Small {
            fn n_sets(&self) -> usize {
                3
            }
            fn read(&self, _: usize) -> Result<ImageSet> {
                Ok(ImageSet { images: vec![RgbImage::new(1, 1)], captions: vec![String::new()], ..Default::default() })
            }
        }
        let mut mixture = Mixture::from(Arc::new(Small));
        mixture.sources[0].set_sizes = Some(vec![2]);
        let error = feed(mixture, (0, 1)).sets(0, 0..1).err().unwrap().to_string();
        assert!(error.contains("can be dealt to a step with sets of 2"), "{error}");
    }
}

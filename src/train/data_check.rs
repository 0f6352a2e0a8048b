//! Looks through the data before the first step, so that a run does not stumble over a set when it is first dealt, hours
//! later. Headers, captions and JSON are read; a picture that is broken behind its header is still found only then.

use anyhow::{Context as _, Error, Result, anyhow, bail};
use rayon::prelude::*;

use crate::data::{ImageSet, MixedSource, Mixture, SetOutline, SetSource};
use crate::invalid::invalid;
use crate::model::Tokenizer;

/// Of larger sources every second, third … set is looked at: a start may take seconds, not an hour.
const MAX_CHECKED: usize = 200_000;
/// Broken samples, and cut captions, that are told one by one.
const MAX_TOLD: usize = 10;

/// How many pictures a source's sets must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pictures {
    /// With fewer a set is never dealt.
    pub least: usize,
    /// With fewer a set is dealt to some steps alone.
    pub most: usize,
}

impl Pictures {
    /// Those that steps of these set sizes need.
    pub fn of(set_sizes: &[usize]) -> Self {
        let least = set_sizes.iter().copied().min().unwrap_or(1);
        Self { least, most: set_sizes.iter().copied().max().unwrap_or(least) }
    }
}

/// What was found in one source.
#[derive(Default)]
struct Found {
    n_checked: usize,
    broken: Vec<Error>,
    /// Broken samples that have no number, in shards that cannot be read.
    n_lost: usize,
    unwanted: Vec<String>,
    too_small: Vec<String>,
    n_smaller: usize,
    cuts: Vec<String>,
}

/// Refuses a mixture with a source that cannot be trained on, or of which too much is broken, by the first sample's name; returns
/// what the user should know: what is skipped, and which captions `tokenizer` cuts.
pub fn check_mixture(
    mixture: &Mixture,
    pictures: impl Fn(&MixedSource) -> Pictures,
    tokenizer: Option<&Tokenizer>,
) -> Result<Vec<String>> {
    let mut notices = vec![];
    for mixed in &mixture.sources {
        let needed = pictures(mixed);
        let found = look_through(mixed, needed, tokenizer);
        check(mixture, mixed, needed, &found)?;
        notices.extend(found.notices(&mixed.name, needed));
    }
    Ok(notices)
}

/// How many pictures the sets of a source hold, by the first that can be read.
pub fn n_images_of_first(source: &dyn SetSource) -> Result<usize> {
    Ok(first_set(source)?.images.len())
}

/// Refuses a mixture of which no source has masks, by the first set of each that can be read.
pub fn check_masks(mixture: &Mixture) -> Result<()> {
    for mixed in &mixture.sources {
        if !first_set(mixed.source.as_ref())?.masks.is_empty() {
            return Ok(());
        }
    }
    Err(invalid(
        "joint.subject_weight: the data have no masks to tell where the subjects are (KEY.0.mask.png, KEY.1.mask.png, … beside \
         the pictures of a set); make some with `jedi synth-data --masks` or `sets.masks`, or leave it at 1",
    ))
}

fn first_set(source: &dyn SetSource) -> Result<ImageSet> {
    /// What is broken beyond these is told by the check of the whole source.
    const MAX_TRIES: usize = 100;
    let mut read = (0..source.n_sets().min(MAX_TRIES)).map(|set_idx| source.read(set_idx));
    let first = read.next().context("the data source holds no sets")?;
    first.or_else(|error| read.find(Result::is_ok).unwrap_or(Err(error)))
}

fn look_through(mixed: &MixedSource, needed: Pictures, tokenizer: Option<&Tokenizer>) -> Found {
    let source = mixed.source.as_ref();
    let mut found = Found::default();
    for fault in source.faults() {
        found.n_lost += fault.n_lost - 1;
        found.broken.push(anyhow!("{}", fault.message));
    }
    if matches!(source.outline(0), Ok(None)) {
        return found;
    }
    let stride = source.n_sets().div_ceil(MAX_CHECKED).max(1);
    let look = |set_idx| -> Result<Option<(SetOutline, Vec<String>)>> {
        let Some(set) = source.outline(set_idx)? else { return Ok(None) };
        let cuts = cut_captions(&set, tokenizer)?;
        Ok(Some((set, cuts)))
    };
    let looked_at: Vec<_> = (0..source.n_sets()).into_par_iter().step_by(stride).map(look).collect();
    found.n_checked = looked_at.len();
    for each in looked_at {
        match each {
            Ok(Some((set, cuts))) => found.add(&set, cuts, needed),
            Ok(None) => {}
            Err(error) => found.broken.push(error),
        }
    }
    found
}

/// The captions of a set whose ends the text encoder does not see.
fn cut_captions(set: &SetOutline, tokenizer: Option<&Tokenizer>) -> Result<Vec<String>> {
    let (Some(tokenizer), label) = (tokenizer, &set.label) else { return Ok(vec![]) };
    let mut cuts = vec![];
    for (idx, caption) in set.captions.iter().enumerate() {
        cuts.extend(tokenizer.encode(caption)?.cut.map(|cut| {
            format!("{label}: caption {idx} is too long for the text encoder, its end is not used: {cut:?}")
        }));
    }
    Ok(cuts)
}

/// Refuses what cannot be trained on.
fn check(mixture: &Mixture, mixed: &MixedSource, needed: Pictures, found: &Found) -> Result<()> {
    let n_broken = found.broken.len() + found.n_lost;
    if let Some(first) = found.broken.first() {
        let n_met = found.n_checked + found.n_lost;
        if mixture.check_broken(mixed, n_broken, n_met).is_err() {
            let allowed = format!("data.max_bad_fraction = {} allows fewer", mixture.max_bad_fraction);
            match n_broken {
                1 => bail!("{first:#} ({allowed})"),
                _ => bail!("{first:#} (the first of {n_broken} broken sets among {n_met}; {allowed})"),
            }
        }
    }
    let name = &mixed.name;
    if let [first, ..] = &found.unwanted[..]
        && found.unwanted.len() == found.n_checked
    {
        bail!("{name}: its filters let nothing through; {first}");
    }
    if let [first, ..] = &found.too_small[..]
        && found.too_small.len() + found.unwanted.len() + found.broken.len() >= found.n_checked
    {
        bail!("{name}: no set holds {} pictures, as the set sizes ask for; {first}", needed.least);
    }
    Ok(())
}

impl Found {
    fn add(&mut self, set: &SetOutline, cuts: Vec<String>, needed: Pictures) {
        let SetOutline { label, n_images, unwanted, .. } = set;
        if let Some(reason) = unwanted {
            return self.unwanted.push(format!("{label}: {reason}"));
        }
        if *n_images < needed.least {
            self.too_small.push(format!("{label} holds {n_images}"));
        } else if *n_images < needed.most {
            self.n_smaller += 1;
        }
        self.cuts.extend(cuts);
    }

    fn notices(self, name: &str, needed: Pictures) -> Vec<String> {
        let (n_checked, n_broken) = (self.n_checked, self.broken.len() + self.n_lost);
        let mut notices: Vec<String> =
            self.broken.iter().take(MAX_TOLD).map(|error| format!("broken, skipped: {error:#}")).collect();
        if n_broken > notices.len() {
            notices.push(format!(
                "{name}: {n_broken} of {n_checked} samples are broken and skipped; `jedi inspect dataset` lists them"
            ));
        }
        if let Some(first) = self.unwanted.first() {
            let n = self.unwanted.len();
            notices.push(format!("{name}: its filters pass over {n} of {n_checked} samples; the first: {first}"));
        }
        if let Some(first) = self.too_small.first() {
            let (n, least) = (self.too_small.len(), needed.least);
            notices.push(format!(
                "{name}: {n} of {n_checked} sets hold fewer than {least} pictures and are not dealt; {first}"
            ));
        }
        if self.n_smaller > 0 {
            let (n, most) = (self.n_smaller, needed.most);
            notices.push(format!(
                "{name}: {n} of {n_checked} sets hold fewer than {most} pictures and are dealt in smaller sets alone"
            ));
        }
        let rest = self.cuts.len().saturating_sub(MAX_TOLD);
        notices.extend(self.cuts.into_iter().take(MAX_TOLD));
        if rest > 0 {
            notices.push(format!("{rest} more captions are too long for the text encoder and lose their ends"));
        }
        notices
    }
}

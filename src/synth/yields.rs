//! What a run yielded, in numbers that add up over shards.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::draft::{Draft, Pair};
use super::stage::Stage;
use super::truth::TruthCounts;

/// Bars of a histogram over [0, 1].
pub const BARS: usize = 50;

/// The sets of the paper's dataset (§4).
const PAPER_SETS: f64 = 1.6e6;

/// Counts over drafts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Yield {
    /// Set numbers that were worked on.
    pub numbers: usize,
    /// Set numbers given up after all attempts.
    pub skipped: usize,
    /// Collages, one an attempt.
    pub collages: usize,
    /// Sets made.
    pub sets: usize,
    /// Their pictures.
    pub pictures: usize,
    /// Pictures in another style.
    pub styled: usize,
    /// How many collages gave so many instances.
    pub instances: BTreeMap<usize, usize>,
    /// Detections that were not used, by reason.
    pub dropped: BTreeMap<String, usize>,
    /// Attempts that became no set, by stage and reason.
    pub rejected: BTreeMap<String, usize>,
    /// Seconds of each stage.
    pub seconds: BTreeMap<Stage, f64>,
    /// Similarities of instances of one collage, from 0 to 1.
    pub identity_bars: Vec<usize>,
    /// Of instances that were put into one set.
    pub within_sets: Means,
    /// Of the final, whole pictures of a set.
    pub final_pictures: Means,
    /// Against what really is in the collages, where it is known.
    pub truth: TruthCounts,
}

/// Means over pairs, as sums.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Means {
    /// The names of the two models; empty: there is none.
    pub by: [String; 2],
    /// How many pairs.
    pub pairs: usize,
    /// Σ by the model that tells subjects apart (Table 8: CLIP-I).
    pub identity: f64,
    /// Σ by the model that tells copies (Table 8: DINO).
    pub copy: f64,
}

impl Means {
    fn add(&mut self, pair: &Pair) {
        self.pairs += 1;
        self.identity += f64::from(pair.identity);
        self.copy += f64::from(pair.copy.unwrap_or(0.0));
    }

    /// The mean of each model with its name; None without pairs, or without the model.
    pub fn named(&self) -> [Option<(f64, &str)>; 2] {
        let mean = |at: usize, sum: f64| {
            let by = self.by[at].as_str();
            (self.pairs > 0 && !by.is_empty()).then(|| (sum / self.pairs as f64, by))
        };
        [mean(0, self.identity), mean(1, self.copy)]
    }

    fn plus(&mut self, other: &Self) {
        self.pairs += other.pairs;
        self.identity += other.identity;
        self.copy += other.copy;
        for (mine, theirs) in self.by.iter_mut().zip(&other.by) {
            if mine.is_empty() {
                mine.clone_from(theirs);
            }
        }
    }
}

impl Yield {
    /// Counts an attempt.
    pub fn add_draft(&mut self, draft: &Draft) {
        let record = &draft.record;
        if record.attempt == 0 {
            self.numbers += 1;
        }
        if draft.collage.is_some() {
            self.collages += 1;
        }
        let failed_at = record.rejection.as_ref().map(|rejection| rejection.stage);
        if draft.collage.is_some() && failed_at != Some(Stage::Collage) {
            *self.instances.entry(record.instances.len()).or_default() += 1;
        }
        for dropped in &record.dropped {
            *self.dropped.entry(dropped.reason.clone()).or_default() += 1;
        }
        self.truth = self.truth.plus(TruthCounts::of(record));
        self.identity_bars.resize(BARS, 0);
        for pair in &record.pairs {
            let bar = (pair.identity.clamp(0.0, 1.0) * BARS as f32) as usize;
            self.identity_bars[bar.min(BARS - 1)] += 1;
        }
        if let Some(rejection) = &record.rejection {
            *self.rejected.entry(format!("{}: {}", rejection.stage.name(), rejection.reason)).or_default() += 1;
            return;
        }
        self.sets += record.sets.len();
        for set in &record.sets {
            self.pictures += set.pictures.len();
            self.styled += set.pictures.iter().filter(|picture| picture.style.is_some()).count();
            let members: Vec<usize> = set.pictures.iter().map(|picture| picture.instance).collect();
            let is_within = |pair: &&Pair| pair.of.iter().all(|instance| members.contains(instance));
            record.pairs.iter().filter(is_within).for_each(|pair| self.within_sets.add(pair));
            set.pairs.iter().for_each(|pair| self.final_pictures.add(pair));
        }
    }

    /// Both together.
    pub fn plus(mut self, other: &Self) -> Self {
        self.numbers += other.numbers;
        self.skipped += other.skipped;
        self.collages += other.collages;
        self.sets += other.sets;
        self.pictures += other.pictures;
        self.styled += other.styled;
        for (mine, theirs) in [(&mut self.dropped, &other.dropped), (&mut self.rejected, &other.rejected)] {
            theirs.iter().for_each(|(reason, count)| *mine.entry(reason.clone()).or_default() += count);
        }
        other.instances.iter().for_each(|(n, count)| *self.instances.entry(*n).or_default() += count);
        other.seconds.iter().for_each(|(stage, seconds)| *self.seconds.entry(*stage).or_default() += seconds);
        self.identity_bars.resize(BARS, 0);
        self.identity_bars.iter_mut().zip(&other.identity_bars).for_each(|(mine, theirs)| *mine += theirs);
        self.within_sets.plus(&other.within_sets);
        self.final_pictures.plus(&other.final_pictures);
        self.truth = self.truth.plus(other.truth);
        self
    }

    /// Seconds of all stages.
    pub fn all_seconds(&self) -> f64 {
        self.seconds.values().sum()
    }

    /// How fast; None where there is nothing to measure by.
    pub fn sets_per_hour(&self) -> Option<f64> {
        let seconds = self.all_seconds();
        (self.sets > 0 && seconds > 0.0).then(|| self.sets as f64 * 3600.0 / seconds)
    }

    /// The report in lines, as `synth-data` prints it.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![];
        let per = |count: usize, of: usize| 100.0 * count as f64 / of.max(1) as f64;
        let share = |count: usize, of: usize| format!("{:.1} % ({count} of {of})", per(count, of));
        let per_set = self.pictures as f64 / self.sets.max(1) as f64;
        lines.push(format!("sets: {} of {} numbers, {per_set:.1} pictures a set", self.sets, self.numbers));
        let n_instances: usize = self.instances.iter().map(|(n, count)| n * count).sum();
        let mean = n_instances as f64 / self.collages.max(1) as f64;
        lines.push(format!("collages: {}, {mean:.1} instances a collage", self.collages));
        if self.skipped > 0 {
            lines.push(format!("skipped: {} numbers, after all attempts", self.skipped));
        }
        let counted = |counts: &BTreeMap<String, usize>| {
            counts.iter().map(|(reason, count)| format!("{count} {reason}")).collect::<Vec<_>>().join(", ")
        };
        if !self.rejected.is_empty() {
            lines.push(format!("rejected attempts: {}", counted(&self.rejected)));
        }
        if !self.dropped.is_empty() {
            lines.push(format!("unused detections: {}", counted(&self.dropped)));
        }
        lines.push(format!("restyled pictures: {}", share(self.styled, self.pictures)));
        for (name, means) in
            [("instances of a set", &self.within_sets), ("final pictures of a set", &self.final_pictures)]
        {
            let each = means.named().into_iter().flatten().map(|(mean, by)| format!("{mean:.3} by {by}"));
            let each = each.collect::<Vec<_>>().join(", ");
            if !each.is_empty() {
                lines.push(format!("mean similarity, {name}: {each}"));
            }
        }
        let truth = &self.truth;
        if truth.things > 0 {
            lines.push(format!("instances found (IoU > 0.8): {}", share(truth.things_found, truth.things)));
            lines.push(format!("false instances: {}", share(truth.instances_false, truth.instances)));
            lines.push(format!("pairs put right: {}", share(truth.pairs_right, truth.pairs)));
            lines.push(format!(
                "pairs of two subjects parted: {}",
                share(truth.pairs_of_two_parted, truth.pairs_of_two)
            ));
            lines.push(format!("sets of one subject: {}", share(truth.sets_pure, truth.sets)));
        }
        let seconds = self.seconds.iter().map(|(stage, seconds)| format!("{} {seconds:.1}", stage.name()));
        lines.push(format!("seconds: {}", seconds.collect::<Vec<_>>().join(", ")));
        if let Some(rate) = self.sets_per_hour() {
            let hours = PAPER_SETS / rate;
            lines.push(format!(
                "speed: {:.1} sets a minute, {rate:.0} an hour; 1.6 M sets would take {hours:.0} hours of this machine",
                rate / 60.0
            ));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::super::draft::{Found, PictureRecord, SetRecord};
    use super::*;

    fn draft(subjects: &[u64], components: &[usize]) -> Draft {
        let mut draft = Draft::new(1, 7, 0, "cat".into());
        draft.collage = Some(image::RgbImage::new(4, 4));
        draft.record.true_subjects = subjects.to_vec();
        let found =
            |(thing, &component)| Found { true_thing: Some(thing), component: Some(component), ..Found::default() };
        draft.record.instances = components.iter().enumerate().map(found).collect();
        for a in 0..components.len() {
            for b in a + 1..components.len() {
                draft.record.pairs.push(Pair { of: [a, b], identity: 0.9, copy: Some(0.4) });
            }
        }
        draft
    }

    #[test]
    fn counts_add_up_and_name_what_went_wrong() {
        let mut sum = Yield::default();
        sum.within_sets.by = ["clip", "dino"].map(String::from);
        let mut good = draft(&[5, 5, 6], &[0, 0, 1]);
        let pictures = [0, 1].map(|instance| PictureRecord { instance, ..PictureRecord::default() });
        good.record.sets = vec![SetRecord { pictures: pictures.to_vec(), pairs: vec![] }];
        sum.add_draft(&good);
        let mut bad = draft(&[5, 6], &[0, 0]);
        bad.reject(Stage::Affinity, "too few of one subject", None);
        sum.add_draft(&bad);
        assert_eq!((sum.numbers, sum.sets, sum.pictures, sum.collages), (2, 1, 2, 2));
        assert_eq!(sum.rejected, [("affinity: too few of one subject".to_owned(), 1)].into());
        assert_eq!((sum.truth.pairs, sum.truth.pairs_right), (4, 3));
        assert_eq!((sum.truth.pairs_of_two, sum.truth.pairs_of_two_parted), (3, 2));
        assert_eq!((sum.truth.sets, sum.truth.sets_pure), (1, 1));
        assert_eq!(sum.within_sets.pairs, 1);
        assert_eq!(sum.identity_bars[45], 4);
        let twice = Yield::default().plus(&sum).plus(&sum);
        assert_eq!((twice.sets, twice.truth.pairs, twice.identity_bars[45]), (2, 8, 8));
        let told = "mean similarity, instances of a set: 0.900 by clip, 0.400 by dino";
        assert!(twice.lines().iter().any(|line| line == told), "{:?}", twice.lines());
        sum.within_sets.by[1].clear();
        assert_eq!(sum.within_sets.named().map(|mean| mean.map(|(_, by)| by)), [Some("clip"), None]);
        assert!(
            sum.lines().iter().any(|line| line.starts_with("pairs put right: 75.0 % (3 of 4)")),
            "{:?}",
            sum.lines()
        );
    }

    #[test]
    fn the_speed_counts_all_stages() {
        let mut sum = Yield { sets: 10, ..Yield::default() };
        assert_eq!(sum.sets_per_hour(), None);
        sum.seconds = [(Stage::Collage, 20.0), (Stage::Compose, 5.0)].into();
        assert_eq!(sum.sets_per_hour(), Some(1440.0));
        assert!(sum.lines().last().unwrap().contains("24.0 sets a minute"));
    }
}

//! Counts and what may be concluded from them: pure functions.

use std::collections::BTreeMap;

use serde::Serialize;

/// A share of trials with its Wilson 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Share {
    /// Trials that succeeded.
    pub hits: usize,
    /// All trials.
    pub trials: usize,
    /// `hits / trials`.
    pub rate: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Share {
    /// `hits` of `trials`; no trials say nothing: rate 0, interval from 0 to 1.
    pub fn new(hits: usize, trials: usize) -> Self {
        let (low, high) = wilson(hits, trials);
        let rate = if trials == 0 { 0.0 } else { hits as f64 / trials as f64 };
        Self { hits, trials, rate, low, high }
    }

    /// The share of `outcomes` that are true.
    pub fn of(outcomes: impl IntoIterator<Item = bool>) -> Self {
        let (hits, trials) = outcomes.into_iter().fold((0, 0), |(hits, n), hit| (hits + hit as usize, n + 1));
        Self::new(hits, trials)
    }
}

/// The 95 % quantile of |normal|.
const Z: f64 = 1.959_963_984_540_054;

/// The p at which `hits` of `trials` would lie just within 1.96 deviations: the roots of (p̂ − p)² = z²·p(1 − p)/n
/// (Wilson 1927). Unlike p̂ ± z·√(p̂(1 − p̂)/n) it makes sense at 0 and n hits.
pub fn wilson(hits: usize, trials: usize) -> (f64, f64) {
    if trials == 0 {
        return (0.0, 1.0);
    }
    let (n, rate) = (trials as f64, hits as f64 / trials as f64);
    let z2 = Z * Z / n;
    let middle = rate + z2 / 2.0;
    let half = (z2 * (rate * (1.0 - rate) + z2 / 4.0)).sqrt();
    // At no hits and all hits one bound is exactly 0 or 1; rounding must not say otherwise.
    let low = if hits == 0 { 0.0 } else { (middle - half) / (1.0 + z2) };
    let high = if hits == trials { 1.0 } else { (middle + half) / (1.0 + z2) };
    (low, high)
}

/// One thing taken for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Confusion {
    /// The class that was right.
    pub asked: usize,
    /// The class that was named.
    pub seen: usize,
    /// How often.
    pub count: usize,
}

/// The mistakes among `(asked, seen)` pairs, most frequent first (then by number).
pub fn confusions(pairs: impl IntoIterator<Item = (usize, usize)>) -> Vec<Confusion> {
    let mut counts = BTreeMap::new();
    for pair in pairs.into_iter().filter(|(asked, seen)| asked != seen) {
        *counts.entry(pair).or_insert(0) += 1;
    }
    let mut list: Vec<Confusion> =
        counts.into_iter().map(|((asked, seen), count)| Confusion { asked, seen, count }).collect();
    list.sort_by_key(|confusion| std::cmp::Reverse(confusion.count));
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_solve_wilsons_equation() {
        for (hits, trials) in [(1, 7), (20, 64), (63, 64), (500, 1000)] {
            let (low, high) = wilson(hits, trials);
            let rate = hits as f64 / trials as f64;
            for p in [low, high] {
                let (left, right) = ((rate - p).powi(2), Z * Z * p * (1.0 - p) / trials as f64);
                assert!((left - right).abs() < 1e-12, "{hits}/{trials}: {left} {right}");
            }
            assert!(low < rate && rate < high);
        }
    }

    #[test]
    fn no_hits_and_all_hits_have_the_closed_form() {
        // p̂ = 0: the upper root of p² = z²·p(1 − p)/n is z²/(n + z²), at n = 10 0.2775.
        let (low, high) = wilson(0, 10);
        assert_eq!(low, 0.0);
        assert!((high - Z * Z / (10.0 + Z * Z)).abs() < 1e-12 && (high - 0.2775).abs() < 5e-5, "{high}");
        let (low, high) = wilson(10, 10);
        assert!((low - 0.7225).abs() < 5e-5 && high == 1.0, "{low} {high}");
    }

    #[test]
    fn misses_mirror_hits() {
        let ((low, high), (other_low, other_high)) = (wilson(13, 64), wilson(51, 64));
        assert!((low + other_high - 1.0).abs() < 1e-12 && (high + other_low - 1.0).abs() < 1e-12);
    }

    #[test]
    fn more_trials_narrow_the_interval() {
        let width = |k: usize| {
            let (low, high) = wilson(k, 4 * k);
            high - low
        };
        assert!(width(10) > width(100) && width(100) > width(1000));
    }

    #[test]
    fn nothing_tried_says_nothing() {
        let share = Share::of([]);
        assert_eq!((share.rate, share.low, share.high), (0.0, 0.0, 1.0));
    }

    #[test]
    fn shares_count_what_is_true() {
        let share = Share::of([true, false, true, true]);
        assert_eq!((share.hits, share.trials, share.rate), (3, 4, 0.75));
    }

    #[test]
    fn confusions_leave_out_what_is_right_and_put_the_frequent_first() {
        let list = confusions([(0, 0), (1, 2), (2, 1), (2, 1), (0, 3)]);
        let expected = [(2, 1, 2), (0, 3, 1), (1, 2, 1)].map(|(asked, seen, count)| Confusion { asked, seen, count });
        assert_eq!(list, expected);
    }
}

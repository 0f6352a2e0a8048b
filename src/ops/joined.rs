//! Many slices counted through from one to the next, as if they were one: work on all of them, in equal parts.

use std::ops::Range;

/// Where each slice ends in the whole.
pub struct Joined(Vec<usize>);

impl Joined {
    /// Slices of these lengths.
    pub fn new(lengths: impl IntoIterator<Item = usize>) -> Self {
        let ends = lengths.into_iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        Self(ends.collect())
    }

    /// Length of the whole.
    pub fn total(&self) -> usize {
        self.0.last().copied().unwrap_or(0)
    }

    /// Calls `f(slice, range in it)` for the pieces of `range` of the whole, in their order; none is empty.
    pub fn for_pieces(&self, range: Range<usize>, mut f: impl FnMut(usize, Range<usize>)) {
        let first = self.0.partition_point(|end| *end <= range.start);
        let mut start = range.start;
        for (slice, &end) in self.0.iter().enumerate().skip(first) {
            if start >= range.end {
                break;
            }
            let before = if slice == 0 { 0 } else { self.0[slice - 1] };
            let end = end.min(range.end);
            if start < end {
                f(slice, start - before..end - before);
            }
            start = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_meet_every_element_once_and_in_order() {
        let lengths = [3, 0, 1, 5, 0];
        let joined = Joined::new(lengths);
        let all: Vec<_> = (0..5).flat_map(|slice| (0..lengths[slice]).map(move |at| (slice, at))).collect();
        assert_eq!(joined.total(), all.len());
        for part in 1..=9 {
            let mut met = Vec::new();
            for start in (0..9).step_by(part) {
                joined.for_pieces(start..9.min(start + part), |slice, range| {
                    assert!(!range.is_empty());
                    met.extend(range.map(|at| (slice, at)));
                });
            }
            assert_eq!(met, all, "in parts of {part}");
        }
        assert_eq!(Joined::new([]).total(), 0);
    }
}

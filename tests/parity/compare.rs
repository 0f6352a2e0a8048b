//! The one comparator: every tensor of a case is compared and printed, then the case passes or fails as a whole.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

/// Collects the comparisons of one test.
#[must_use = "`finish` asserts"]
#[derive(Default)]
pub struct Comparison {
    compared: usize,
    failures: Vec<String>,
}

impl Comparison {
    /// Holds `found` to `expected` within `tolerance` of the largest magnitude in `expected`.
    pub fn tensor(&mut self, name: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
        self.tensor_at_scale(name, found, expected, tolerance, 0.0);
    }

    /// The same relative to at least `scale`: for what is zero in exact arithmetic and rounding noise in any other.
    pub fn tensor_at_scale(&mut self, name: &str, found: &Tensor, expected: &Tensor, tolerance: f64, scale: f64) {
        if found.dims() != expected.dims() {
            self.fail(format!("{name}: shape {:?}, expected {:?}", found.dims(), expected.dims()));
            return;
        }
        self.values(name, &values(found), &values(expected), (tolerance, scale));
    }

    /// The same of plain numbers; `(tolerance, scale)`.
    pub fn values(&mut self, name: &str, found: &[f64], expected: &[f64], (tolerance, scale): (f64, f64)) {
        self.compared += 1;
        if found.len() != expected.len() {
            return self.fail(format!("{name}: {} values, expected {}", found.len(), expected.len()));
        }
        let difference = |i: &usize| match (found[*i] - expected[*i]).abs() {
            difference if difference.is_nan() => f64::INFINITY,
            difference => difference,
        };
        let Some(worst) = (0..found.len()).max_by(|a, b| difference(a).total_cmp(&difference(b))) else { return };
        let scale = expected.iter().fold(scale, |scale, value| scale.max(value.abs()));
        let (absolute, relative) = match difference(&worst) {
            0.0 => (0.0, 0.0),
            absolute => (absolute, absolute / scale),
        };
        let line = format!(
            "{name}: max abs diff {absolute:.3e}, max rel diff {relative:.3e} (tolerance {tolerance:.0e}), at {worst}: {} \
             expected {}",
            found[worst], expected[worst]
        );
        println!("{line}");
        // Not `relative > tolerance`, which a NaN would pass.
        let agrees = relative <= tolerance;
        if !agrees {
            self.failures.push(line);
        }
    }

    /// Holds the names of two collections to each other: none missing, none extra.
    pub fn names<A, B>(&mut self, what: &str, found: &BTreeMap<String, A>, expected: &BTreeMap<String, B>) {
        self.compared += 1;
        let missing: Vec<_> = expected.keys().filter(|name| !found.contains_key(*name)).collect();
        let extra: Vec<_> = found.keys().filter(|name| !expected.contains_key(*name)).collect();
        if !missing.is_empty() || !extra.is_empty() {
            self.fail(format!("{what}: missing {missing:?}, extra {extra:?}"));
        }
    }

    pub fn fail(&mut self, message: String) {
        println!("{message}");
        self.failures.push(message);
    }

    /// Asserts that something was compared and everything agreed.
    pub fn finish(self) {
        assert!(self.compared > 0, "nothing was compared");
        let failed = self.failures.len();
        assert!(failed == 0, "{failed} of {} comparisons failed:\n{}", self.compared, self.failures.join("\n"));
    }
}

/// All values in f64, in order.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().and_then(|t| t.to_dtype(DType::F64)).and_then(|t| t.to_vec1()).expect("a CPU tensor")
}

#[test]
#[should_panic(expected = "1 of 2 comparisons failed")]
fn a_difference_above_the_tolerance_fails() {
    let mut comparison = Comparison::default();
    comparison.values("within", &[2.0, 1.0], &[2.0, 1.0 + 1e-5], (1e-5, 0.0));
    comparison.values("beyond", &[2.0, 1.0], &[2.0, 1.0 + 1e-4], (1e-5, 0.0));
    comparison.finish();
}

#[test]
#[should_panic(expected = "1 of 1 comparisons failed")]
fn a_nan_fails() {
    let mut comparison = Comparison::default();
    comparison.values("nan", &[1.0, f64::NAN], &[1.0, 1.0], (1e30, 0.0));
    comparison.finish();
}

//! Parameters chosen by patterns of their names.

use anyhow::Result;

use super::objective::Weights;
use crate::invalid::invalid;
use crate::model::params::{NamedVars, Params};

/// Whether `name` is what the pattern says, in which `*` stands for anything, dots included.
pub fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name
            .strip_prefix(start)
            .is_some_and(|name| (0..=name.len()).any(|at| name.is_char_boundary(at) && matches(rest, &name[at..]))),
    }
}

/// Whether one of the patterns matches.
pub fn any_matches(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| matches(pattern, name))
}

/// The parameters of `component`, those that the patterns match frozen.
pub fn freeze(params: Params, component: &'static str, patterns: &[String]) -> Params {
    let patterns = patterns.to_vec();
    params.frozen_where(move |name| any_matches(&patterns, &format!("{component}.{name}")))
}

/// Refuses patterns of `model.freeze` that match nothing, and a run that would train nothing.
pub fn check_freeze(patterns: &[String], trained: &NamedVars, frozen: &Weights) -> Result<()> {
    let known = || trained.keys().chain(frozen.keys());
    if let Some(idle) = patterns.iter().find(|pattern| !known().any(|name| matches(pattern, name))) {
        let example = known().next().map_or("", |name| name);
        return Err(invalid(format!("model.freeze: {idle} matches no parameter; they are called such as {example}")));
    }
    if trained.is_empty() {
        return Err(invalid("model.freeze: nothing is left to train; take a pattern out"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything() {
        for (pattern, name) in [
            ("unet.*", "unet.conv_in.weight"),
            ("*.to_q.*", "unet.down_blocks.0.attn1.to_q.weight"),
            ("*", "x"),
            ("a*", "a"),
            ("a.*.b*c", "a.x.b.bbc"),
            ("same", "same"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [("unet.*", "text_encoder.x"), ("*.bias", "a.weight"), ("a", "ab"), ("a*c", "ab")] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }
}

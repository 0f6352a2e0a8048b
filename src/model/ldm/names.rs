//! Pairs of names for the same layer, looked up from either side.

use std::collections::BTreeMap;

/// Layers by their names in diffusers and in LDM. What follows a layer's name (`.weight`, or the names inside it) is the
/// same on both sides.
#[derive(Default)]
pub struct Names {
    to_ldm: BTreeMap<String, String>,
    to_diffusers: BTreeMap<String, String>,
}

impl Names {
    /// One layer's two names.
    pub fn pair(&mut self, diffusers: impl Into<String>, ldm: impl Into<String>) {
        let (diffusers, ldm) = (diffusers.into(), ldm.into());
        self.to_ldm.insert(diffusers.clone(), ldm.clone());
        self.to_diffusers.insert(ldm, diffusers);
    }

    /// Layers inside a layer.
    pub fn pairs(&mut self, diffusers: &str, ldm: &str, inside: &[(&str, &str)]) {
        for (own_diffusers, own_ldm) in inside {
            self.pair(format!("{diffusers}.{own_diffusers}"), format!("{ldm}.{own_ldm}"));
        }
    }

    /// LDM's name of a tensor that diffusers names so.
    pub fn ldm(&self, name: &str) -> Option<String> {
        translated(&self.to_ldm, name)
    }

    /// diffusers' name of a tensor that LDM names so.
    pub fn diffusers(&self, name: &str) -> Option<String> {
        translated(&self.to_diffusers, name)
    }
}

/// The longest layer in front of `name` that is known, translated.
fn translated(pairs: &BTreeMap<String, String>, name: &str) -> Option<String> {
    let ends = std::iter::once(name.len()).chain(name.rmatch_indices('.').map(|(at, _)| at));
    ends.into_iter().find_map(|end| Some(pairs.get(&name[..end])?.clone() + &name[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_layer_counts_and_only_whole_words() {
        let mut names = Names::default();
        names.pair("up.attentions", "out.1");
        names.pairs("up.upsamplers", "out.1", &[("conv", "conv")]);
        assert_eq!(names.ldm("up.attentions.norm.weight").unwrap(), "out.1.norm.weight");
        assert_eq!(names.diffusers("out.1.norm.weight").unwrap(), "up.attentions.norm.weight");
        assert_eq!(names.diffusers("out.1.conv.bias").unwrap(), "up.upsamplers.conv.bias");
        assert_eq!(names.diffusers("out.10.weight"), None);
    }
}

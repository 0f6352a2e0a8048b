//! Stage 4: which instances are one subject. Pairs more alike than the threshold are joined, connected components become sets;
//! of instances that are mere copies of each other one is kept.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::draft::{Draft, Pair, PictureRecord, SetRecord};
use super::patience::{Patience, answers};
use super::settings::Common;
use super::stage::{Cutout, Embedder, Stage};
use super::tool::{Tool, Tools};

/// Goes up when this stage answers otherwise from the same models.
pub const VERSION: u32 = 1;

/// The affinity's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AffinitySettings {
    /// Tells subjects apart: `palette`, or CLIP, DINO or DINOv2 by folder or by name on the hub (the paper: CLIP,
    /// `openai/clip-vit-large-patch14`).
    pub model: String,
    /// Pairs more alike than this are one subject (the paper: 0.95 for CLIP).
    pub threshold: f64,
    /// Tells another view from a mere copy: `layout`, or such a network (`facebook/dinov2-base`); empty: none.
    pub copies_model: String,
    /// Pairs more alike than this, to that model, are copies, of which one is kept.
    pub copies_above: f64,
    /// Pairs less alike than this, to that model, are not joined; 0: the threshold alone decides.
    pub copies_model_min: f64,
}

impl Default for AffinitySettings {
    fn default() -> Self {
        Self {
            model: "palette".into(),
            threshold: 0.95,
            copies_model: "layout".into(),
            copies_above: 0.99,
            copies_model_min: 0.0,
        }
    }
}

/// Compares the instances of each draft and makes sets of those that are one subject.
pub fn run(settings: &AffinitySettings, common: &Common, tools: &mut Tools, drafts: &mut [Draft]) -> Result<()> {
    let patience = Patience::with(common, drafts);
    let mut alive: Vec<&mut Draft> = drafts.iter_mut().filter(|draft| draft.is_alive()).collect();
    let cutouts: Vec<&[Cutout]> = alive.iter().map(|draft| draft.cutouts.as_slice()).collect();
    let identity = similarities(&mut tools.identity, patience, &cutouts)?;
    let copies = match &mut tools.copies {
        Some(tool) => Some(similarities(tool, patience, &cutouts)?),
        None => None,
    };
    for (idx, draft) in alive.iter_mut().enumerate() {
        let copy = copies.as_ref().map(|copies| copies[idx].as_ref()).transpose();
        let (identity, copy) = match (identity[idx].as_ref(), copy) {
            (Ok(identity), Ok(copy)) => (identity, copy),
            (Err(error), _) | (_, Err(error)) => {
                draft.reject(Stage::Affinity, "the model failed", Some(format!("{error:#}")));
                continue;
            }
        };
        draft.record.pairs = identity
            .iter()
            .enumerate()
            .map(|(at, &(of, identity))| Pair { of, identity, copy: copy.map(|copy| copy[at].1) })
            .collect();
        choose(settings, common, draft);
    }
    Ok(())
}

/// Similarities of every two pictures of a group.
pub type Similarities = Vec<([usize; 2], f32)>;

/// The cosine of every two pictures of each group; one failure fails its group.
pub fn similarities(
    tool: &mut Tool<dyn Embedder>,
    patience: Patience,
    groups: &[&[Cutout]],
) -> Result<Vec<Result<Similarities>>> {
    let all: Vec<Cutout> = groups.iter().flat_map(|group| group.iter().cloned()).collect();
    let asks: Vec<usize> = (0..all.len()).collect();
    let name = tool.model.name.clone();
    let model = tool.get()?;
    let mut found = answers(&name, patience, &asks, &mut |asks| {
        let some: Vec<Cutout> = asks.iter().map(|&idx| all[idx].clone()).collect();
        model.embeddings(&some)
    })?
    .into_iter();
    let group = |group: &&[Cutout]| -> Result<Similarities> {
        // All answers of the group are taken even if one is an error: the next group's follow behind them.
        let vectors: Vec<Result<Vec<f32>>> = found.by_ref().take(group.len()).collect();
        let vectors = vectors.into_iter().collect::<Result<Vec<_>>>()?;
        let dot = |a: usize, b: usize| vectors[a].iter().zip(&vectors[b]).map(|(x, y)| x * y).sum();
        let pairs = (0..vectors.len()).flat_map(|a| (a + 1..vectors.len()).map(move |b| [a, b]));
        Ok(pairs.map(|of| (of, dot(of[0], of[1]))).collect())
    };
    Ok(groups.iter().map(group).collect())
}

/// Components, largest first, and the sets made of them.
fn choose(settings: &AffinitySettings, common: &Common, draft: &mut Draft) {
    let n = draft.record.instances.len();
    let mut is_copy = vec![false; n];
    for pair in &draft.record.pairs {
        let [first, second] = pair.of;
        if !is_copy[first] && pair.copy.is_some_and(|copy| f64::from(copy) > settings.copies_above) {
            is_copy[second] = true;
        }
    }
    let is_joined = |pair: &&Pair| {
        f64::from(pair.identity) > settings.threshold
            && pair.copy.is_none_or(|copy| f64::from(copy) >= settings.copies_model_min)
            && !pair.of.iter().any(|&instance| is_copy[instance])
    };
    let edges: Vec<[usize; 2]> = draft.record.pairs.iter().filter(is_joined).map(|pair| pair.of).collect();
    let mut components: Vec<Vec<usize>> = components(n, &edges);
    components.retain(|members| !is_copy[members[0]]);
    components.sort_by_key(|members| (std::cmp::Reverse(members.len()), members[0]));
    for (number, members) in components.iter().enumerate() {
        members.iter().for_each(|&instance| draft.record.instances[instance].component = Some(number));
    }

    let largest = components.first().map_or(0, Vec::len);
    components.retain(|members| members.len() >= common.min_images);
    if components.is_empty() {
        let detail = format!("{largest} instances of one subject, {} needed", common.min_images);
        draft.reject(Stage::Affinity, "too few of one subject", Some(detail));
        return;
    }
    let mut rng = draft.rng("synth affinity");
    for mut members in components.into_iter().take(common.sets_per_collage) {
        rng.shuffle(&mut members);
        members.truncate(common.max_images);
        let picture = |instance| PictureRecord { instance, ..PictureRecord::default() };
        draft.record.sets.push(SetRecord { pictures: members.into_iter().map(picture).collect(), pairs: vec![] });
    }
}

/// The connected components of a graph of `n` nodes, each in rising order, ordered by their first.
fn components(n: usize, edges: &[[usize; 2]]) -> Vec<Vec<usize>> {
    // The smallest node of each node's component, as far as it is known.
    let mut smallest: Vec<usize> = (0..n).collect();
    for &[a, b] in edges {
        let (low, high) = (smallest[a].min(smallest[b]), smallest[a].max(smallest[b]));
        smallest.iter_mut().filter(|of| **of == high).for_each(|of| *of = low);
    }
    let members = |root: usize| (0..n).filter(|&node| smallest[node] == root).collect();
    (0..n).filter(|&node| smallest[node] == node).map(members).collect()
}

#[cfg(test)]
mod tests {
    use super::super::draft::Found;
    use super::*;

    #[test]
    fn components_are_what_edges_reach() {
        assert_eq!(components(6, &[[4, 5], [0, 2], [2, 5]]), [vec![0, 2, 4, 5], vec![1], vec![3]]);
        assert_eq!(components(2, &[]), [vec![0], vec![1]]);
        assert_eq!(components(0, &[]), Vec::<Vec<usize>>::new());
    }

    fn draft(n: usize, alike: &[[usize; 2]], copies: &[[usize; 2]]) -> Draft {
        let mut draft = Draft::new(1, 0, 0, "cat".into());
        draft.record.instances = vec![Found::default(); n];
        for a in 0..n {
            for b in a + 1..n {
                let is = |list: &[[usize; 2]]| list.contains(&[a, b]);
                let identity = if is(alike) || is(copies) { 0.97 } else { 0.5 };
                let copy = Some(if is(copies) { 0.999 } else { 0.6 });
                draft.record.pairs.push(Pair { of: [a, b], identity, copy });
            }
        }
        draft
    }

    fn shown(draft: &Draft) -> Vec<Vec<usize>> {
        let set = |set: &SetRecord| {
            let mut of: Vec<usize> = set.pictures.iter().map(|picture| picture.instance).collect();
            of.sort_unstable();
            of
        };
        draft.record.sets.iter().map(set).collect()
    }

    #[test]
    fn every_component_that_is_large_enough_becomes_a_set() {
        let common = Common { min_images: 2, max_images: 4, sets_per_collage: 9, ..Common::default() };
        let mut two = draft(6, &[[1, 3], [3, 5], [0, 4]], &[]);
        choose(&AffinitySettings::default(), &common, &mut two);
        assert_eq!(shown(&two), [vec![1, 3, 5], vec![0, 4]]);
        let of: Vec<_> = two.record.instances.iter().map(|found| found.component).collect();
        assert_eq!(of, [Some(1), Some(0), Some(2), Some(0), Some(1), Some(0)]);
        let mut one = draft(6, &[[1, 3], [3, 5], [0, 4]], &[]);
        choose(&AffinitySettings::default(), &Common { sets_per_collage: 1, ..common }, &mut one);
        assert_eq!(shown(&one), [vec![1, 3, 5]]);
    }

    #[test]
    fn of_copies_one_is_kept_and_too_few_are_refused() {
        let common = Common { min_images: 3, max_images: 4, ..Common::default() };
        let mut copied = draft(4, &[[0, 1], [0, 2], [1, 2], [0, 3], [1, 3]], &[[2, 3]]);
        choose(&AffinitySettings::default(), &common, &mut copied);
        assert_eq!(shown(&copied), [vec![0, 1, 2]]);
        assert_eq!(copied.record.instances[3].component, None);
        let mut few = draft(3, &[[0, 1], [1, 2]], &[[0, 1]]);
        choose(&AffinitySettings::default(), &common, &mut few);
        assert_eq!(few.record.rejection.unwrap().reason, "too few of one subject");
    }
}

//! Prompts by a grammar: nouns, qualities, places and light, put together at random.

use std::collections::BTreeSet;

use anyhow::Result;

use super::words::{COLOURS, LIGHTS, MARKINGS, PLACES, QUALITIES, VIEWS};
use crate::invalid::invalid;
use crate::rng::Rng;
use crate::synth::stage::{Answers, PromptAsk, Prompter, Prompts};
use crate::synth::toybox::{Kind, Scene, WORDINGS, caption};

/// Goes up when the prompts change.
pub const VERSION: u32 = 1;

/// Where things may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenes {
    /// Anywhere.
    Any,
    /// In the twelve places and by the wordings that the embedded model knows; the objects must be its kinds of toys.
    Toybox,
}

/// Puts words together.
pub struct Grammar {
    /// Where things may be.
    pub scenes: Scenes,
}

impl Prompter for Grammar {
    fn prompts(&mut self, asks: &[PromptAsk]) -> Answers<Prompts> {
        let prompts = |ask: &PromptAsk| {
            let mut rng = Rng::new(ask.seed, "synth grammar", 0);
            match self.scenes {
                Scenes::Any => Ok(Prompts { object: object(ask.object, &mut rng), scenes: scenes(ask, &mut rng) }),
                Scenes::Toybox => toybox(ask, &mut rng),
            }
        };
        asks.iter().map(prompts).collect()
    }
}

/// `plump teal owl with cream speckles`.
fn object(name: &str, rng: &mut Rng) -> String {
    let mut colours = COLOURS.to_vec();
    rng.shuffle(&mut colours);
    let quality = rng.pick(QUALITIES);
    let marking = rng.pick(MARKINGS);
    // "a cream single band", not "cream a single band".
    let marking = match marking.strip_prefix("a ") {
        Some(one) => format!("{} {one}", with_article(colours[1])),
        None => format!("{} {marking}", colours[1]),
    };
    match rng.below(4) {
        0 => format!("{} {name} with {marking}", colours[0]),
        1 => format!("{quality} {} and {} {name}", colours[0], colours[1]),
        2 => format!("{quality} {} {name}", colours[0]),
        _ => format!("{quality} {} {name} with {marking}", colours[0]),
    }
}

/// Scenes in different places.
fn scenes(ask: &PromptAsk, rng: &mut Rng) -> Vec<String> {
    let mut places = PLACES.to_vec();
    rng.shuffle(&mut places);
    let thing = with_article(ask.object);
    // Mostly the longest form, of which there are most.
    let mut scene = |place: &&str| match rng.below(8) {
        0 => format!("{thing} {place}"),
        1 | 2 => format!("{thing} {place}, {}", rng.pick(LIGHTS)),
        3 => format!("{} {thing} {place}", rng.pick(VIEWS)),
        _ => format!("{} {thing} {place}, {}", rng.pick(VIEWS), rng.pick(LIGHTS)),
    };
    places.iter().cycle().take(ask.n_scenes).map(&mut scene).collect()
}

fn toybox(ask: &PromptAsk, rng: &mut Rng) -> Result<Prompts> {
    let kind = kind_of(ask.object)?;
    let mut places = Scene::ALL.to_vec();
    rng.shuffle(&mut places);
    let scenes =
        places.iter().cycle().take(ask.n_scenes).map(|&place| caption(kind, place, rng.below(WORDINGS))).collect();
    Ok(Prompts { object: format!("toy {}", kind.name()), scenes })
}

/// The kind of toy of this name.
pub fn kind_of(object: &str) -> Result<Kind> {
    let named = Kind::ALL.into_iter().find(|kind| kind.name() == object);
    named.ok_or_else(|| {
        let known: BTreeSet<&str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        let known = known.into_iter().collect::<Vec<_>>().join(", ");
        invalid(format!("prompts.objects: the toybox has no {object}; it has {known} (prompts.objects = \"toybox\")"))
    })
}

/// With `a` or `an`, or `some` for what is many.
fn with_article(name: &str) -> String {
    let is_one = ["ss", "us", "is"].iter().any(|end| name.ends_with(end)) || !name.ends_with('s');
    let starts_with_vowel = name.starts_with(['a', 'e', 'i', 'o', 'u']);
    // Said with a y: a unicorn, a ukulele, a eucalyptus.
    let sounds_like_y = ["uni", "uk", "eu", "ute"].iter().any(|start| name.starts_with(start));
    match (is_one, starts_with_vowel && !sounds_like_y) {
        (false, _) => format!("some {name}"),
        (true, true) => format!("an {name}"),
        (true, false) => format!("a {name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(object: &str, n_scenes: usize, seed: u64) -> PromptAsk<'_> {
        PromptAsk { object, n_scenes, seed }
    }

    #[test]
    fn articles_fit() {
        for (name, expected) in [
            ("teapot", "a teapot"),
            ("owl", "an owl"),
            ("unicycle", "a unicycle"),
            ("scissors", "some scissors"),
            ("cactus", "a cactus"),
            ("cutlass", "a cutlass"),
            ("umbrella", "an umbrella"),
        ] {
            assert_eq!(with_article(name), expected);
        }
    }

    #[test]
    fn ten_thousand_prompts_are_hardly_ever_the_same() {
        let asks: Vec<PromptAsk> = (0..2500).map(|seed| ask("owl", 4, seed)).collect();
        let prompts: Vec<Prompts> =
            Grammar { scenes: Scenes::Any }.prompts(&asks).into_iter().map(Result::unwrap).collect();
        let scenes: Vec<&String> = prompts.iter().flat_map(|prompts| &prompts.scenes).collect();
        let different: BTreeSet<&&String> = scenes.iter().collect();
        assert_eq!(scenes.len(), 10_000);
        assert!(different.len() > 7_000, "{}", different.len());
        let objects: BTreeSet<&String> = prompts.iter().map(|prompts| &prompts.object).collect();
        assert!(objects.len() > 2_200, "{}", objects.len());
        assert!(scenes.iter().all(|scene| scene.contains("an owl")));
        // Within a set no place comes twice.
        let place = |scene: &str| PLACES.iter().position(|place| scene.contains(place));
        for prompts in &prompts {
            let places: BTreeSet<_> = prompts.scenes.iter().map(|scene| place(scene)).collect();
            assert_eq!(places.len(), 4, "{:?}", prompts.scenes);
        }
    }

    #[test]
    fn the_toybox_is_asked_for_what_it_knows_alone() {
        let mut grammar = Grammar { scenes: Scenes::Toybox };
        let found = grammar.prompts(&[ask("robot", 4, 1), ask("robot", 4, 2), ask("robot", 4, 1)]);
        let found: Vec<Prompts> = found.into_iter().map(Result::unwrap).collect();
        assert_eq!(found[0], found[2]);
        assert_ne!(found[0], found[1]);
        assert!(found[0].scenes.iter().all(|scene| scene.contains("robot")));
        let error = grammar.prompts(&[ask("zebra", 4, 1)]).remove(0).unwrap_err();
        assert!(crate::invalid::is_invalid(&error) && error.to_string().contains("the toybox has no zebra"), "{error}");
    }
}

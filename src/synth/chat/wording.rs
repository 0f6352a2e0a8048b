//! The question, and what counts as an answer. Models repeat themselves (the paper's supplement says so of its own), and an
//! endpoint may not heed a seed: each question therefore carries hints that are drawn for it.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use super::Question;
use crate::rng::Rng;
use crate::synth::stage::{PromptAsk, Prompts};

/// What the model is told that it does.
pub const INSTRUCTION: &str = "You write short, concrete prompts for a text-to-image model. You answer with one JSON object \
                               and nothing else.";

/// A text-to-image model reads 77 tokens; more words than this would not fit.
const MOST_WORDS: usize = 50;

const LOOKS: [&str; 24] = [
    "worn",
    "brand-new",
    "hand-made",
    "painted",
    "striped",
    "spotted",
    "glossy",
    "matte",
    "translucent",
    "ornate",
    "plain",
    "tiny",
    "oversized",
    "vintage",
    "futuristic",
    "rustic",
    "colourful",
    "monochrome",
    "metallic",
    "wooden",
    "woven",
    "ceramic",
    "soft",
    "angular",
];
const COLOURS: [&str; 16] = [
    "red",
    "orange",
    "yellow",
    "lime green",
    "dark green",
    "turquoise",
    "sky blue",
    "navy",
    "purple",
    "pink",
    "brown",
    "beige",
    "black",
    "white",
    "grey",
    "golden",
];
const PLACES: [&str; 32] = [
    "kitchen",
    "beach",
    "forest",
    "city street",
    "desk",
    "snowfield",
    "garden",
    "museum",
    "market",
    "train",
    "mountain top",
    "library",
    "desert",
    "harbour",
    "attic",
    "meadow",
    "rooftop",
    "cafe",
    "workshop",
    "riverbank",
    "living room",
    "playground",
    "stage",
    "cave",
    "bridge",
    "bathroom",
    "farm",
    "airport",
    "swimming pool",
    "castle",
    "balcony",
    "lawn",
];
const LIGHTS: [&str; 12] = [
    "at sunrise",
    "at noon",
    "at dusk",
    "at night",
    "in fog",
    "in rain",
    "under neon lights",
    "by candlelight",
    "in soft window light",
    "under a cloudy sky",
    "in hard sunlight",
    "in autumn",
];

/// The question of an ask, asked for the `attempt`-th time.
pub fn question(ask: &PromptAsk, attempt: usize) -> Question {
    let mut rng = Rng::new(ask.seed, "prompt question", attempt as u64);
    let (object, n_scenes) = (ask.object, ask.n_scenes);
    let looks = format!("{}, {}", rng.pick(&LOOKS), rng.pick(&COLOURS));
    let mut places = PLACES.to_vec();
    rng.shuffle(&mut places);
    let hint =
        |index: usize, rng: &mut Rng| format!("{}. {} {}", index + 1, places[index % places.len()], rng.pick(&LIGHTS));
    let hints: Vec<String> = (0..n_scenes).map(|index| hint(index, &mut rng)).collect();
    let text = format!(
        "The object: {object}.\n\
         \"object\" describes one particular {object} by itself: its colours, material, shape and details, no surroundings. \
         Hints, to be dropped where they do not suit it: {looks}.\n\
         \"scenes\" are {n_scenes} different scenes with a {object} in them, each in a place of its own: what is around it, the \
         light. They do not say what the {object} looks like. Hints: {}.\n\
         Each is one sentence of at most 25 words with the word {object} in it, in English, on one line.\n\
         Answer: {{\"object\": \"…\", \"scenes\": [\"…\"]}} with {n_scenes} strings in the list.",
        hints.join("; ")
    );
    // What endpoints take for a seed: a positive number of 31 bits.
    Question { instruction: INSTRUCTION, text, seed: rng.next_u64() >> 33 }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    object: String,
    scenes: Vec<String>,
}

/// Reads an answer; whatever is not quite what was asked for is an error.
pub fn read(text: &str, ask: &PromptAsk) -> Result<Prompts> {
    let given: Given = serde_json::from_str(bare(text)).context("no JSON object of this kind")?;
    ensure!(given.scenes.len() == ask.n_scenes, "{} scenes, asked for {}", given.scenes.len(), ask.n_scenes);
    let prompts = Prompts {
        object: sentence(&given.object, ask.object)?,
        scenes: given.scenes.iter().map(|scene| sentence(scene, ask.object)).collect::<Result<_>>()?,
    };
    let different: BTreeSet<String> = prompts.scenes.iter().map(|scene| scene.to_lowercase()).collect();
    ensure!(different.len() == prompts.scenes.len(), "two scenes are the same");
    Ok(prompts)
}

/// The answer without the thought in front of it and the fence around it, with which models set code apart.
fn bare(text: &str) -> &str {
    let text = match text.trim_start().strip_prefix("<think>").and_then(|thought| thought.split_once("</think>")) {
        Some((_, answer)) => answer,
        None => text,
    };
    let text = text.trim();
    let inside = text.strip_prefix("```").and_then(|text| text.strip_suffix("```"));
    inside.map_or(text, |inside| inside.strip_prefix("json").unwrap_or(inside).trim())
}

fn sentence(text: &str, object: &str) -> Result<String> {
    let text = text.trim();
    let n_words = text.split_whitespace().count();
    ensure!((2..=MOST_WORDS).contains(&n_words), "a prompt of {n_words} words");
    if let Some(odd) = text.chars().find(|c| c.is_control() || *c == '…') {
        bail!("a prompt with the sign {odd:?}");
    }
    // A strip's captions are parted by this.
    ensure!(!text.contains("<|split|>"), "a prompt with <|split|> in it");
    // Of "coffee mug", the mug; in any number.
    let noun = object.split_whitespace().last().unwrap_or(object).to_lowercase();
    ensure!(text.to_lowercase().contains(&noun), "a prompt without the word {noun}: {text:?}");
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASK: PromptAsk = PromptAsk { object: "coffee mug", n_scenes: 2, seed: 7 };

    fn fault(text: &str) -> String {
        format!("{:#}", read(text, &ASK).unwrap_err())
    }

    #[test]
    fn a_good_answer_is_read_with_and_without_its_wrapping() {
        let good = r#"{"object": " A blue mug with a chip. ", "scenes": ["Two mugs on a quay.", "A Mug in snow."]}"#;
        let expected = Prompts {
            object: "A blue mug with a chip.".into(),
            scenes: vec!["Two mugs on a quay.".into(), "A Mug in snow.".into()],
        };
        let wrapped =
            [good.to_owned(), format!("```json\n{good}\n```"), format!("<think>\nwell {{}}\n</think>\n\n{good}\n")];
        for text in wrapped {
            assert_eq!(read(&text, &ASK).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn whatever_is_not_quite_what_was_asked_for_is_refused() {
        let with = |object: &str, scenes: &str| format!(r#"{{"object": "{object}", "scenes": [{scenes}]}}"#);
        let scenes = r#""a mug here", "a mug there""#;
        assert!(fault(&format!("Here you are: {}", with("a mug", scenes))).starts_with("no JSON object"));
        assert!(fault(&with("a mug", scenes)[..30]).starts_with("no JSON object"));
        assert!(fault(r#"{"object": "a mug", "scenes": "a mug"}"#).starts_with("no JSON object"));
        assert!(fault(r#"{"object": "a mug", "scenes": [], "note": 1}"#).starts_with("no JSON object"));
        assert!(fault(&with("a mug", r#""a mug here""#)).contains("1 scenes, asked for 2"));
        assert!(fault(&with("a mug", r#""a mug here", "A MUG here""#)).contains("the same"));
        assert!(fault(&with("mug", scenes)).contains("1 words"));
        assert!(fault(&with(&"mug ".repeat(51), scenes)).contains("51 words"));
        assert!(fault(&with("a blue cup", scenes)).contains("without the word mug"));
        assert!(fault(&with("a mug\\nin two lines", scenes)).contains("sign '\\n'"));
        assert!(fault(&with("a mug <|split|> two", scenes)).contains("<|split|>"));
        assert!(fault(&with("the mug …", scenes)).contains("sign"));
    }

    #[test]
    fn questions_differ_by_seed_and_attempt_and_are_the_same_again() {
        let text = |seed, attempt| question(&PromptAsk { seed, ..ASK }, attempt).text;
        assert_eq!(text(1, 0), text(1, 0));
        assert!(text(1, 0) != text(2, 0) && text(1, 0) != text(1, 1));
        let seeds: BTreeSet<u64> = (0..20).map(|attempt| question(&ASK, attempt).seed).collect();
        assert!(seeds.len() == 20 && seeds.iter().all(|seed| *seed < 1 << 31));
        assert!(text(1, 0).contains("2. ") && !text(1, 0).contains("3. "), "a hint a scene");
    }
}

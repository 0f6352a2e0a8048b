//! The `--config` file of `jedi synth-data`.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::affinity::AffinitySettings;
use super::caption::CaptionSettings;
use super::chat::EndpointSettings;
use super::collage::CollageSettings;
use super::compose::ComposeSettings;
use super::embedded::NOUNS;
use super::instances::InstanceSettings;
use super::prompts::PromptSettings;
use super::score::ScoreSettings;
use super::stage::Stage;
use super::stylise::StyliseSettings;
use super::toybox::Kind;
use super::{affinity, caption, collage, compose, instances, prompts, score, stylise};
use crate::invalid::invalid;

/// The name of [`SynthConfig::endpoint`] among the models of the prompts.
pub const ENDPOINT: &str = "endpoint";

/// All that the sets depend on, and how they are worked on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SynthConfig {
    /// What all stages share.
    pub sets: Common,
    /// Stage 1.
    pub prompts: PromptSettings,
    /// Stage 2.
    pub collage: CollageSettings,
    /// Stage 3.
    pub instances: InstanceSettings,
    /// Stage 4.
    pub affinity: AffinitySettings,
    /// Stage 5.
    pub compose: ComposeSettings,
    /// Stage 6.
    pub stylise: StyliseSettings,
    /// Stage 7.
    pub caption: CaptionSettings,
    /// Stage 8.
    pub score: ScoreSettings,
    /// Where prompts are asked for if `prompts.model` is `endpoint`.
    pub endpoint: EndpointSettings,
}

/// What all stages share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Common {
    /// Of everything that is drawn.
    pub seed: u64,
    /// Fewest pictures a set.
    pub min_images: usize,
    /// Most pictures a set.
    pub max_images: usize,
    /// Sets made of one collage at most: more than one where it shows several subjects.
    pub sets_per_collage: usize,
    /// Set numbers a shard.
    pub sets_per_shard: usize,
    /// Attempts at a set number, each with another collage, before it is skipped.
    pub attempts: u64,
    /// How often a model is asked again for what it failed at.
    pub retries: usize,
    /// Set numbers that go through a stage together.
    pub batch: usize,
    /// Memory for models, in GB (10⁹ bytes): stages whose models fit in together are worked on batch by batch, others one
    /// after the other, shard by shard. Changes the speed alone.
    pub memory_gb: f64,
    /// Write masks of the things, too.
    pub masks: bool,
    /// In which Stable Diffusion computes; on a GPU bf16 is faster and takes half the memory.
    pub dtype: NumberFormat,
}

/// A number format of networks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum NumberFormat {
    #[default]
    F32,
    Bf16,
    F16,
}

impl Default for Common {
    fn default() -> Self {
        Self {
            seed: 0,
            min_images: 2,
            max_images: 4,
            sets_per_collage: 1,
            sets_per_shard: 1000,
            attempts: 3,
            retries: 2,
            batch: 16,
            memory_gb: 16.0,
            masks: false,
            dtype: NumberFormat::default(),
        }
    }
}

impl SynthConfig {
    /// Refuses values that no run can have, with the setting's name and range.
    pub fn validate(&self) -> Result<()> {
        let sets = &self.sets;
        for (name, value, most) in [
            ("sets.min_images", sets.min_images as u64, 64),
            ("sets.max_images", sets.max_images as u64, 64),
            ("sets.sets_per_collage", sets.sets_per_collage as u64, 16),
            ("sets.sets_per_shard", sets.sets_per_shard as u64, 100_000),
            ("sets.attempts", sets.attempts, 100),
            ("sets.batch", sets.batch as u64, 10_000),
            ("instances.max_instances", self.instances.max_instances as u64, 250),
            ("collage.steps", self.collage.steps as u64, 1000),
            ("compose.steps", self.compose.steps as u64, 1000),
            ("compose.rounds", self.compose.rounds as u64, 100),
            ("stylise.steps", self.stylise.steps as u64, 1000),
            ("prompts.max_tokens", self.prompts.max_tokens as u64, 100_000),
            ("prompts.tries", self.prompts.tries as u64, 20),
            ("caption.beams", self.caption.beams as u64, 64),
            ("caption.max_tokens", self.caption.max_tokens as u64, 1000),
        ] {
            if !(1..=most).contains(&value) {
                return Err(invalid(format!("{name} = {value}: must lie in [1, {most}]")));
            }
        }
        if sets.min_images > sets.max_images {
            let (min, max) = (sets.min_images, sets.max_images);
            return Err(invalid(format!("sets.min_images = {min}: is more than sets.max_images = {max}")));
        }
        let (instances, affinity, compose) = (&self.instances, &self.affinity, &self.compose);
        for (name, value) in [
            ("instances.min_score", instances.min_score),
            ("instances.min_share", instances.min_share),
            ("instances.max_share", instances.max_share),
            ("instances.max_overlap", instances.max_overlap),
            ("instances.min_fill", instances.min_fill),
            ("affinity.threshold", affinity.threshold),
            ("affinity.copies_above", affinity.copies_above),
            ("affinity.copies_model_min", affinity.copies_model_min),
            ("compose.min_scale", compose.min_scale),
            ("compose.max_scale", compose.max_scale),
            ("compose.wander", compose.wander),
            ("compose.rounds_from", compose.rounds_from),
            ("stylise.probability", self.stylise.probability),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return Err(invalid(format!("{name} = {value}: must lie in [0, 1]")));
            }
        }
        for (low, high, names) in [
            (instances.min_share, instances.max_share, ["instances.min_share", "instances.max_share"]),
            (compose.min_scale, compose.max_scale, ["compose.min_scale", "compose.max_scale"]),
        ] {
            if low > high {
                return Err(invalid(format!("{} = {low}: is more than {} = {high}", names[0], names[1])));
            }
        }
        for (name, value) in [
            ("sets.memory_gb", sets.memory_gb),
            ("collage.guidance", self.collage.guidance),
            ("compose.guidance", compose.guidance),
            ("stylise.text_guidance", self.stylise.text_guidance),
            ("stylise.image_guidance", self.stylise.image_guidance),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(invalid(format!("{name} = {value}: must be a number, 0 or more")));
            }
        }
        if !(0.0..=2.0).contains(&self.prompts.temperature) {
            return Err(invalid(format!("prompts.temperature = {}: must lie in [0, 2]", self.prompts.temperature)));
        }
        if !self.caption.length_exponent.is_finite() {
            return Err(invalid(format!(
                "caption.length_exponent = {}: must be a number",
                self.caption.length_exponent
            )));
        }
        if !self.collage.prompt.contains("{prompt}") && !self.collage.prompt.contains("{object}") {
            return Err(invalid("collage.prompt: names neither {prompt} nor {object}; say where they stand"));
        }
        for (name, size) in
            [("collage.size", self.collage.size), ("compose.size", compose.size), ("stylise.size", self.stylise.size)]
        {
            if size > 4096 {
                return Err(invalid(format!("{name} = {size}: must lie in [0, 4096]; 0 leaves it to the model")));
            }
        }
        if !self.stylise.instruction.contains("{style}") {
            return Err(invalid("stylise.instruction: does not name {style}; say where it stands"));
        }
        // `<|` stands between the captions of a set on disk, and a style may stand in one.
        if let Some(style) = self.stylise.styles.iter().find(|style| style.trim().is_empty() || style.contains("<|")) {
            return Err(invalid(format!("stylise.styles: {style:?} is no style; name it in words")));
        }
        Ok(())
    }

    /// The names of the objects.
    pub fn objects(&self) -> Result<Vec<String>> {
        let place = self.prompts.objects.as_str();
        let lines = |text: &str| -> Vec<String> {
            text.lines()
                .map(str::trim)
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
                .map(String::from)
                .collect()
        };
        let objects = match place {
            "nouns" => lines(NOUNS),
            "toybox" => Kind::ALL.iter().map(|kind| kind.name().to_owned()).collect(),
            file => {
                let cause = |error| {
                    invalid(format!(
                        "prompts.objects {file}: cannot be read: {error}; give a file, `nouns` or `toybox`"
                    ))
                };
                lines(&std::fs::read_to_string(Path::new(file)).map_err(cause)?)
            }
        };
        if objects.is_empty() {
            return Err(invalid(format!("prompts.objects {place}: names nothing; write an object a line")));
        }
        Ok(objects)
    }

    /// Of the code of a stage.
    pub fn version(stage: Stage) -> u32 {
        match stage {
            Stage::Prompts => prompts::VERSION,
            Stage::Collage => collage::VERSION,
            Stage::Instances => instances::VERSION,
            Stage::Affinity => affinity::VERSION,
            Stage::Compose => compose::VERSION,
            Stage::Stylise => stylise::VERSION,
            Stage::Caption => caption::VERSION,
            Stage::Score => score::VERSION,
        }
    }

    /// What decides a stage's answers besides its models: its version and its settings.
    pub fn of_stage(&self, stage: Stage) -> Result<Value> {
        let sets = &self.sets;
        let own = match stage {
            Stage::Prompts => {
                let common =
                    json!([sets.seed, sets.batch, sets.sets_per_shard, sets.max_images, sets.sets_per_collage]);
                // Where answers are kept decides none of them.
                let own = PromptSettings { answers: String::new(), ..self.prompts.clone() };
                let endpoint = (own.model == ENDPOINT).then_some(&self.endpoint.model);
                json!([common, own, self.objects()?, endpoint])
            }
            Stage::Collage => json!([self.collage, sets.dtype]),
            Stage::Instances => json!([self.instances, sets.min_images]),
            Stage::Affinity => json!(self.affinity),
            Stage::Compose => json!([self.compose, sets.dtype]),
            Stage::Stylise => json!([self.stylise, sets.dtype]),
            Stage::Caption => json!(self.caption),
            Stage::Score => json!(self.score),
        };
        Ok(json!([stage.name(), Self::version(stage), own]))
    }

    /// The names of the models that compare final pictures: subjects, and copies (empty: none).
    pub fn score_models(&self) -> [&str; 2] {
        let (score, affinity) = (&self.score, &self.affinity);
        [(&score.model, &affinity.model), (&score.copies_model, &affinity.copies_model)]
            .map(|(own, usual)| if own.is_empty() { usual.as_str() } else { own.as_str() })
    }

    /// Whether a setting changes how the work is done, but not what it makes.
    pub fn is_only_how(table: &str, name: &str) -> bool {
        match table {
            "sets" => name == "memory_gb",
            "prompts" => name == "answers",
            ENDPOINT => name != "model",
            _ => false,
        }
    }

    /// The same settings, read again: what is written beside the data.
    pub fn as_json(&self) -> Result<Value> {
        serde_json::to_value(self).context("the settings cannot be written")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_values_are_refused_by_name() {
        let refusal = |change: fn(&mut SynthConfig)| {
            let mut config = SynthConfig::default();
            config.validate().unwrap();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(refusal(|c| c.sets.batch = 0).starts_with("sets.batch = 0: "));
        assert!(refusal(|c| c.sets.min_images = 5).contains("is more than sets.max_images = 4"));
        assert!(refusal(|c| c.affinity.threshold = f64::NAN).starts_with("affinity.threshold = NaN: "));
        assert!(refusal(|c| c.compose.min_scale = 0.9).contains("is more than compose.max_scale"));
        assert!(refusal(|c| c.collage.prompt = "a cat".into()).starts_with("collage.prompt: "));
        assert!(refusal(|c| c.sets.memory_gb = -1.0).starts_with("sets.memory_gb = -1: "));
        assert!(refusal(|c| c.prompts.temperature = 2.5).starts_with("prompts.temperature = 2.5: "));
        assert!(refusal(|c| c.caption.beams = 0).starts_with("caption.beams = 0: "));
        assert!(refusal(|c| c.collage.steps = 0).starts_with("collage.steps = 0: "));
        assert!(refusal(|c| c.stylise.image_guidance = -1.0).starts_with("stylise.image_guidance = -1: "));
        assert!(refusal(|c| c.compose.size = 5000).starts_with("compose.size = 5000: "));
        assert!(refusal(|c| c.stylise.instruction = "older".into()).starts_with("stylise.instruction: "));
        assert!(refusal(|c| c.stylise.styles = vec!["a|<|b".into()]).starts_with("stylise.styles: "));
    }

    #[test]
    fn about_two_thousand_different_nouns_ship_with_the_program() {
        let nouns = SynthConfig::default().objects().unwrap();
        let different: std::collections::BTreeSet<&String> = nouns.iter().collect();
        assert_eq!(different.len(), nouns.len(), "a noun is there twice");
        assert!((1900..2200).contains(&nouns.len()), "{}", nouns.len());
        let is_plain = |noun: &String| noun.chars().all(|c| c.is_ascii_lowercase() || c == ' ' || c == '-');
        assert!(nouns.iter().all(is_plain), "{:?}", nouns.iter().find(|noun| !is_plain(noun)));
    }

    #[test]
    fn a_list_of_ones_own_may_have_comments_and_must_name_something() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("mine.txt");
        let objects = |text: &str| {
            std::fs::write(&file, text).unwrap();
            let mut config = SynthConfig::default();
            config.prompts.objects = file.display().to_string();
            config.objects()
        };
        assert_eq!(objects("# mine\n red fox \n\nowl\n").unwrap(), ["red fox", "owl"]);
        assert!(objects("# nothing\n").unwrap_err().to_string().contains("names nothing"));
    }

    #[test]
    fn final_pictures_are_compared_as_instances_unless_it_is_said_otherwise() {
        let mut config = SynthConfig::default();
        assert_eq!(config.score_models(), ["palette", "layout"]);
        config.score.copies_model = "facebook/dino-vits16".into();
        assert_eq!(config.score_models(), ["palette", "facebook/dino-vits16"]);
    }

    #[test]
    fn every_setting_of_a_stage_counts() {
        let config = SynthConfig::default();
        let mut other = config.clone();
        other.affinity.threshold = 0.9;
        for stage in Stage::ALL {
            let is_same = config.of_stage(stage).unwrap() == other.of_stage(stage).unwrap();
            assert_eq!(is_same, stage != Stage::Affinity);
        }
    }

    #[test]
    fn of_an_endpoint_that_is_asked_the_model_counts_and_its_place_and_patience_do_not() {
        let mut config = SynthConfig::default();
        let prompts = |config: &SynthConfig| config.of_stage(Stage::Prompts).unwrap();
        let with_grammar = prompts(&config);
        config.endpoint.model = "small".into();
        assert_eq!(prompts(&config), with_grammar);
        config.prompts.model = ENDPOINT.into();
        let asked = prompts(&config);
        config.endpoint.timeout_secs += 1;
        config.endpoint.url = "http://elsewhere/v1".into();
        config.prompts.answers = "elsewhere".into();
        assert_eq!(prompts(&config), asked);
        config.endpoint.model = "large".into();
        assert_ne!(prompts(&config), asked);
        assert!(SynthConfig::is_only_how("endpoint", "tries") && !SynthConfig::is_only_how("prompts", "tries"));
    }
}

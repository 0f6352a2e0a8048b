//! What is asked of a picture: by flags, by a line of a prompts file, by an earlier picture, and the three together.

use std::path::PathBuf;

use serde::Deserialize;

use super::record::Record;
use crate::cli::{self, Guidance, SampleArgs, Sampler, SteeringArgs};

/// Settings of one picture, or of several that differ by their seeds; None: not said here. The fields of a line of a
/// prompts file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    pub prompt: Option<String>,
    pub negative_prompt: Option<String>,
    pub refs: Option<Vec<AskedReference>>,
    pub seed: Option<u64>,
    pub num_images: Option<usize>,
    pub steps: Option<usize>,
    pub sampler: Option<Sampler>,
    pub karras: Option<bool>,
    pub guidance: Option<Guidance>,
    pub scale: Option<f64>,
    pub text_scale: Option<f64>,
    pub image_scale: Option<f64>,
    pub normalise_guidance: Option<bool>,
    pub guidance_rescale: Option<f64>,
    pub size: Option<usize>,
}

/// A picture to read; what it must be, where that is known.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "ReferenceForm")]
pub struct AskedReference {
    pub image: PathBuf,
    pub caption: Option<String>,
    pub sha256: Option<String>,
    /// None: 1.
    pub weight: Option<f64>,
    pub mask: Option<AskedMask>,
}

/// A mask to read; what it must be, where that is known.
#[derive(Clone, Debug, PartialEq)]
pub struct AskedMask {
    pub path: PathBuf,
    pub sha256: Option<String>,
}

/// `"a.png"`, `"a.png=a cat"` or `{"image": "a.png", "caption": "a cat", "weight": 0.5, "mask": "b.png"}`.
#[derive(Deserialize)]
#[serde(untagged)]
enum ReferenceForm {
    Text(String),
    Fields(ReferenceFields),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReferenceFields {
    image: PathBuf,
    caption: Option<String>,
    weight: Option<f64>,
    mask: Option<PathBuf>,
}

impl TryFrom<ReferenceForm> for AskedReference {
    type Error = String;

    fn try_from(form: ReferenceForm) -> Result<Self, String> {
        match form {
            ReferenceForm::Text(text) => text.parse().map(|reference: cli::Reference| Self::from(&reference)),
            ReferenceForm::Fields(ReferenceFields { image, caption, weight, mask }) => match weight {
                Some(weight) if weight < 0.0 => Err(format!("weight {weight}: must be 0 or more")),
                _ => Ok(Self { image, caption, sha256: None, weight, mask: mask.map(AskedMask::at) }),
            },
        }
    }
}

impl From<&cli::Reference> for AskedReference {
    fn from(reference: &cli::Reference) -> Self {
        let (image, caption) = (reference.image.clone(), reference.caption.clone());
        Self { image, caption, sha256: None, weight: None, mask: None }
    }
}

impl AskedMask {
    /// A file of which nothing is known.
    pub fn at(path: PathBuf) -> Self {
        Self { path, sha256: None }
    }
}

impl Asked {
    /// By the flags; the prompts come apart, as there may be many.
    pub fn by_flags(args: &SampleArgs, refs: Vec<AskedReference>) -> Self {
        let steering = &args.steering;
        Self {
            prompt: None,
            negative_prompt: args.negative_prompt.clone(),
            refs: (!refs.is_empty()).then_some(refs),
            seed: args.seed,
            num_images: args.num_images,
            steps: steering.steps,
            sampler: steering.sampler,
            karras: steering.karras,
            guidance: steering.guidance,
            scale: steering.scale,
            text_scale: steering.text_scale,
            image_scale: steering.image_scale,
            normalise_guidance: steering.normalise_guidance,
            guidance_rescale: steering.guidance_rescale,
            size: args.size,
        }
    }

    /// By an earlier picture, as far as `flags` leave it a say: another guidance or sampler starts without the scales and
    /// the spread of the old one.
    pub fn by_record(record: &Record, flags: &Self) -> Self {
        let guidance = &record.guidance;
        let same_guidance = flags.guidance.is_none_or(|kind| kind == guidance.kind);
        let same_scale = same_guidance && flags.scale.is_none();
        let same_sampler = flags.sampler.is_none_or(|sampler| sampler == record.sampler);
        let reference = |old: &super::record::RecordedReference| AskedReference {
            image: old.path.clone(),
            caption: old.caption.clone(),
            sha256: Some(old.sha256.clone()),
            weight: Some(old.weight),
            mask: old
                .mask
                .as_ref()
                .map(|mask| AskedMask { path: mask.path.clone(), sha256: Some(mask.sha256.clone()) }),
        };
        Self {
            prompt: Some(record.prompt.clone()),
            negative_prompt: Some(record.negative_prompt.clone()),
            refs: Some(record.references.iter().map(reference).collect()),
            seed: Some(record.seed),
            num_images: None,
            steps: Some(record.steps),
            sampler: Some(record.sampler),
            karras: same_sampler.then_some(record.karras),
            guidance: Some(guidance.kind),
            scale: guidance.scale.filter(|_| same_guidance),
            text_scale: guidance.text_scale.filter(|_| same_scale),
            image_scale: guidance.image_scale.filter(|_| same_scale),
            normalise_guidance: same_guidance.then_some(guidance.normalised),
            guidance_rescale: Some(guidance.rescale),
            size: Some(record.size),
        }
    }

    /// This, and what it leaves unsaid from `other`.
    pub fn or(self, other: Self) -> Self {
        Self {
            prompt: self.prompt.or(other.prompt),
            negative_prompt: self.negative_prompt.or(other.negative_prompt),
            refs: self.refs.or(other.refs),
            seed: self.seed.or(other.seed),
            num_images: self.num_images.or(other.num_images),
            steps: self.steps.or(other.steps),
            sampler: self.sampler.or(other.sampler),
            karras: self.karras.or(other.karras),
            guidance: self.guidance.or(other.guidance),
            scale: self.scale.or(other.scale),
            text_scale: self.text_scale.or(other.text_scale),
            image_scale: self.image_scale.or(other.image_scale),
            normalise_guidance: self.normalise_guidance.or(other.normalise_guidance),
            guidance_rescale: self.guidance_rescale.or(other.guidance_rescale),
            size: self.size.or(other.size),
        }
    }

    /// How it is sampled, as the flags say it.
    pub fn steering(&self) -> SteeringArgs {
        SteeringArgs {
            steps: self.steps,
            sampler: self.sampler,
            karras: self.karras,
            guidance: self.guidance,
            scale: self.scale,
            text_scale: self.text_scale,
            image_scale: self.image_scale,
            normalise_guidance: self.normalise_guidance,
            guidance_rescale: self.guidance_rescale,
        }
    }

    /// Pictures that it asks for.
    pub fn n_pictures(&self) -> usize {
        self.num_images.unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_of_a_line_may_be_text_or_fields() {
        let line = r#"{"prompt": "a", "refs": ["a.png", "b.png=a cat", {"image": "c=1.png", "caption": "a dog"}]}"#;
        let refs = serde_json::from_str::<Asked>(line).unwrap().refs.unwrap();
        let found: Vec<_> = refs.iter().map(|r| (r.image.to_str().unwrap(), r.caption.as_deref())).collect();
        assert_eq!(found, [("a.png", None), ("b.png", Some("a cat")), ("c=1.png", Some("a dog"))]);
        assert!(serde_json::from_str::<Asked>(r#"{"refs": [{"file": "a.png"}]}"#).is_err());
        let refs = serde_json::from_str::<Asked>(r#"{"refs": [{"image": "a.png", "weight": 0.5, "mask": "b.png"}]}"#);
        let [AskedReference { weight, mask, .. }] = &refs.unwrap().refs.unwrap()[..] else { panic!("one reference") };
        assert_eq!((*weight, mask.as_ref()), (Some(0.5), Some(&AskedMask::at("b.png".into()))));
        assert!(serde_json::from_str::<Asked>(r#"{"refs": [{"image": "a.png", "weight": -1}]}"#).is_err());
        assert!(serde_json::from_str::<Asked>(r#"{"stepz": 3}"#).unwrap_err().to_string().contains("stepz"));
    }

    #[test]
    fn what_is_said_first_wins() {
        let first = Asked { seed: Some(1), ..Asked::default() };
        let second = Asked { seed: Some(2), steps: Some(7), ..Asked::default() };
        assert_eq!(first.or(second), Asked { seed: Some(1), steps: Some(7), ..Asked::default() });
    }
}

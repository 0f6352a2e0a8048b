//! Whole sampling runs, from pictures and prompts to latents and pictures, against diffusers' parts put together in Python.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use jedi::device::Runtime;
use jedi::diffusion::{Guidance, Restraint};
use jedi::model::Files;
use jedi::sample::noise::GivenNoise;
use jedi::sample::{Pipeline, Reference, SampleSettings, SetRequest};

use crate::compare::{Comparison, values};
use crate::golden::{Golden, path};
use crate::samplers::SAMPLERS;

/// Levels 0 to 255, `[b, 3, h, w]`.
pub fn pictures(tensor: &Tensor) -> Vec<RgbImage> {
    let (b, _, h, w) = tensor.dims4().unwrap();
    let levels: Vec<u8> = values(&tensor.permute((0, 2, 3, 1)).unwrap()).into_iter().map(|level| level as u8).collect();
    let image = |bytes: &[u8]| RgbImage::from_raw(w as u32, h as u32, bytes.to_vec()).unwrap();
    assert_eq!(levels.len(), b * h * w * 3);
    levels.chunks_exact(h * w * 3).map(image).collect()
}

struct Run {
    case: Golden,
    pipeline: Pipeline,
    comparison: Comparison,
}

impl Run {
    fn new() -> Self {
        let runtime = Runtime { device: Device::Cpu, dtype: DType::F32 };
        let pipeline = Pipeline::load(&Files::Folder(path("tiny-pipeline")), &runtime, true).unwrap();
        Self { case: Golden::open("sampling"), pipeline, comparison: Comparison::default() }
    }

    /// Paints `targets` pictures and holds latents and pictures to those of the run `name`.
    fn check(&mut self, name: &str, guidance: Guidance, counts: (usize, usize)) {
        self.check_with(name, SampleSettings::new(guidance, self.case.fact("steps"), 16), counts, "");
    }

    fn check_with(&mut self, name: &str, settings: SampleSettings, counts: (usize, usize), negative: &str) {
        let (references, targets) = counts;
        let texts: Vec<String> = self.case.fact("texts");
        // The script's texts are two captions, then two prompts.
        let images = pictures(&self.case.tensor("pictures").narrow(0, 0, references).unwrap());
        let references: Vec<Reference> =
            images.into_iter().zip(&texts).map(|(image, caption)| Reference::new(image, caption.clone())).collect();
        let prompts = texts[2..2 + targets].to_vec();
        let noise = GivenNoise {
            target: self.case.tensor("target").narrow(0, 0, targets).unwrap(),
            reference: (!references.is_empty()).then(|| self.case.tensor("reference").clone()),
            ancestral: Some(self.case.tensor("ancestral").narrow(1, 0, targets).unwrap()),
        };
        let request = SetRequest { references, prompts, negative_prompt: negative.into(), seeds: vec![0; targets] };
        let painted = self.pipeline.paint(&[request], &settings, Some(&noise), &mut || Ok(())).unwrap();
        let expected = self.case.tensor(&format!("{name}.latents"));
        self.comparison.tensor(&format!("{name} latents"), &painted.latents, expected, self.case.fact("tolerance"));
        let expected = pictures(self.case.tensor(&format!("{name}.pictures")));
        assert_eq!(painted.images.len(), expected.len(), "{name}: number of pictures");
        for (found, expected) in painted.images.iter().zip(&expected) {
            let levels = |image: &RgbImage| -> Vec<f64> { image.as_raw().iter().map(|&level| level as f64).collect() };
            // One level: where float32 falls on the other side of a rounding boundary.
            self.comparison.values(
                &format!("{name} picture"),
                &levels(found),
                &levels(expected),
                (1.001 / 255.0, 255.0),
            );
        }
    }
}

#[test]
fn guided_sampling_runs_are_diffusers() {
    let mut run = Run::new();
    let scales: BTreeMap<String, f64> = run.case.fact("scales");
    let (scale, text_scale, image_scale) = (scales["scale"], scales["text_scale"], scales["image_scale"]);
    run.check("joint", Guidance::Joint { scale }, (2, 1));
    run.check("text-first", Guidance::TextFirst { text_scale, image_scale }, (2, 1));
    run.check("image-first", Guidance::ImageFirst { text_scale, image_scale }, (2, 1));
    run.check("text-only", Guidance::TextOnly { scale }, (2, 1));
    run.check("two-targets", Guidance::Joint { scale }, (2, 2));
    run.check("no-references", Guidance::Joint { scale }, (0, 2));
    run.comparison.finish();
}

/// Samplers that scale their x see the references at the noise level that the network is told.
#[test]
fn guided_runs_of_every_sampler_are_diffusers() {
    let mut run = Run::new();
    let scales: BTreeMap<String, f64> = run.case.fact("scales");
    for (name, sampler) in SAMPLERS {
        let plain = SampleSettings::new(Guidance::Joint { scale: scales["scale"] }, run.case.fact("steps"), 16);
        run.check_with(&format!("sampler {name}"), SampleSettings { sampler, ..plain }, (2, 2), "");
    }
    run.comparison.finish();
}

#[test]
fn negative_prompt_and_restraint_are_diffusers() {
    let mut run = Run::new();
    let scales: BTreeMap<String, f64> = run.case.fact("scales");
    let joint = SampleSettings::new(Guidance::Joint { scale: scales["scale"] }, run.case.fact("steps"), 16);
    let guidance = Guidance::TextFirst { text_scale: scales["text_scale"], image_scale: scales["image_scale"] };
    let negative: String = run.case.fact("negative");
    run.check_with("negative", joint.clone(), (2, 2), &negative);
    let restraint = Restraint { is_normalised: true, rescale: 0.0 };
    run.check_with("normalised", SampleSettings { guidance, restraint, ..joint.clone() }, (2, 2), "");
    let restraint = Restraint { is_normalised: false, rescale: 0.7 };
    run.check_with("rescaled", SampleSettings { restraint, ..joint }, (2, 2), "");
    run.comparison.finish();
}

/// In a number format of GPUs, by the compositions that run there. (Candle multiplies no bf16 on the CPU.)
#[test]
fn runs_in_half_precision_are_near() {
    let runtime = Runtime { device: Device::Cpu, dtype: DType::F16 };
    let pipeline = Pipeline::load(&Files::Folder(path("tiny-pipeline")), &runtime, true).unwrap();
    let mut run = Run { pipeline, ..Run::new() };
    let scales: BTreeMap<String, f64> = run.case.fact("scales");
    let texts: Vec<String> = run.case.fact("texts");
    let images = pictures(&run.case.tensor("pictures").narrow(0, 0, 2).unwrap());
    let mut references: Vec<Reference> =
        images.into_iter().zip(&texts).map(|(image, caption)| Reference::new(image, caption.clone())).collect();
    let noise = GivenNoise {
        target: run.case.tensor("target").narrow(0, 0, 1).unwrap(),
        reference: Some(run.case.tensor("reference").clone()),
        ancestral: None,
    };
    let settings = SampleSettings::new(Guidance::Joint { scale: scales["scale"] }, run.case.fact("steps"), 16);
    let paint = |references: &[Reference]| {
        let prompts = texts[2..3].to_vec();
        let request =
            SetRequest { references: references.to_vec(), prompts, negative_prompt: String::new(), seeds: vec![0] };
        run.pipeline.paint(&[request], &settings, Some(&noise), &mut || Ok(())).unwrap()
    };
    let painted = paint(&references);
    // Weights of references go a way of their own.
    references[0].weight = 0.5;
    let weighted = paint(&references);
    assert!(values(&weighted.latents).iter().all(|value| value.is_finite()));
    assert_ne!(values(&weighted.latents), values(&painted.latents));
    // 2.8e-3 was seen; an f16 has eleven bits.
    run.comparison.tensor("f16", &painted.latents, run.case.tensor("joint.latents"), 5e-3);
    run.comparison.finish();
}

/// One branch and one set after the other: the same but for the rounding of sums.
#[test]
fn frugal_runs_are_the_same() {
    let mut run = Run::new();
    let scales: BTreeMap<String, f64> = run.case.fact("scales");
    let joint = SampleSettings::new(Guidance::Joint { scale: scales["scale"] }, run.case.fact("steps"), 16);
    run.check_with("two-targets", SampleSettings { is_frugal: true, ..joint }, (2, 2), "");
    run.comparison.finish();
}

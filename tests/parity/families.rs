//! Stable Diffusion XL, InstructPix2Pix and prediction of v: networks against diffusers and transformers, and whole runs
//! against diffusers' own pipelines.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use jedi::device::Runtime;
use jedi::diffusion::{Guidance, Sampler, mse};
use jedi::model::params::NamedVars;
use jedi::model::{
    AddedConditions, Family, Files, ImageConditions, JointUnet, PromptEncoder, Sight, TextConfig, TextEncoder,
    UnetConfig,
};
use jedi::ops::{self, backward};
use jedi::sample::noise::GivenNoise;
use jedi::sample::{Pipeline, Reference, SampleSettings, SetRequest};
use jedi::shape::SetShape;

use crate::compare::{Comparison, values};
use crate::golden::{Golden, compare_digests, gradients, part_of, path};
use crate::sampling::pictures;

/// eps, loss and gradients of every set size of `cases`; `input` joins what the network takes.
fn check_unet(
    cases: &Golden,
    (unet, vars): (JointUnet, NamedVars),
    images: &[usize],
    input: fn(&BTreeMap<String, Tensor>) -> Tensor,
) {
    let (tolerance, gradient_tolerance): (f64, f64) = (cases.fact("tolerance"), cases.fact("gradient_tolerance"));
    let mut comparison = Comparison::default();
    for images in images {
        let case = cases.below(&format!("n{images}."));
        let input = input(&case);
        let shape = SetShape::from_total(input.dim(0).unwrap(), *images).unwrap();
        let added = case.get("text_embeds").map(|text_embeds| AddedConditions {
            text_embeds: text_embeds.clone(),
            time_ids: case["time_ids"].clone(),
        });
        let told = ImageConditions { context: case["context"].clone(), added };
        let eps = unet.forward_seeing(&input, &case["timesteps"], &told, shape, &Sight::default()).unwrap();
        comparison.tensor(&format!("n{images} eps"), &eps, &case["eps"], tolerance);
        let loss = mse(&eps, &case["noise"]).unwrap();
        comparison.tensor(&format!("n{images} loss"), &loss.reshape(1).unwrap(), &case["loss"], tolerance);
        let found = gradients(&vars, &backward(loss).unwrap(), &mut comparison);
        compare_digests(&mut comparison, &format!("n{images}"), &found, &case["gradients"], gradient_tolerance);
    }
    comparison.finish();
}

fn xl_unet() -> (JointUnet, NamedVars) {
    let (config, weights) = part_of::<UnetConfig>("tiny-xl", "unet", "diffusion_pytorch_model");
    JointUnet::new(&config, weights.params("unet")).unwrap()
}

#[test]
fn xl_unet_is_diffusers_with_coupled_attention() {
    let (unet, vars) = xl_unet();
    assert!(vars.contains_key("add_embedding.linear_1.weight"));
    check_unet(&Golden::open("unet-xl-cases"), (unet, vars), &[1, 2, 3], |case| case["noisy"].clone());
}

/// What its stages keep, and compute again, holds the added conditions too.
#[test]
fn checkpointed_xl_unet_is_diffusers() {
    let (unet, vars) = xl_unet();
    check_unet(&Golden::open("unet-xl-cases"), (unet.checkpointed(), vars), &[2], |case| case["noisy"].clone());
}

#[test]
fn unet_of_eight_channels_is_diffusers() {
    let weights = Golden::open("unet-edit");
    let config: UnetConfig = weights.fact("config");
    let unet = JointUnet::new(&config, weights.params("unet-edit")).unwrap();
    check_unet(&Golden::open("unet-edit-cases"), unet, &[1, 2], |case| {
        Tensor::cat(&[&case["noisy"], &case["reference"]], 1).unwrap()
    });
}

#[test]
fn added_conditions_that_a_network_lacks_or_has_not_are_named() {
    let (cases, (unet, _)) = (Golden::open("unet-xl-cases"), xl_unet());
    let case = cases.below("n1.");
    let shape = SetShape::new(2, 1);
    let plain = unet.forward(&case["noisy"], &case["timesteps"], &case["context"], shape);
    assert!(plain.unwrap_err().to_string().contains("needs added conditions"));
    let edit = Golden::open("unet-edit");
    let unet = JointUnet::new(&edit.fact("config"), edit.params("unet-edit")).unwrap().0;
    let case = Golden::open("unet-edit-cases").below("n1.");
    let added = AddedConditions {
        text_embeds: Tensor::zeros((2, 12), DType::F32, &Device::Cpu).unwrap(),
        time_ids: Tensor::zeros((2, 6), DType::F32, &Device::Cpu).unwrap(),
    };
    let told = ImageConditions { context: case["context"].clone(), added: Some(added) };
    let input = Tensor::cat(&[&case["noisy"], &case["reference"]], 1).unwrap();
    let wrong = unet.forward_seeing(&input, &case["timesteps"], &told, shape, &Sight::default());
    assert!(wrong.unwrap_err().to_string().contains("takes no added conditions"));
}

#[test]
fn xl_text_encoders_are_transformers() {
    let golden = Golden::open("text-xl");
    let (tolerance, gradient_tolerance): (f64, f64) = (golden.fact("tolerance"), golden.fact("gradient_tolerance"));
    let tokens = |name: &str| golden.tensor(name).to_dtype(DType::U32).unwrap();
    let mut comparison = Comparison::default();

    let (config, weights) = part_of::<TextConfig>("tiny-xl", "text_encoder", "model");
    let (first, _) = TextEncoder::new(&config, weights.params("text_encoder")).unwrap();
    comparison.tensor("first", &first.penultimate(&tokens("tokens")).unwrap(), golden.tensor("first"), tolerance);
    assert!(first.penultimate_and_pooled(&tokens("tokens")).unwrap_err().to_string().contains("pools no text"));

    for (case, eos, name) in [("highest", 2, "tokens"), ("end", golden.fact("end"), "tokens"), ("seven", 7, "tokens_7")]
    {
        let (config, weights) = part_of::<TextConfig>("tiny-xl", "text_encoder_2", "model");
        assert_eq!((config.pooled_width(), config.eos_token_id), (Some(12), Some(2)));
        let config = TextConfig { eos_token_id: Some(eos), ..config };
        let (second, vars) = TextEncoder::new(&config, weights.params("text_encoder_2")).unwrap();
        let (context, pooled) = second.penultimate_and_pooled(&tokens(name)).unwrap();
        comparison.tensor(&format!("{case} context"), &context, golden.tensor(&format!("{case}.context")), tolerance);
        comparison.tensor(&format!("{case} pooled"), &pooled, golden.tensor(&format!("{case}.pooled")), tolerance);
        let mean =
            |x: &Tensor, direction: &str| ops::mean_all(&ops::mul(x, golden.tensor(direction)).unwrap()).unwrap();
        let loss = ops::add(&mean(&context, "direction"), &mean(&pooled, "pooled_direction")).unwrap();
        let found = gradients(&vars, &backward(loss).unwrap(), &mut comparison);
        let expected = golden.tensor(&format!("{case}.gradients"));
        compare_digests(&mut comparison, case, &found, expected, gradient_tolerance);
    }
    comparison.finish();
}

#[test]
fn the_second_tokenizer_pads_with_its_own_token_and_the_null_text_is_zeros() {
    let prompts = PromptEncoder::load(&Files::Folder(path("tiny-xl")), &Runtime::cpu()).unwrap();
    let tokens = prompts.tokens("x").unwrap();
    let [first, second] = tokens.as_slice() else { panic!("{} tokenizers", tokens.len()) };
    assert_eq!(first.tokens[..3], second.tokens[..3]);
    // "!" is number 0 of CLIP's vocabulary.
    assert!(first.tokens[3..].iter().all(|&token| token == first.tokens[2]) && second.tokens[3..] == [0; 74]);
    let encoded = prompts.encode(&["x", ""]).unwrap();
    let zeros = |x: &Tensor, row| values(&x.get(row).unwrap()).iter().all(|&value| value == 0.0);
    let pooled = encoded.pooled.unwrap();
    assert!(zeros(&encoded.context, 1) && zeros(&pooled, 1));
    assert!(!zeros(&encoded.context, 0) && !zeros(&pooled, 0));
    assert_eq!((encoded.context.dim(D::Minus1).unwrap(), pooled.dims()), (40, &[2, 12][..]));
}

pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        match path.is_dir() {
            true => copy_folder(&path, &to),
            false => drop(std::fs::copy(path, to).unwrap()),
        }
    }
}

struct Run {
    case: Golden,
    pipeline: Pipeline,
    comparison: Comparison,
}

impl Run {
    fn new(case: &str, folder: &Path) -> Self {
        let pipeline = Pipeline::load(&Files::Folder(folder.to_owned()), &Runtime::cpu(), true).unwrap();
        Self { case: Golden::open(case), pipeline, comparison: Comparison::default() }
    }

    fn check(&mut self, name: &str, requests: &[SetRequest], sampler: Sampler) {
        let steps = self.case.fact("steps");
        let plain = SampleSettings::new(Guidance::Joint { scale: self.case.fact("scale") }, steps, 16);
        let targets: usize = requests.iter().map(|request| request.prompts.len()).sum();
        let noise = GivenNoise {
            target: self.case.tensor("target").narrow(0, 0, targets).unwrap(),
            reference: (!requests[0].references.is_empty()).then(|| self.case.tensor("reference").clone()),
            ancestral: None,
        };
        let settings = SampleSettings { sampler, ..plain };
        let painted = self.pipeline.paint(requests, &settings, Some(&noise), &mut || Ok(())).unwrap();
        self.comparison.tensor(name, &painted.latents, self.case.tensor(name), self.case.fact("tolerance"));
    }
}

fn request(references: Vec<Reference>, prompts: &[String], negative: &str) -> SetRequest {
    let seeds = vec![0; prompts.len()];
    SetRequest { references, prompts: prompts.to_vec(), negative_prompt: negative.into(), seeds }
}

/// Without references every set is one picture, and the network is what diffusers' pipeline runs.
#[test]
fn xl_runs_are_those_of_the_pipeline_of_diffusers() {
    let mut run = Run::new("sampling-xl", &path("tiny-xl"));
    assert_eq!((run.pipeline.native_size(), run.pipeline.is_joint()), (16, false));
    let prompts: Vec<String> = run.case.fact("prompts");
    let singles = |negative: &str| -> Vec<SetRequest> {
        prompts.iter().map(|prompt| request(vec![], std::slice::from_ref(prompt), negative)).collect()
    };
    run.check("plain", &singles(""), Sampler::Ddim);
    let negative: String = run.case.fact("negative");
    run.check("negative", &singles(&negative), Sampler::Ddim);
    let picture = pictures(run.case.tensor("picture")).remove(0);
    let caption: String = run.case.fact("caption");
    run.check("training-free", &[request(vec![Reference::new(picture, caption)], &prompts[..1], "")], Sampler::Ddim);
    run.comparison.finish();
}

/// The model of the other runs, taken for what its index says where no `jedi.json` does: mask and masked picture stand where
/// JeDi's mask and reference do, and what is masked is grey there and not zeros.
#[test]
fn runs_of_a_network_for_inpainting_are_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&path("tiny-pipeline"), folder.path());
    std::fs::remove_file(folder.path().join("jedi.json")).unwrap();
    let mut run = Run::new("sampling-inpainting", folder.path());
    assert_eq!(run.pipeline.family(), Family::Inpainting);
    let texts: Vec<String> = run.case.fact("texts");
    let singles: Vec<_> = texts[1..].iter().map(|prompt| request(vec![], std::slice::from_ref(prompt), "")).collect();
    run.check("plain", &singles, Sampler::Ddim);
    let picture = pictures(run.case.tensor("pictures")).remove(0);
    let references = vec![Reference::new(picture, texts[0].clone())];
    run.check("training-free", &[request(references, &texts[1..], "")], Sampler::Ddim);
    run.comparison.finish();
}

/// The model of the other runs, its scheduler as Stable Diffusion 2 says it.
#[test]
fn runs_of_a_network_that_predicts_v_are_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&path("tiny-pipeline"), folder.path());
    let scheduler = std::fs::read_to_string(path("tiny-pipeline/scheduler/scheduler_config.json")).unwrap();
    let velocity = scheduler.replace("\"epsilon\"", "\"v_prediction\"");
    assert_ne!(velocity, scheduler);
    std::fs::write(folder.path().join("scheduler/scheduler_config.json"), velocity).unwrap();

    let mut run = Run::new("sampling-v", folder.path());
    let texts: Vec<String> = run.case.fact("texts");
    let picture = pictures(run.case.tensor("pictures")).remove(0);
    for (name, sampler) in [
        ("ddim", Sampler::Ddim),
        ("dpm++", Sampler::DpmSolver { is_karras: false }),
        ("euler", Sampler::Euler { is_karras: false }),
    ] {
        let references = vec![Reference::new(picture.clone(), texts[0].clone())];
        run.check(name, &[request(references, &texts[1..], "")], sampler);
    }
    run.comparison.finish();
}

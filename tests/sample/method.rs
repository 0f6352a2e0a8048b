//! The walk written down once more from `docs/design.md` §1, a network call a branch: `jedi sample` must end at the same
//! latents.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use jedi::data::tensor_from_images;
use jedi::model::files::read_safetensors;
use jedi::model::params::Params;
use jedi::model::write::write_tensors;
use jedi::model::{Files, JointUnet, TextEncoder, Tokenizer, Vae};
use jedi::rng::Rng;
use jedi::shape::SetShape;

use crate::tiny_model::{self, Family};
use crate::{MODELS, Room, at, done, toy};

/// ᾱ of SD1.4: β scaled-linear from 0.00085 to 0.012 over 1000 steps.
fn alpha_bar(timestep: usize) -> f64 {
    let beta = |i: usize| (0.00085f64.sqrt() + (0.012f64.sqrt() - 0.00085f64.sqrt()) * i as f64 / 999.0).powi(2);
    (0..=timestep).map(|i| 1.0 - beta(i)).product()
}

struct Parts {
    unet: JointUnet,
    vae: Vae,
    text: TextEncoder,
    tokenizer: Tokenizer,
    family: Family,
}

impl Parts {
    fn load(family: Family) -> Self {
        let name = if family == Family::Joint { "joint" } else { "plain" };
        let files = Files::Folder(MODELS.path().join(name));
        let params = |part: &str| {
            let (tensors, origin) = files.tensors(part).expect("weights");
            Params::checkpoint(tensors, origin, &Device::Cpu, DType::F32, false)
        };
        Self {
            unet: JointUnet::new(&tiny_model::unet_config(family), params("unet")).expect("a U-Net").0,
            vae: Vae::new(&files.json("vae/config.json").expect("a config"), params("vae")).expect("a VAE").0,
            text: TextEncoder::new(&files.json("text_encoder/config.json").expect("a config"), params("text_encoder"))
                .expect("a text encoder")
                .0,
            tokenizer: Tokenizer::read(&files, 20).expect("a tokenizer"),
            family,
        }
    }

    fn context(&self, text: &str) -> Result<Tensor> {
        let tokens = self.tokenizer.encode(text).expect("tokens").tokens;
        self.text.forward(&Tensor::from_vec(tokens, (1, 20), &Device::Cpu)?)
    }
}

/// Which conditions a branch keeps.
#[derive(Clone, Copy)]
struct Keeps {
    text: bool,
    reference: bool,
}

/// A set of one reference with a caption and one target.
struct Set {
    clean: Tensor,
    caption: Tensor,
    prompt: Tensor,
    null: Tensor,
}

/// The predicted noise of the reference and the target, `[2, c, h, w]`.
fn eps(parts: &Parts, set: &Set, x: &Tensor, timestep: usize, keeps: Keeps) -> Result<Tensor> {
    let input = if parts.family == Family::Joint {
        let (ones, zeros) = (Tensor::ones((1, 1, 8, 8), DType::F32, x.device())?, set.clean.zeros_like()?);
        let hidden = Tensor::cat(&[&ones, &zeros], 1)?;
        let given = Tensor::cat(&[&ones.zeros_like()?, &set.clean], 1)?;
        let first = if keeps.reference { &given } else { &hidden };
        Tensor::cat(&[x, &Tensor::cat(&[first, &hidden], 0)?], 1)?
    } else {
        x.clone()
    };
    let contexts = if keeps.text { [&set.caption, &set.prompt] } else { [&set.null, &set.null] };
    let timesteps = Tensor::new(&[timestep as i64], x.device())?;
    parts.unet.forward(&input, &timesteps, &Tensor::cat(&contexts, 0)?, SetShape::new(1, 2))
}

/// The guided noise from that of the branches, which are named by (text kept, references kept).
type Guided = fn(&dyn Fn(bool, bool) -> Result<Tensor>) -> Result<Tensor>;

/// Two steps of DDIM from given noise with the replacement trick (§3.3).
fn walk(parts: &Parts, set: &Set, (target, reference): (&Tensor, &Tensor), guided: Guided) -> Result<Tensor> {
    let mut target = target.clone();
    // Leading spacing with offset 1; behind the last step lies ᾱ₀.
    for (step, (timestep, next)) in [(501, alpha_bar(1)), (1, alpha_bar(0))].into_iter().enumerate() {
        let alpha = alpha_bar(timestep);
        let known = ((&set.clean * alpha.sqrt())? + (reference.get(step)? * (1.0 - alpha).sqrt())?)?;
        let x = Tensor::cat(&[&known, &target], 0)?;
        let eps =
            guided(&|text, reference| eps(parts, set, &x, timestep, Keeps { text, reference }))?.narrow(0, 1, 1)?;
        let clean = ((&target - (&eps * (1.0 - alpha).sqrt())?)? / alpha.sqrt())?;
        target = ((clean * next.sqrt())? + (eps * (1.0 - next).sqrt())?)?;
    }
    Ok(target)
}

#[test]
fn latents_are_those_of_the_formulas() {
    let room = Room::new();
    let noise = room.path("noise.safetensors");
    let normal = |purpose: &str, shape: &[usize]| Rng::new(8, purpose, 0).normal_tensor(shape).expect("a tensor");
    let (target, reference) = (normal("target", &[1, 4, 8, 8]), normal("reference", &[2, 1, 4, 8, 8]));
    let tensors = [("target".to_owned(), target.clone()), ("reference".to_owned(), reference.clone())];
    write_tensors(Path::new(&noise), &tensors.into(), &[]).expect("a writable folder");
    let captioned = format!("{}=a red robot", at("toy.png"));
    // Equations 3 and 4.
    let joint: Guided = |eps| &eps(false, false)? + ((eps(true, true)? - eps(false, false)?)? * 3.0)?;
    let none: Guided = |eps| eps(true, true);
    let text_only: Guided = |eps| &eps(false, true)? + ((eps(true, true)? - eps(false, true)?)? * 4.0)?;
    let text_first: Guided = |eps| {
        let (null, half) = (eps(false, false)?, eps(true, false)?);
        (&null + ((&half - &null)? * 2.0)?)? + ((eps(true, true)? - &half)? * 5.0)?
    };
    let image_first: Guided = |eps| {
        let (null, half) = (eps(false, false)?, eps(false, true)?);
        (&null + ((&half - &null)? * 5.0)?)? + ((eps(true, true)? - &half)? * 2.0)?
    };
    let two_scales = ["--text-scale", "2", "--image-scale", "5"];
    let cases: [(Family, &[&str], Guided); 6] = [
        (Family::Joint, &[], joint),
        (Family::Plain, &[], joint),
        (Family::Joint, &["--scale", "1"], none),
        (Family::Joint, &["--guidance", "text-only", "--scale", "4"], text_only),
        (Family::Joint, &[&["--guidance", "text-first"][..], &two_scales].concat(), text_first),
        (Family::Joint, &[&["--guidance", "image-first"][..], &two_scales].concat(), image_first),
    ];
    for (case, (family, flags, guided)) in cases.into_iter().enumerate() {
        let parts = Parts::load(family);
        let pixels = tensor_from_images(&[toy(32, 32)], &Device::Cpu).expect("a tensor");
        let context = |text: &str| parts.context(text).expect("an encoding");
        let set = Set {
            clean: parts.vae.latents_from_images(&pixels).expect("latents"),
            caption: context("a red robot"),
            prompt: context("the robot in the snow"),
            null: context(""),
        };
        let expected = walk(&parts, &set, (&target, &reference), guided).expect("a walk");

        let saved = room.path("latents.safetensors");
        let (model, out) = (if family == Family::Joint { "joint" } else { "plain" }, case.to_string());
        let fixed =
            ["--ref", &captioned, "--prompt", "the robot in the snow", "--noise", &noise, "--save-latents", &saved];
        done(&room.sample_with(model, &out, &[&fixed, flags].concat()));
        let latents = read_safetensors(Path::new(&saved)).expect("saved latents").remove("latents").expect("latents");
        let largest = |tensor: Tensor| -> f32 {
            let values = tensor.abs().and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1::<f32>()).expect("values");
            values.into_iter().fold(0.0, f32::max)
        };
        let difference = largest((&latents - &expected).expect("one shape"));
        assert!(difference < 1e-4 * largest(expected), "{family:?} {flags:?}: {difference}");
    }
}

//! What must hold of the method whatever the weights: who sees whom inside a batch, and which parameters learn.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use jedi::device::Runtime;
use jedi::diffusion::{Guidance, mse};
use jedi::model::params::{NamedVars, Params};
use jedi::model::{Files, JointUnet, TextConfig, TextEncoder, UnetConfig, Vae, VaeConfig};
use jedi::ops;
use jedi::rng::Rng;
use jedi::sample::{Pipeline, Reference, SampleSettings, SetRequest};
use jedi::shape::SetShape;

fn files() -> Files {
    Files::Folder(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-pipeline"))
}

fn config() -> UnetConfig {
    files().json("unet/config.json").unwrap()
}

/// The tiny pipeline's U-Net, its norms and biases away from ones and zeros.
fn unet(trainable: bool) -> (JointUnet, NamedVars) {
    let (tensors, origin) = files().tensors("unet").unwrap();
    JointUnet::new(&config(), Params::checkpoint(tensors, origin, &Device::Cpu, DType::F32, trainable)).unwrap()
}

/// A random batch for the U-Net.
struct Batch {
    shape: SetShape,
    /// `[b·n, 9, h, w]`.
    input: Tensor,
    /// `[b]`.
    timesteps: Tensor,
    /// `[b·n, l, d]`.
    context: Tensor,
    /// `[b·n, 4, h, w]`.
    noise: Tensor,
}

impl Batch {
    fn new(shape: SetShape) -> Self {
        let mut rng = Rng::new(7, "invariances", 0);
        let total = shape.total();
        let timesteps: Vec<i64> = (0..shape.sets).map(|_| rng.below(1000) as i64).collect();
        Self {
            shape,
            input: rng.normal_tensor(&[total, 9, 4, 6]).unwrap(),
            timesteps: Tensor::new(timesteps, &Device::Cpu).unwrap(),
            context: rng.normal_tensor(&[total, 5, config().cross_attention_dim]).unwrap(),
            noise: rng.normal_tensor(&[total, 4, 4, 6]).unwrap(),
        }
    }

    /// The images `picks` alone, as sets of `shape`, all with the timesteps `timesteps`.
    fn picked(&self, shape: SetShape, picks: &[u32], timesteps: Tensor) -> Self {
        let picks = Tensor::new(picks, &Device::Cpu).unwrap();
        let pick = |tensor: &Tensor| tensor.index_select(&picks, 0).unwrap();
        let (input, context, noise) = (pick(&self.input), pick(&self.context), pick(&self.noise));
        Self { shape, input, timesteps, context, noise }
    }

    /// The same batch with other latents in image `image`.
    fn with_other_image(&self, image: usize) -> Self {
        let mut rows = self.input.chunk(self.shape.total(), 0).unwrap();
        rows[image] = (&rows[image] * -0.7).unwrap();
        let picks: Vec<u32> = (0..self.shape.total() as u32).collect();
        Self { input: Tensor::cat(&rows, 0).unwrap(), ..self.picked(self.shape, &picks, self.timesteps.clone()) }
    }

    fn eps(&self, unet: &JointUnet) -> Tensor {
        unet.forward(&self.input, &self.timesteps, &self.context, self.shape).unwrap()
    }

    fn gradients(&self, unet: &JointUnet, vars: &NamedVars) -> BTreeMap<String, Vec<f32>> {
        gradients(mse(&self.eps(unet), &self.noise).unwrap(), vars)
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn image_of(eps: &Tensor, image: usize) -> Vec<f32> {
    values(&eps.get(image).unwrap())
}

/// Largest difference, relative to the largest magnitude of `b`.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    a.iter().zip(b).fold(0f32, |distance, (a, b)| distance.max((a - b).abs())) / largest
}

/// Every parameter's gradient.
fn gradients(loss: Tensor, vars: &NamedVars) -> BTreeMap<String, Vec<f32>> {
    let store = ops::backward(loss).unwrap();
    let gradient = |name: &String| store.get(&vars[name]).unwrap_or_else(|| panic!("{name}: no gradient"));
    vars.keys().map(|name| (name.clone(), values(gradient(name)))).collect()
}

#[test]
fn a_set_of_one_is_the_uncoupled_network() {
    let batch = Batch::new(SetShape::new(1, 3));
    let timesteps = batch.timesteps.repeat(3).unwrap();
    let apart = batch.picked(SetShape::new(3, 1), &[0, 1, 2], timesteps).eps(&unet(false).0);
    let uncoupled = batch.eps(&unet(false).0.uncoupled());
    assert_eq!(values(&apart), values(&uncoupled));
    // And coupling matters: otherwise the line above would prove nothing.
    assert!(distance(&values(&batch.eps(&unet(false).0)), &values(&uncoupled)) > 1e-3);
}

#[test]
fn permuting_the_images_of_a_set_permutes_the_outputs() {
    let (unet, _) = unet(false);
    let batch = Batch::new(SetShape::new(2, 3));
    let order = [2, 0, 1, 4, 5, 3];
    let eps = batch.eps(&unet);
    let permuted = batch.picked(batch.shape, &order, batch.timesteps.clone()).eps(&unet);
    for (place, &image) in order.iter().enumerate() {
        // Not bit for bit: a softmax over the keys sums them in another order.
        assert!(distance(&image_of(&permuted, place), &image_of(&eps, image as usize)) < 1e-5, "image {image}");
    }
}

#[test]
fn sets_of_a_batch_do_not_see_each_other() {
    let (unet, _) = unet(false);
    let batch = Batch::new(SetShape::new(2, 2));
    let (eps, other) = (batch.eps(&unet), batch.with_other_image(0).eps(&unet));
    assert!(distance(&image_of(&other, 0), &image_of(&eps, 0)) > 1e-3);
    assert!(distance(&image_of(&other, 1), &image_of(&eps, 1)) > 1e-4, "images of one set see each other");
    assert_eq!(image_of(&other, 2), image_of(&eps, 2));
    assert_eq!(image_of(&other, 3), image_of(&eps, 3));
}

/// Every gradient is finite and not zero, but for the keys' biases: they add the same to all scores of a query, which
/// leaves nothing but rounding.
fn assert_all_learn(gradients: &BTreeMap<String, Vec<f32>>) {
    assert!(!gradients.is_empty());
    for (name, gradient) in gradients {
        assert!(gradient.iter().all(|value| value.is_finite()), "{name}: gradient not finite");
        let largest = gradient.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        match name.ends_with("to_k.bias") || name.ends_with("k_proj.bias") {
            true => assert!(largest < 1e-5, "{name}: gradient {largest} cannot be"),
            false => assert!(largest > 1e-8, "{name}: gradient zero"),
        }
    }
}

#[test]
fn every_parameter_of_the_unet_learns() {
    let (unet, vars) = JointUnet::new(&config(), Params::random(3, &Device::Cpu, DType::F32)).unwrap();
    assert_all_learn(&Batch::new(SetShape::new(2, 3)).gradients(&unet, &vars));
}

#[test]
fn every_parameter_of_the_vae_learns() {
    let config: VaeConfig = files().json("vae/config.json").unwrap();
    let (vae, vars) = Vae::new(&config, Params::random(4, &Device::Cpu, DType::F32)).unwrap();
    let picture = Rng::new(7, "invariances", 1).normal_tensor(&[2, 3, 8, 12]).unwrap();
    let moments = vae.encode(&picture).unwrap();
    let decoded = vae.decode_unscaled(&moments.mean).unwrap();
    let spread = ops::mean_all(&ops::square(&moments.logvar).unwrap()).unwrap();
    assert_all_learn(&gradients(ops::add(&mse(&decoded, &picture).unwrap(), &spread).unwrap(), &vars));
}

#[test]
fn every_parameter_of_the_text_encoder_learns_through_the_unet() {
    let config: TextConfig = files().json("text_encoder/config.json").unwrap();
    let (text, vars) = TextEncoder::new(&config, Params::random(5, &Device::Cpu, DType::F32)).unwrap();
    let (unet, _) = unet(false);
    let batch = Batch::new(SetShape::new(1, 2));
    let tokens: Vec<u32> = (0..2 * 77).map(|i| i * 3 % config.vocab_size as u32).collect();
    let context = text.forward(&Tensor::from_vec(tokens, (2, 77), &Device::Cpu).unwrap()).unwrap();
    let eps = unet.forward(&batch.input, &batch.timesteps, &context, batch.shape).unwrap();
    assert_all_learn(&gradients(mse(&eps, &batch.noise).unwrap(), &vars));
}

#[test]
fn frozen_parameters_get_no_gradient() {
    let batch = Batch::new(SetShape::new(1, 2));
    let (frozen, vars) = unet(false);
    assert!(vars.is_empty());
    assert!(!batch.eps(&frozen).track_op(), "a frozen network records no history");
    let (trainable, vars) = unet(true);
    assert!(!vars.is_empty() && batch.eps(&trainable).track_op());
}

#[test]
fn micro_batches_add_up_to_the_gradient_of_the_batch() {
    let (unet, vars) = unet(true);
    let batch = Batch::new(SetShape::new(4, 2));
    let whole = batch.gradients(&unet, &vars);
    let micro = |first: u32| {
        let picks: Vec<u32> = (2 * first..2 * first + 4).collect();
        let timesteps = batch.timesteps.narrow(0, first as usize, 2).unwrap();
        batch.picked(SetShape::new(2, 2), &picks, timesteps).gradients(&unet, &vars)
    };
    let (a, b) = (micro(0), micro(2));
    for (name, whole) in &whole {
        let mean: Vec<f32> = a[name].iter().zip(&b[name]).map(|(a, b)| (a + b) / 2.0).collect();
        assert!(distance(&mean, whole) < 1e-4, "{name}: {}", distance(&mean, whole));
    }
}

#[test]
fn a_seed_gives_the_same_picture_in_any_batch() {
    let pipeline = Pipeline::load(&files(), &Runtime::cpu(), true).unwrap();
    let request = |seed: u64| SetRequest {
        references: vec![Reference::new(
            RgbImage::from_fn(16, 16, |x, y| image::Rgb([16 * x as u8, 16 * y as u8, seed as u8])),
            "a toy",
        )],
        prompts: vec!["the toy on the table".into()],
        negative_prompt: String::new(),
        seeds: vec![seed],
    };
    let settings = SampleSettings::new(Guidance::Joint { scale: 3.0 }, 3, 16);
    let paint = |requests: &[SetRequest]| pipeline.paint(requests, &settings, None, &mut || Ok(())).unwrap().latents;
    let (alone, together) = (paint(&[request(11)]), paint(&[request(5), request(11)]));
    assert!(distance(&image_of(&together, 1), &image_of(&alone, 0)) < 1e-5);
    assert!(distance(&image_of(&together, 0), &image_of(&alone, 0)) > 1e-2, "another seed is another picture");
}

//! Runs of whole networks with random weights, of a training step and of a whole `sample`. No checkpoint is read but the
//! embedded model's.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use candle_core::{DType, Tensor};
use image::{Rgb, RgbImage};
use jedi::config;
use jedi::data::SetSource;
use jedi::device::Runtime;
use jedi::diffusion::Guidance;
use jedi::model::params::{NamedVars, Params};
use jedi::model::{Files, JointUnet, TextConfig, TextEncoder, UnetConfig, Vae, VaeConfig, toybox};
use jedi::ops;
use jedi::rng::Rng;
use jedi::sample::{Pipeline, Reference, SampleSettings, SetRequest};
use jedi::shape::SetShape;
use jedi::synth::toybox::{HeldOutToys, ToyboxSource};
use jedi::train::optimizer::Optimizer;
use jedi::train::{JointObjective, Objective as _, TrainConfig};

use super::case::{Model, Pass, Precision, Work};
use super::operations::{Run, Updates};
use super::place;

pub fn prepare(work: &Work) -> Result<Run> {
    match *work {
        Work::Unet { model, sets, images, size, pass, dtype, checkpointing, update } => {
            let shape = SetShape::new(sets, images);
            Ok(in_precision(dtype, unet(&files(model), shape, size, (pass, checkpointing, update))?))
        }
        Work::TrainStep { images, set_size, dtype } => Ok(in_precision(dtype, train_step(images, set_size)?)),
        Work::VaeDecode { images, size } => vae_decode(images, size),
        Work::TextEncoder { prompts } => text_encoder(prompts),
        Work::Sample { steps } => sample(steps),
        _ => bail!("{work:?}: not a network"),
    }
}

/// The same with matrix products of bf16 factors, as PyTorch's autocast computes them, or in f32.
fn in_precision(dtype: Precision, mut run: Run) -> Run {
    let precision = match dtype {
        Precision::F32 => ops::Precision::Highest,
        Precision::Bf16 => ops::Precision::Medium,
    };
    Box::new(move || {
        ops::set_matmul_precision(precision);
        let seconds = run();
        ops::set_matmul_precision(ops::Precision::Highest);
        seconds
    })
}

/// The U-Net's config of a family.
pub fn unet_config(model: Model) -> Result<UnetConfig> {
    files(model).json("unet/config.json")
}

fn files(model: Model) -> Files {
    Files::Folder(in_repository(match model {
        Model::Sd14 => "benches/sd14",
        Model::Toybox => "configs/toybox/architecture",
    }))
}

fn in_repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn fresh() -> Params {
    Params::random(0, &place::runtime().device, DType::F32)
}

/// The drawn weights without history, for a network that only predicts.
fn frozen(vars: NamedVars) -> Params {
    let tensors = vars.into_iter().map(|(name, var)| (name, var.as_detached_tensor())).collect();
    let Runtime { device, dtype } = place::runtime();
    Params::checkpoint(tensors, "drawn weights", device, *dtype, false)
}

fn normal(index: u64, shape: &[usize]) -> Result<Tensor> {
    Ok(place::there(&Rng::new(0, "bench", index).normal_tensor(shape)?)?)
}

/// With `update`, what a training step does behind its loss: gradients, clipping, AdamW, averaged weights.
fn unet(files: &Files, shape: SetShape, size: usize, (pass, checkpointing, update): (Pass, bool, bool)) -> Result<Run> {
    let config: UnetConfig = files.json("unet/config.json")?;
    let text: TextConfig = files.json("text_encoder/config.json")?;
    let (mut unet, mut vars) = JointUnet::new(&config, fresh())?;
    if pass == Pass::Forward {
        unet = JointUnet::new(&config, frozen(std::mem::take(&mut vars)))?.0;
    }
    if checkpointing {
        unet = unet.checkpointed();
    }
    let side = size / 8;
    let context_shape = [shape.total(), text.max_position_embeddings, config.cross_attention_dim];
    let input = normal(0, &[shape.total(), config.in_channels, side, side])?;
    let context = normal(1, &context_shape)?;
    let timesteps = Tensor::full(500i64, shape.sets, &place::runtime().device)?;
    let mut updates = update.then(|| Updates::of(vars.values().cloned().collect())).transpose()?;
    Ok(Box::new(move || {
        let started = place::now()?;
        let output = unet.forward(&input, &timesteps, &context, shape)?;
        let forward = place::since(started)?;
        if pass == Pass::Forward {
            black_box(output);
            return Ok(forward);
        }
        let loss = ops::mean_all(&ops::square(&ops::cast(&output, DType::F32)?)?)?;
        drop(output);
        let mut gradients = ops::backward(loss)?;
        if let Some(updates) = &mut updates {
            let taken: Option<Vec<Tensor>> = vars.values().map(|var| gradients.remove(var)).collect();
            updates.make(&taken.context("a parameter got no gradient")?)?;
            return Ok(place::since(started)?);
        }
        let both = place::since(started)?;
        // A gradient that was not computed would make the figure a lie.
        if let Some((name, _)) = vars.iter().find(|(_, var)| gradients.get(var).is_none()) {
            bail!("parameter {name} got no gradient");
        }
        Ok(if pass == Pass::Both { both } else { both - forward })
    }))
}

/// Steps of `configs/toybox/joint.toml` on as many sets as a step takes, whose latents the first step caches.
fn train_step(images: usize, set_size: usize) -> Result<Run> {
    let runtime = place::runtime();
    let overrides = [
        format!("run.dtype={}", if runtime.dtype == DType::BF16 { "bf16" } else { "f32" }),
        format!("model.architecture={}", in_repository("configs/toybox/architecture").display()),
        format!("model.vae={}", in_repository("configs/toybox/model").display()),
        format!("data.sets={}", images / set_size),
        format!("run.images_per_step={images}"),
        format!("joint.set_sizes=[{set_size}]"),
    ];
    let config: TrainConfig = config::load(&in_repository("configs/toybox/joint.toml"), &overrides)?;
    let data = &config.data;
    let source = ToyboxSource { seed: data.seed, sets: data.sets, images: data.images, size: data.size };
    let toys: Arc<dyn SetSource> = Arc::new(HeldOutToys { images: 4, size: data.size });
    let validation = vec![("toybox".to_owned(), toys)];
    let runtime = Runtime { dtype: DType::F32, ..runtime.clone() };
    let mut objective = JointObjective::new(&config, &runtime, Arc::new(source), validation)?;
    let mut optimizer = Optimizer::new(&config, objective.parameters())?;
    Ok(Box::new(move || {
        let started = place::now()?;
        let loss = objective.loss(optimizer.step())?;
        optimizer.update(ops::backward(loss)?)?;
        Ok(place::since(started)?)
    }))
}

fn vae_decode(images: usize, size: usize) -> Result<Run> {
    let config: VaeConfig = files(Model::Sd14).json("vae/config.json")?;
    let (_, vars) = Vae::new(&config, fresh())?;
    let (vae, _) = Vae::new(&config, frozen(vars))?;
    let side = size / config.downscale();
    let latents = normal(0, &[images, config.latent_channels, side, side])?;
    Ok(Box::new(move || {
        let started = place::now()?;
        let pictures = vae.decode(&latents)?;
        let seconds = place::since(started)?;
        black_box(pictures);
        Ok(seconds)
    }))
}

fn text_encoder(prompts: usize) -> Result<Run> {
    let config: TextConfig = files(Model::Sd14).json("text_encoder/config.json")?;
    let (_, vars) = TextEncoder::new(&config, fresh())?;
    let (text, _) = TextEncoder::new(&config, frozen(vars))?;
    let length = config.max_position_embeddings;
    let tokens: Vec<u32> = (0..prompts * length).map(|i| (i * 7919 % config.vocab_size) as u32).collect();
    let tokens = Tensor::from_vec(tokens, (prompts, length), &place::runtime().device)?;
    Ok(Box::new(move || {
        let started = place::now()?;
        let context = text.forward(&tokens)?;
        let seconds = place::since(started)?;
        black_box(context);
        Ok(seconds)
    }))
}

/// One reference, one new picture, joint guidance; without loading the model.
fn sample(steps: usize) -> Result<Run> {
    let pipeline = Pipeline::load(&Files::Embedded(toybox::FILES), place::runtime(), true)?;
    let size = pipeline.native_size();
    let image = RgbImage::from_fn(size as u32, size as u32, |x, y| Rgb([4 * x as u8, 4 * y as u8, 128]));
    let request = SetRequest {
        references: vec![Reference::new(image, "a photo of a robot")],
        prompts: vec!["a photo of a robot on the beach".into()],
        negative_prompt: String::new(),
        seeds: vec![0],
    };
    let guidance = Guidance::Joint { scale: 3.0 };
    let settings = SampleSettings::new(guidance, steps, size);
    Ok(Box::new(move || {
        let started = place::now()?;
        let painted = pipeline.paint(std::slice::from_ref(&request), &settings, None, &mut || Ok(()))?;
        let seconds = place::since(started)?;
        black_box(painted.images);
        Ok(seconds)
    }))
}

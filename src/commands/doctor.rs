//! `jedi doctor`: what this machine, this build and a model can do.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use serde::Serialize;

use super::models;
use crate::cli::DoctorArgs;
use crate::device::Runtime;
use crate::diffusion::mse;
use crate::model::hub::{Failure, Hub, Settings};
use crate::model::params::Params;
use crate::model::{JointUnet, UnetConfig};
use crate::rng::Rng;
use crate::sample::Pipeline;
use crate::shape::SetShape;
use crate::{ops, report};

/// Memory below which Stable Diffusion in f32 does not fit beside its activations.
const LITTLE_MEMORY: u64 = 8_000_000_000;

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    Warn,
    Fail,
}

/// The outcome of one check.
#[derive(Serialize)]
struct Finding {
    check: &'static str,
    state: State,
    says: String,
}

impl Finding {
    fn new(check: &'static str, state: State, says: impl Into<String>) -> Self {
        Self { check, state, says: says.into() }
    }

    /// What a check found, or why it failed.
    fn of(check: &'static str, result: Result<String>) -> Self {
        match result {
            Ok(says) => Self::new(check, State::Ok, says),
            Err(error) => Self::new(check, State::Fail, format!("{error:#}")),
        }
    }

    fn line(&self) -> String {
        let state = match self.state {
            State::Ok => "ok  ",
            State::Warn => "warn",
            State::Fail => "FAIL",
        };
        format!("{state}  {:<10}  {}", self.check, self.says)
    }
}

pub fn run(args: &DoctorArgs) -> Result<()> {
    let mut has_failed = false;
    let mut tell = |finding: Finding| -> Result<()> {
        has_failed |= finding.state == State::Fail;
        let line = if args.json { serde_json::to_string(&finding)? } else { finding.line() };
        Ok(report::result(line)?)
    };
    tell(build())?;
    tell(processor())?;
    tell(memory())?;
    let runtime = Runtime::open(args.device.name());
    tell(Finding::of("device", runtime.as_ref().map(device).map_err(|error| anyhow::anyhow!("{error:#}"))))?;
    let runtime = runtime.unwrap_or_else(|_| Runtime::cpu());
    tell(Finding::of("gradients", gradient_flow(&runtime.device)))?;
    if !runtime.device.is_cpu() {
        for finding in operations(&runtime.device) {
            tell(finding)?;
        }
    }
    match Settings::from_env() {
        Ok(settings) => {
            tell(cache(&settings))?;
            tell(hub(settings))?;
        }
        Err(error) => tell(Finding::of("hub", Err(error)))?,
    }
    tell(Finding::of("model", model(&args.model, args.tokenizer.as_deref(), &runtime)))?;
    if has_failed {
        bail!("something does not work; the lines marked FAIL say what");
    }
    Ok(())
}

fn build() -> Finding {
    let parts = [
        (cfg!(feature = "cuda"), "CUDA", "cuda"),
        (cfg!(feature = "cudnn"), "cuDNN", "cudnn"),
        (cfg!(feature = "mpi"), "MPI", "mpi"),
        (cfg!(feature = "nccl"), "NCCL", "nccl"),
    ];
    let parts = parts.map(|(is_in, name, feature)| match is_in {
        true => format!("with {name}"),
        false => format!("without {name} (cargo build --features {feature})"),
    });
    let says = format!("jedi {} for {}, {}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH, parts.join(", "));
    match cfg!(debug_assertions) {
        false => Finding::new("build", State::Ok, says),
        true => Finding::new("build", State::Warn, format!("{says}; not optimised, slow: use cargo build --release")),
    }
}

fn processor() -> Finding {
    let (instructions, threads) = (ops::instructions(), ops::threads());
    match instructions.as_slice() {
        [] => {
            let says = format!("{threads} threads; no AVX2, AVX-512, AMX or NEON, so that the kernels are slow here");
            Finding::new("processor", State::Warn, says)
        }
        some => Finding::new("processor", State::Ok, format!("{threads} threads, {}", some.join(", "))),
    }
}

fn memory() -> Finding {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kilobytes = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next());
    let Some(bytes) = kilobytes.and_then(|kilobytes| kilobytes.parse::<u64>().ok()).map(|kb| kb * 1024) else {
        return Finding::new("memory", State::Warn, "how much is free cannot be told on this system");
    };
    let says = format!("{:.1} GB free", bytes as f64 / 1e9);
    match bytes < LITTLE_MEMORY {
        false => Finding::new("memory", State::Ok, says),
        true => {
            let says = format!("{says}; for Stable Diffusion at 512 pixels close other programs or use --low-memory");
            Finding::new("memory", State::Warn, says)
        }
    }
}

fn device(runtime: &Runtime) -> String {
    match &runtime.device {
        Device::Cpu if cfg!(feature = "cuda") => "the CPU: no GPU answers".into(),
        Device::Cpu => "the CPU".into(),
        _ => "a GPU by CUDA".into(),
    }
}

/// Every operation on a GPU against the CPU's, forward and backward, in each number format.
fn operations(device: &Device) -> Vec<Finding> {
    let mut findings = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        match ops::agreement(device, dtype) {
            Ok(found) => findings.extend(found.iter().map(|own| {
                let state = if own.holds() { State::Ok } else { State::Fail };
                let says = format!(
                    "{}, {}: {:.1e} from the CPU's, forward and backward; {:.0e} allowed",
                    own.operation,
                    dtype.as_str(),
                    own.gap,
                    own.allowed
                );
                Finding::new("operation", state, says)
            })),
            Err(error) => {
                let says = format!("in {}: {error:#}", dtype.as_str());
                findings.push(Finding::new("operation", State::Fail, says));
            }
        }
    }
    findings
}

/// Where models of the hub are kept.
fn cache(settings: &Settings) -> Finding {
    let place = settings.cache.display();
    if !settings.cache.exists() {
        return Finding::new("cache", State::Ok, format!("{place} will be made for models of the hub"));
    }
    // A folder that cannot be read holds none that could be used.
    let entries = fs::read_dir(&settings.cache).into_iter().flatten().flatten();
    let n_models = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("models--")).count();
    let probe = settings.cache.join(format!(".jedi-doctor.{}", std::process::id()));
    let can_write = fs::write(&probe, "").and_then(|()| fs::remove_file(&probe));
    match can_write {
        Ok(()) => Finding::new("cache", State::Ok, format!("{place}; models of the hub there: {n_models}")),
        Err(error) => {
            let says = format!("{place} takes no more ({error}), set HF_HOME; models of the hub there: {n_models}");
            Finding::new("cache", State::Warn, says)
        }
    }
}

/// Whether the hub answers; without it, models in folders and in the cache work all the same.
fn hub(settings: Settings) -> Finding {
    const TIMEOUT: Duration = Duration::from_secs(2);
    if settings.is_offline {
        return Finding::new("hub", State::Ok, "HF_HUB_OFFLINE is set: models come from folders and the cache alone");
    }
    let (endpoint, token) = (settings.endpoint.clone(), settings.token.clone());
    let started = Instant::now();
    let account = Hub::new(Settings { timeout: TIMEOUT, ..settings }).account();
    let seconds = started.elapsed().as_secs_f64();
    let (state, says) = match (account, token) {
        (Ok(Some(account)), _) => (State::Ok, format!("{endpoint} answers in {seconds:.1} s, to {account}")),
        (Ok(None), None) => {
            let says = format!("{endpoint} answers in {seconds:.1} s; for private and gated models set HF_TOKEN");
            (State::Ok, says)
        }
        (Ok(None), Some(token)) => {
            let says =
                format!("{endpoint} answers, but does not accept the token of {}; make another one", token.origin);
            (State::Warn, says)
        }
        (Err(Failure::Unreachable(cause) | Failure::Passing { cause, .. }), _) => {
            let says = format!(
                "{cause}; models in folders and in the cache work; for others check the network, HTTPS_PROXY, HF_ENDPOINT"
            );
            (State::Warn, says)
        }
        (Err(Failure::Final(error)), _) => (State::Warn, format!("{error:#}")),
    };
    Finding::new("hub", state, says)
}

/// Loads a whole model, which shows that its parts fit, and encodes a prompt.
fn model(name: &str, tokenizer: Option<&Path>, runtime: &Runtime) -> Result<String> {
    let started = Instant::now();
    let pipeline = Pipeline::load(&models::open(name, tokenizer)?, runtime, true)?;
    pipeline.tokenizer().encode("a photo of a robot")?;
    let kind =
        if pipeline.is_joint() { "takes references" } else { "plain Stable Diffusion: references training-free" };
    let (side, seconds) = (pipeline.native_size(), started.elapsed().as_secs_f64());
    Ok(format!("{name}: {kind}, {side}×{side} pixels, loaded in {seconds:.1} s"))
}

/// Every parameter of a small joint U-Net gets a finite gradient that is not zero: what training depends on, and what
/// operations of Candle can lose without an error.
fn gradient_flow(device: &Device) -> Result<String> {
    let config: UnetConfig = serde_json::from_value(serde_json::json!({
        "sample_size": 8, "in_channels": 9, "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [16, 32], "layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 16,
        "norm_num_groups": 4,
    }))?;
    let (unet, variables) = JointUnet::new(&config, Params::random(1, device, DType::F32))?;
    let shape = SetShape::new(1, 2);
    let mut rng = Rng::new(1, "doctor", 0);
    let mut normal = |shape: &[usize]| -> Result<Tensor> { Ok(rng.normal_tensor(shape)?.to_device(device)?) };
    let (input, context, noise) = (normal(&[2, 9, 8, 8])?, normal(&[2, 7, 16])?, normal(&[2, 4, 8, 8])?);
    let timesteps = Tensor::new(&[400i64], device)?;
    let loss = mse(&unet.forward(&input, &timesteps, &context, shape)?, &noise)?;
    let gradients = ops::backward(loss)?;
    for (name, variable) in &variables {
        let Some(gradient) = gradients.get(variable) else {
            bail!("{name} gets no gradient; do not train with this build")
        };
        let largest = gradient.abs()?.max_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
        ensure!(
            largest.is_finite() && largest > 0.0,
            "the largest gradient of {name} is {largest}; do not train with this build"
        );
    }
    Ok(format!("all {} parameters of a small U-Net have one", variables.len()))
}

//! `jedi inspect eps`: the U-Net once on given tensors, with its loss and gradients.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;

use super::models::{self, Part};
use crate::cli::InspectEpsArgs;
use crate::device::Runtime;
use crate::diffusion::mse;
use crate::invalid::invalid;
use crate::model::conditions::N_SIZES;
use crate::model::write::write_tensors;
use crate::model::{AddedConditions, ImageConditions, JointUnet, Sight, UnetConfig};
use crate::ops;
use crate::report;
use crate::shape::SetShape;

pub fn run(args: InspectEpsArgs) -> Result<()> {
    let files = models::open_parts(&args.model, None, &[Part::Unet])?;
    let config: UnetConfig = files.json("unet/config.json")?;
    let inputs = Inputs::read(&args.inputs)?;
    let call = Call::new(&inputs, &config)?;
    if args.grads && call.noise.is_none() {
        return Err(invalid(format!("--grads: {}: tensor noise is missing, so there is no loss", inputs.name)));
    }
    let (unet, vars) = JointUnet::new(&config, files.params("unet", &Runtime::cpu(), args.grads)?)?;
    let eps = unet.forward_seeing(&call.input, &call.timesteps, &call.told, call.shape, &Sight::default());
    let eps = eps.context(inputs.name)?;
    let mut outputs = BTreeMap::from([("eps".to_owned(), eps.detach())]);
    if let Some(noise) = &call.noise {
        let loss = mse(&eps, noise)?;
        outputs.insert("loss".to_owned(), loss.detach().reshape(1)?);
        if args.grads {
            let gradients = ops::backward(loss)?;
            for (name, var) in &vars {
                let gradient = gradients.get(var).with_context(|| format!("parameter {name} got no gradient"))?;
                outputs.insert(format!("grad.{name}"), gradient.contiguous()?);
            }
        }
    }
    write_tensors(&args.outputs, &outputs, &[("set_size", call.shape.images.to_string())])?;
    Ok(report::result(args.outputs.display().to_string())?)
}

/// A safetensors file with its metadata; errors name it and the tensor.
struct Inputs {
    name: String,
    tensors: HashMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

impl Inputs {
    fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        if !path.is_file() {
            return Err(invalid(format!("--inputs {name}: no such file; check the path")));
        }
        let bytes = std::fs::read(path).with_context(|| name.clone())?;
        let broken = || format!("{name}: not a readable safetensors file");
        let (_, header) = SafeTensors::read_metadata(&bytes).with_context(broken)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).with_context(broken)?;
        Ok(Self { name, tensors, metadata })
    }

    fn get(&self, key: &str) -> Result<&Tensor> {
        self.tensors.get(key).with_context(|| format!("{}: tensor {key} is missing", self.name))
    }

    /// The tensor in f32, which must have this shape.
    fn shaped(&self, key: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.get(key)?;
        let found = tensor.dims();
        ensure!(found == shape, "{}: tensor {key} has shape {found:?}, here it must be {shape:?}", self.name);
        Ok(tensor.to_dtype(DType::F32)?)
    }

    fn set_size(&self) -> Result<usize> {
        let name = &self.name;
        let Some(text) = self.metadata.get("set_size") else {
            bail!("{name}: metadata set_size is missing; it says how many images a set has");
        };
        match text.trim().parse() {
            Ok(size) if size > 0 => Ok(size),
            _ => bail!("{name}: metadata set_size is {text:?}; it must be a whole number of images, 1 or more"),
        }
    }
}

/// The arguments of one call of the network.
struct Call {
    shape: SetShape,
    /// `[b·n, in_channels, h, w]`.
    input: Tensor,
    /// `[b]`.
    timesteps: Tensor,
    told: ImageConditions,
    /// `[b·n, c, h, w]`.
    noise: Option<Tensor>,
}

impl Call {
    fn new(inputs: &Inputs, config: &UnetConfig) -> Result<Self> {
        let name = &inputs.name;
        let c = config.latent_channels();
        let found = inputs.get("noisy")?.dims();
        let &[total, _, h, w] = found else {
            bail!("{name}: tensor noisy has shape {found:?}, it must be [b·n, {c}, h, w]");
        };
        let noisy = inputs.shaped("noisy", &[total, c, h, w])?;
        let multiple = 1 << (config.block_out_channels.len().max(1) - 1);
        ensure!(
            h % multiple == 0 && w % multiple == 0,
            "{name}: tensor noisy is {h}×{w}, this network takes multiples of {multiple}"
        );
        let shape = SetShape::from_total(total, inputs.set_size()?).with_context(|| format!("{name}: tensor noisy"))?;
        let reference = || inputs.shaped("reference", &[total, c, h, w]);
        let input = if config.is_joint() {
            let mask = inputs.shaped("mask", &[total, 1, h, w])?;
            Tensor::cat(&[&noisy, &mask, &reference()?], 1)? // [b·n, 2c + 1, h, w]
        } else if config.in_channels == 2 * c {
            Tensor::cat(&[&noisy, &reference()?], 1)? // [b·n, 2c, h, w]
        } else {
            ensure!(
                config.in_channels == c,
                "unet/config.json: in_channels {} is neither {c} nor {} (InstructPix2Pix) nor {} (joint)",
                config.in_channels,
                2 * c,
                2 * c + 1
            );
            noisy
        };
        let timesteps = inputs.get("timesteps")?;
        ensure!(
            timesteps.dims() == [shape.sets],
            "{name}: tensor timesteps has shape {:?}, here it must be {:?}: one a set",
            timesteps.dims(),
            [shape.sets]
        );
        let context = inputs.get("context")?;
        let width = config.cross_attention_dim;
        ensure!(
            matches!(context.dims(), &[images, _, d] if images == total && d == width),
            "{name}: tensor context has shape {:?}, here it must be [{total}, l, {width}]",
            context.dims()
        );
        let noise = match inputs.tensors.contains_key("noise") {
            true => Some(inputs.shaped("noise", &[total, c, h, w])?),
            false => None,
        };
        let timesteps = timesteps.to_dtype(DType::I64)?;
        let told = ImageConditions { context: context.to_dtype(DType::F32)?, added: added(inputs, config, total)? };
        Ok(Self { shape, input, timesteps, told, noise })
    }
}

/// What Stable Diffusion XL is told besides the text; None for a network that is told nothing.
fn added(inputs: &Inputs, config: &UnetConfig, total: usize) -> Result<Option<AddedConditions>> {
    if !config.takes_added_conditions() {
        return Ok(None);
    }
    let found = inputs.get("time_ids")?.dims();
    let &[_, n_sizes] = found else {
        bail!("{}: tensor time_ids has shape {found:?}, it must be [b·n, {N_SIZES}]", inputs.name);
    };
    let time_ids = inputs.shaped("time_ids", &[total, n_sizes])?;
    let Some(width) = config.pooled_width(n_sizes) else {
        bail!("{}: tensor time_ids has {n_sizes} numbers an image, more than this network takes", inputs.name);
    };
    Ok(Some(AddedConditions { text_embeds: inputs.shaped("text_embeds", &[total, width])?, time_ids }))
}

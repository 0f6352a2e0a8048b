//! A batch of sets with all that is drawn for it, and what the networks make of it.

use std::ops::Range;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use crate::diffusion::{NoiseSchedule, mse, weighted_mse};
use crate::model::{JointUnet, TextEncoder};
use crate::ops;
use crate::shape::SetShape;

/// What a loss is computed from, on the host.
pub struct Batch {
    /// Sets, and images in each.
    pub shape: SetShape,
    /// Latents, `[b·n, c, h, w]`.
    pub clean: Tensor,
    /// As `clean`.
    pub noise: Tensor,
    /// How much each place of the latents counts, `[b·n, 1, h, w]`, 1 on average; None: all alike.
    pub weights: Option<Tensor>,
    /// One an image: true hides its reference.
    pub masked: Vec<bool>,
    /// One a set.
    pub timesteps: Vec<usize>,
    /// One an image.
    pub tokens: Vec<Vec<u32>>,
    /// What the text encoder makes of `tokens`, `[b·n, l, d]`; None: it is asked.
    pub context: Option<Tensor>,
}

/// What turns a batch into a loss.
#[derive(Clone, Copy)]
pub struct Denoiser<'a> {
    /// Predicts.
    pub unet: &'a JointUnet,
    /// Reads the captions for it.
    pub text: &'a TextEncoder,
    /// Says how noisy each timestep is, and what is predicted.
    pub schedule: &'a NoiseSchedule,
    /// Where the networks are.
    pub device: &'a Device,
    /// What the U-Net computes in; losses are f32.
    pub dtype: DType,
}

impl Batch {
    /// Some of its sets.
    pub fn sets(&self, sets: Range<usize>) -> Result<Self> {
        let n = self.shape.images;
        let images = sets.start * n..sets.end * n;
        let narrow = |x: &Tensor| x.narrow(0, images.start, images.len());
        Ok(Self {
            shape: SetShape { sets: sets.len(), images: n },
            clean: narrow(&self.clean)?,
            noise: narrow(&self.noise)?,
            weights: self.weights.as_ref().map(narrow).transpose()?,
            masked: self.masked[images.clone()].to_vec(),
            timesteps: self.timesteps[sets].to_vec(),
            tokens: self.tokens[images.clone()].to_vec(),
            context: self.context.as_ref().map(narrow).transpose()?,
        })
    }

    fn timesteps_of_images(&self) -> Vec<usize> {
        self.timesteps.iter().flat_map(|&t| std::iter::repeat_n(t, self.shape.images)).collect()
    }
}

impl Denoiser<'_> {
    /// Equation 2: mean squared error of the predicted noise (or velocity, where the schedule says so) over all images of all
    /// sets, weighted by place where the batch says so, and by the timestep where γ is not 0.
    pub fn loss(&self, batch: &Batch, min_snr_gamma: f64) -> Result<Tensor> {
        let (prediction, target) = self.predict(batch)?;
        let of_timesteps = || {
            let weight = |t: usize| self.schedule.min_snr_weight(t, min_snr_gamma) as f32;
            let weights: Vec<f32> = batch.timesteps_of_images().into_iter().map(weight).collect();
            Tensor::from_vec(weights, (batch.shape.total(), 1, 1, 1), &Device::Cpu)
        };
        let weights = match (&batch.weights, min_snr_gamma > 0.0) {
            (None, false) => return Ok(mse(&prediction, &target)?),
            (None, true) => of_timesteps()?,
            (Some(of_places), false) => of_places.clone(),
            (Some(of_places), true) => of_places.broadcast_mul(&of_timesteps()?)?,
        };
        Ok(weighted_mse(&prediction, &target, &weights.to_device(self.device)?)?)
    }

    /// The mean squared error of each set; no history is needed for it.
    pub fn losses_of_sets(&self, batch: &Batch) -> Result<Vec<f64>> {
        let (prediction, target) = self.predict(batch)?;
        let errors = (prediction - target)?.sqr()?;
        let errors = errors.reshape((batch.shape.sets, ()))?.mean(1)?; // [b]
        Ok(errors.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
    }

    /// What is predicted, and what should be.
    ///
    /// # Shapes
    /// - `[b·n, c, h, w]` each
    fn predict(&self, batch: &Batch) -> Result<(Tensor, Tensor)> {
        let Self { unet, text, schedule, device, dtype } = self;
        let shape = batch.shape;
        let per_image = batch.timesteps_of_images();
        let noisy = schedule.add_noise(&batch.clean, &batch.noise, &per_image)?;
        let (_, _, h, w) = batch.clean.dims4()?;
        let masked: Vec<f32> = batch.masked.iter().map(|&masked| f32::from(masked)).collect();
        let mask = Tensor::from_vec(masked, (shape.total(), 1, 1, 1), &Device::Cpu)?;
        let reference = batch.clean.broadcast_mul(&(1.0 - &mask)?)?;
        let mask = mask.broadcast_as((shape.total(), 1, h, w))?;
        let input = Tensor::cat(&[&noisy, &mask.contiguous()?, &reference], 1)?; // [b·n, 2c+1, h, w]
        let timesteps: Vec<i64> = batch.timesteps.iter().map(|&t| t as i64).collect();
        let timesteps = Tensor::from_vec(timesteps, shape.sets, device)?;
        let context = match &batch.context {
            Some(context) => context.to_device(device)?,
            None => {
                let tokens = Tensor::from_vec(batch.tokens.concat(), (shape.total(), batch.tokens[0].len()), device)?;
                text.forward(&tokens)?
            }
        };
        let (input, context) = (input.to_device(device)?.to_dtype(*dtype)?, ops::cast(&context, *dtype)?);
        let prediction = ops::cast(&unet.forward(&input, &timesteps, &context, shape)?, DType::F32)?;
        let target = schedule.target(&batch.clean, &batch.noise, &per_image)?;
        Ok((prediction, target.to_device(device)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::ScheduleConfig;
    use crate::model::params::{NamedVars, Params};
    use crate::model::{TextConfig, UnetConfig};
    use crate::ops::Gradients;
    use crate::rng::Rng;

    /// Parameters in f32 that compute in another format. On the CPU that is f64: the f32 kernels' answer has to come out, to
    /// rounding and not to the bit, and the gradients have to be the parameters' kind.
    #[test]
    fn parameters_are_f32_whatever_the_networks_compute_in() {
        let unet: UnetConfig = serde_json::from_value(serde_json::json!({
            "in_channels": 9, "out_channels": 4, "block_out_channels": [8, 16], "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "norm_num_groups": 4,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 8, "attention_head_dim": 2
        }))
        .unwrap();
        let text: TextConfig = serde_json::from_value(serde_json::json!({
            "vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 5, "hidden_act": "quick_gelu"
        }))
        .unwrap();
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        let mut rng = Rng::new(1, "batch test", 0);
        let shape = SetShape { sets: 2, images: 2 };
        let batch = Batch {
            shape,
            clean: rng.normal_tensor(&[4, 4, 4, 4]).unwrap(),
            noise: rng.normal_tensor(&[4, 4, 4, 4]).unwrap(),
            weights: Some(Tensor::ones((4, 1, 4, 4), DType::F32, &Device::Cpu).unwrap()),
            masked: vec![true, false, true, true],
            timesteps: vec![100, 700],
            tokens: vec![vec![1, 2, 3, 4, 19]; 4],
            context: None,
        };
        let loss_and_gradients = |dtype: DType, is_checkpointed: bool| -> (f32, NamedVars, Gradients) {
            let fresh = || Params::random(3, &Device::Cpu, DType::F32);
            let (unet, mut vars) = JointUnet::new(&unet, fresh()).unwrap();
            let unet = if is_checkpointed { unet.checkpointed() } else { unet };
            let (text, own) = TextEncoder::new(&text, fresh()).unwrap();
            vars.extend(own);
            let text = text.computing_in(dtype);
            let denoiser = Denoiser { unet: &unet, text: &text, schedule: &schedule, device: &Device::Cpu, dtype };
            let loss = denoiser.loss(&batch, 0.0).unwrap();
            (loss.to_scalar().unwrap(), vars, ops::backward(loss).unwrap())
        };
        let (expected, vars, gradients) = loss_and_gradients(DType::F32, false);
        for is_checkpointed in [false, true] {
            let (loss, own_vars, own) = loss_and_gradients(DType::F64, is_checkpointed);
            assert!((loss - expected).abs() < 1e-5 * expected, "{loss}, {expected}");
            let mut differs = false;
            for (name, var) in &vars {
                let gradient = own.get(&own_vars[name]).unwrap_or_else(|| panic!("{name}: no gradient"));
                assert_eq!(gradient.dtype(), DType::F32, "{name}");
                let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let (found, wanted) = (values(gradient), values(gradients.get(var).expect("a gradient")));
                let largest = wanted.iter().fold(0f32, |largest, v| largest.max(v.abs()));
                let off = found.iter().zip(&wanted).fold(0f32, |off, (a, b)| off.max((a - b).abs()));
                // The gradient of a key's bias is nothing but rounding: softmax does not see what all keys share.
                assert!(off <= 1e-4 * largest + 1e-9, "{name}: {off} of {largest}");
                differs |= off > 0.0;
            }
            assert!(differs, "it was computed in f32");
        }
    }
}

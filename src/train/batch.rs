//! A batch of sets with all that is drawn for it, and what the networks make of it.

use std::ops::Range;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use crate::diffusion::{NoiseSchedule, mse, weighted_mse};
use crate::model::{JointUnet, TextEncoder};
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
        let errors = (prediction.to_dtype(DType::F32)? - target.to_dtype(DType::F32)?)?.sqr()?;
        let errors = errors.reshape((batch.shape.sets, ()))?.mean(1)?; // [b]
        Ok(errors.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
    }

    /// What is predicted, and what should be.
    ///
    /// # Shapes
    /// - `[b·n, c, h, w]` each
    fn predict(&self, batch: &Batch) -> Result<(Tensor, Tensor)> {
        let Self { unet, text, schedule, device } = self;
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
        let prediction = unet.forward(&input.to_device(device)?, &timesteps, &context, shape)?;
        let target = schedule.target(&batch.clean, &batch.noise, &per_image)?;
        Ok((prediction, target.to_device(device)?))
    }
}

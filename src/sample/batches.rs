//! Painting many sets: which of them go through the networks at once.

use std::ops::Range;

use anyhow::{Context as _, Result};
use candle_core::Tensor;

use super::noise::GivenNoise;
use super::pipeline::Pipeline;
use super::request::{Painted, SampleSettings, SetRequest};
use super::walk::Step;
use crate::ops::alike_in_any_batch;

/// Latent pixels (images · branches · h · w) that go through the U-Net at once: two sets of one reference and one target
/// at 512².
const LATENT_PIXELS_A_BATCH: usize = 32_768;

/// Makes the final latents of the sets of these numbers, whose share of the given noise comes with them.
type PaintBatch<'a> = &'a mut dyn FnMut(Range<usize>, Option<&GivenNoise>) -> Result<Tensor>;

/// What sets must have in common to go together.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchKey {
    /// How they are sampled.
    pub settings: SampleSettings,
    /// Known images a set.
    pub references: usize,
    /// New images a set.
    pub targets: usize,
}

impl BatchKey {
    /// That of a set.
    pub fn of(request: &SetRequest, settings: &SampleSettings) -> Self {
        Self { settings: settings.clone(), references: request.references.len(), targets: request.prompts.len() }
    }
}

impl Pipeline {
    /// The batches of sets of these kinds, as their numbers: what is alike goes together, in the order in which the first
    /// of each kind was asked for.
    pub fn batches(&self, keys: &[BatchKey]) -> Vec<Vec<usize>> {
        let mut kinds: Vec<(&BatchKey, Vec<usize>)> = Vec::new();
        for (number, key) in keys.iter().enumerate() {
            match kinds.iter_mut().find(|(kind, _)| *kind == key) {
                Some((_, numbers)) => numbers.push(number),
                None => kinds.push((key, vec![number])),
            }
        }
        let chunks = |(kind, numbers): (&BatchKey, Vec<usize>)| -> Vec<Vec<usize>> {
            numbers.chunks(self.sets_of(kind)).map(<[usize]>::to_vec).collect()
        };
        kinds.into_iter().flat_map(chunks).collect()
    }

    /// Paints sets of one shape. `on_step` hears of every step done, out of [`Pipeline::steps_of`]; its error ends the
    /// painting. `given` holds the noise of all targets of all requests, in their order.
    pub fn paint(
        &self,
        requests: &[SetRequest],
        settings: &SampleSettings,
        given: Option<&GivenNoise>,
        on_step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Painted> {
        self.paint_watched(requests, settings, given, &mut |_| on_step())
    }

    /// [`Pipeline::paint`] for one who wants to see what is done at every step. On the CPU a picture has the same bits in any
    /// batch.
    pub fn paint_watched(
        &self,
        requests: &[SetRequest],
        settings: &SampleSettings,
        given: Option<&GivenNoise>,
        watch: &mut dyn FnMut(&Step) -> Result<()>,
    ) -> Result<Painted> {
        self.in_batches(requests, settings, given, &mut |batch, given| {
            self.paint_batch(&requests[batch], settings, given, watch)
        })
    }

    /// Sets of one shape, so many at once as go well. On the CPU a picture has the same bits in any batch.
    pub(super) fn in_batches(
        &self,
        requests: &[SetRequest],
        settings: &SampleSettings,
        given: Option<&GivenNoise>,
        paint: PaintBatch,
    ) -> Result<Painted> {
        self.check_size(settings.size)?;
        let first = requests.first().context("nothing to paint: no set was asked for")?;
        let (n_references, n_targets) = (first.references.len(), first.prompts.len());
        if let Some(given) = given {
            let targets = requests.len() * n_targets;
            given.validate(targets, n_references, settings.steps, self.latent_shape(settings.size))?;
        }
        let at_once = self.sets_at_once(requests, settings);
        alike_in_any_batch(|| {
            let mut latents = Vec::new();
            for first in (0..requests.len()).step_by(at_once) {
                let batch = first..(first + at_once).min(requests.len());
                let own =
                    given.map(|given| given.of_targets(first * n_targets, batch.len() * n_targets)).transpose()?;
                latents.push(paint(batch, own.as_ref())?);
            }
            let latents = Tensor::cat(&latents, 0)?; // [k, c, h, w]
            Ok(Painted { images: self.pictures_of(&latents, settings)?, latents })
        })
    }

    /// Steps that [`Pipeline::paint`] will report.
    pub fn steps_of(&self, requests: &[SetRequest], settings: &SampleSettings) -> usize {
        requests.len().div_ceil(self.sets_at_once(requests, settings)) * settings.steps
    }

    /// How many of the sets go through the network together.
    pub fn sets_at_once(&self, requests: &[SetRequest], settings: &SampleSettings) -> usize {
        requests.first().map_or(1, |set| self.sets_of(&BatchKey::of(set, settings)))
    }

    fn sets_of(&self, kind: &BatchKey) -> usize {
        if kind.settings.is_frugal {
            return 1;
        }
        let (_, h, w) = self.latent_shape(kind.settings.size);
        let images = kind.references + kind.targets;
        let pixels = images * kind.settings.guidance.branches().len() * h * w;
        (LATENT_PIXELS_A_BATCH / pixels.max(1)).max(1)
    }
}

//! Changing pictures by instructions: InstructPix2Pix (Brooks et al. 2023). Its network is given the picture's latents beside
//! the noisy ones, and is guided by picture and text, each with its own scale
//! ([`Guidance::ImageFirst`](crate::diffusion::Guidance::ImageFirst) is its three branches).

use anyhow::{Result, ensure};
use candle_core::Tensor;
use image::RgbImage;

use super::noise::GivenNoise;
use super::pipeline::Pipeline;
use super::request::{Painted, Rounds, SampleSettings, SetRequest};
use super::sides::Sides;
use crate::device::Runtime;
use crate::diffusion::Level;
use crate::invalid::invalid;
use crate::model::{Family, Files};

/// An InstructPix2Pix model ready to edit.
pub struct Editor {
    pipeline: Pipeline,
}

/// One picture to change.
#[derive(Clone, Debug)]
pub struct Edit {
    /// Square, of the size that is sampled.
    pub image: RgbImage,
    /// What is to become of it, such as "turn it into a pencil sketch".
    pub instruction: String,
    /// Of the noise.
    pub seed: u64,
}

impl Editor {
    /// Loads all parts; refuses a model of another kind.
    pub fn load(files: &Files, runtime: &Runtime) -> Result<Self> {
        let pipeline = Pipeline::of_any_kind(files, runtime, true)?;
        if pipeline.family != Family::InstructPix2Pix {
            let (name, config) = (files.describe("unet/config.json"), pipeline.unet.config());
            let (is, wanted) = (pipeline.family.describe(config), 2 * config.latent_channels());
            return Err(invalid(format!(
                "{name}: {is}, while pictures are edited by InstructPix2Pix ({wanted} channels)"
            )));
        }
        Ok(Self { pipeline })
    }

    /// The sides of the pictures that it can edit.
    pub fn sides(&self) -> Sides {
        self.pipeline.sides()
    }

    /// The changed pictures. `on_step` hears of every step done; its error ends the work. `given` holds the noise of all
    /// pictures, in their order. On the CPU a picture has the same bits in any batch.
    pub fn edit(
        &self,
        edits: &[Edit],
        settings: &SampleSettings,
        given: Option<&GivenNoise>,
        on_step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Painted> {
        let side = settings.size as u32;
        ensure!(
            edits.iter().all(|edit| edit.image.dimensions() == (side, side)),
            "pictures to edit must have {side} pixels a side"
        );
        let request = |edit: &Edit| SetRequest {
            references: vec![],
            prompts: vec![edit.instruction.clone()],
            negative_prompt: String::new(),
            seeds: vec![edit.seed],
        };
        let requests: Vec<SetRequest> = edits.iter().map(request).collect();
        self.pipeline.in_batches(&requests, settings, given, &mut |batch, given| {
            let (requests, edits) = (&requests[batch.clone()], &edits[batch]);
            let beside = self.beside(edits, settings)?;
            let conditions = self.pipeline.conditions_beside(requests, &beside, settings)?;
            let mut revise = |_: Level, _: &Tensor, output: Tensor| on_step().map(|()| output);
            self.pipeline.paint_alone(requests, &conditions, settings, given, Rounds::ONE, &mut revise)
        })
    }

    /// The pictures' latents, unscaled, as this kind of network is trained with; zeros in branches without the picture.
    ///
    /// # Shapes
    /// - b pictures → `[branches·b, c, h, w]`
    fn beside(&self, edits: &[Edit], settings: &SampleSettings) -> Result<Tensor> {
        let images: Vec<RgbImage> = edits.iter().map(|edit| edit.image.clone()).collect();
        let scaling_factor = self.pipeline.vae.config().scaling_factor;
        let shown = (self.pipeline.latents_of(&images, settings)? / scaling_factor)?; // [b, c, h, w]
        let hidden = shown.zeros_like()?;
        let branches = settings.guidance.branches().iter();
        let all: Vec<&Tensor> = branches.map(|branch| if branch.keeps_references { &shown } else { &hidden }).collect();
        Ok(Tensor::cat(&all, 0)?)
    }
}

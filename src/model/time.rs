//! The vector that every residual block is given: the noise level, and where the network takes them pooled text and sizes
//! (diffusers `time_embedding`, `add_embedding`).

use anyhow::{Context as _, Result, bail};
use candle_core::{DType, Device, Result as CandleResult, Tensor};

use super::conditions::AddedConditions;
use super::config::UnetConfig;
use super::layers::Linear;
use super::params::Params;
use crate::ops;
use crate::shape::SetShape;

/// Timesteps, and added conditions, to the vector of each image.
pub struct TimeEmbedding {
    sinusoids: Sinusoids,
    time_embedding: TwoLayers,
    /// With the sinusoids of one size.
    add_embedding: Option<(Sinusoids, TwoLayers)>,
}

impl TimeEmbedding {
    /// `params` at the root of the U-Net; `width` of the vector.
    pub fn new(params: &Params, config: &UnetConfig, width: usize) -> Result<Self> {
        let sinusoids = |width| Sinusoids { width, flip: config.flip_sin_to_cos, shift: config.freq_shift };
        let inputs = config.block_out_channels[0];
        Ok(Self {
            sinusoids: sinusoids(inputs),
            time_embedding: TwoLayers::new(&params.pp("time_embedding"), inputs, width)?,
            add_embedding: match config.addition_embed_type.as_deref() {
                None => None,
                Some("text_time") => {
                    let missing = |field: &str| format!("unet config: addition_embed_type text_time needs {field}");
                    let (field, own_field) = ("projection_class_embeddings_input_dim", "addition_time_embed_dim");
                    let inputs = config.projection_class_embeddings_input_dim.with_context(|| missing(field))?;
                    let own = config.addition_time_embed_dim.with_context(|| missing(own_field))?;
                    Some((sinusoids(own), TwoLayers::new(&params.pp("add_embedding"), inputs, width)?))
                }
                Some(other) => bail!("unet config: addition_embed_type {other} is not supported"),
            },
        })
    }

    /// After the SiLU that every block would apply.
    ///
    /// # Shapes
    /// - timesteps `[b]` → `[b·n, width]`
    pub fn forward(
        &self,
        timesteps: &Tensor,
        added: Option<&AddedConditions>,
        shape: SetShape,
        dtype: DType,
    ) -> CandleResult<Tensor> {
        let sinusoids = self.sinusoids.of(timesteps)?.to_dtype(dtype)?;
        let time = self.time_embedding.forward(&sinusoids)?; // [b, width]
        match (&self.add_embedding, added) {
            (None, None) => ops::repeat_rows(&ops::silu(&time)?, shape.images),
            (Some((sizes, embedding)), Some(added)) => {
                let added = embedding.forward(&inputs_of(added, sizes, shape, dtype)?)?;
                ops::silu(&ops::add(&ops::repeat_rows(&time, shape.images)?, &added)?)
            }
            (None, Some(_)) => candle_core::bail!("unet: takes no added conditions (no addition_embed_type)"),
            (Some(_), None) => candle_core::bail!("unet: needs added conditions, pooled text and sizes (text_time)"),
        }
    }
}

/// Pooled text and the sinusoids of the sizes side by side, `[b·n, p + sizes·width]`.
fn inputs_of(added: &AddedConditions, sizes: &Sinusoids, shape: SetShape, dtype: DType) -> CandleResult<Tensor> {
    let (total, n_sizes) = added.time_ids.dims2()?;
    if total != shape.total() || added.text_embeds.dim(0)? != total {
        candle_core::bail!(
            "unet: added conditions {:?} and {:?} do not fit {shape:?}",
            added.text_embeds.dims(),
            added.time_ids.dims()
        );
    }
    let sinusoids = sizes.of(&added.time_ids.flatten_all()?)?; // [b·n·sizes, width]
    let sinusoids = sinusoids.reshape((total, n_sizes * sizes.width))?.to_dtype(dtype)?;
    ops::concat(&added.text_embeds, &sinusoids)
}

/// linear, SiLU, linear (diffusers `TimestepEmbedding`).
struct TwoLayers {
    linear_1: Linear,
    linear_2: Linear,
}

impl TwoLayers {
    fn new(params: &Params, inputs: usize, width: usize) -> Result<Self> {
        Ok(Self {
            linear_1: Linear::new(&params.pp("linear_1"), inputs, width)?,
            linear_2: Linear::new(&params.pp("linear_2"), width, width)?,
        })
    }

    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        self.linear_2.forward(&ops::silu(&self.linear_1.forward(x)?)?)
    }
}

/// diffusers `get_timestep_embedding`: sin and cos (or cos and sin, flipped) of t·10000^(−i/(half − shift)).
struct Sinusoids {
    width: usize,
    flip: bool,
    shift: f64,
}

impl Sinusoids {
    /// # Shapes
    /// - numbers `[b]` → `[b, width]`
    fn of(&self, numbers: &Tensor) -> CandleResult<Tensor> {
        let half = self.width / 2;
        let frequencies: Vec<f32> =
            (0..half).map(|i| (-(10_000f64.ln()) * i as f64 / (half as f64 - self.shift)).exp() as f32).collect();
        let frequencies = Tensor::from_vec(frequencies, (1, half), &Device::Cpu)?;
        // On the host in f32: the angles reach 1000, too large for half precision.
        let angles = numbers.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.unsqueeze(1)?.matmul(&frequencies)?;
        let (sin, cos) = (angles.sin()?, angles.cos()?);
        let both = if self.flip { [&cos, &sin] } else { [&sin, &cos] };
        Tensor::cat(&both, 1)?.to_device(numbers.device())
    }
}

//! What couples the images of a set: how many there are, how strongly each place of one is attended to by the others, and
//! who looks on.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{D, DType, Device, Result, Tensor};

/// The coupled self-attention of a forward pass.
#[derive(Clone)]
pub struct Coupling {
    /// n: the images that one self-attention spans; 1 leaves every image to itself.
    pub images: usize,
    /// What these see of each other.
    pub sight: Sight,
}

/// What the images of a set see of each other, where that is not simply everything, and who watches.
#[derive(Clone, Default)]
pub struct Sight {
    /// How strongly the other images of its set attend to each place of an image, `[b·n, h, w]` at the latents' size: 1 as
    /// they would, 0 not at all. Its logarithm is added to the scores.
    pub key_weights: Option<Tensor>,
    /// Hears every self-attention.
    pub probe: Option<Arc<Probe>>,
}

impl Coupling {
    /// What is added to the scores at a resolution of h×w, `[b, n, n·h·w]` for queries of n images: the logarithm of the keys'
    /// weights, nothing for an image's own keys. None where there is nothing to add.
    pub fn bias(&self, (h, w): (usize, usize)) -> Result<Option<Tensor>> {
        let Some(weights) = self.sight.key_weights.as_ref().filter(|_| self.images > 1) else { return Ok(None) };
        let (n, l) = (self.images, h * w);
        let (total, full_h, full_w) = weights.dims3()?;
        if full_h % h != 0 || full_w % w != 0 || total % n != 0 {
            candle_core::bail!("key weights {:?} do not fit sets of {n} images at {h}×{w}", weights.dims());
        }
        let weights = weights.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let pooled = weights.unsqueeze(1)?.avg_pool2d((full_h / h, full_w / w))?; // [b·n, 1, h, w]
        let keys = pooled.log()?.reshape((total / n, 1, n, l))?;
        let others = keys.broadcast_as((total / n, n, n, l))?; // [b, n (queries), n (keys), l]
        let is_own = Tensor::eye(n, DType::U8, &Device::Cpu)?.reshape((1, n, n, 1))?;
        let is_own = is_own.broadcast_as(others.shape())?.contiguous()?;
        let bias = is_own.where_cond(&others.zeros_like()?, &others.contiguous()?)?; // 0·(−∞) would be NaN
        bias.reshape((total / n, n, n * l)).map(Some)
    }
}

/// Keeps queries and keys of the self-attentions that it is asked for.
#[derive(Default)]
pub struct Probe {
    /// Only layers whose names contain one of these; empty: all.
    wanted: Vec<String>,
    heard: Mutex<Vec<Heard>>,
}

/// One self-attention of a forward pass.
#[derive(Clone)]
pub struct Heard {
    /// As in the checkpoint, such as `down_blocks.0.attentions.0.transformer_blocks.0.attn1`.
    pub layer: String,
    /// Of an image, at this layer.
    pub height: usize,
    /// As `height`.
    pub width: usize,
    images: usize,
    heads: usize,
    q: Tensor,
    k: Tensor,
    bias: Option<Tensor>,
}

impl Probe {
    /// Hears the layers whose names contain one of `wanted`; all if there is none.
    pub fn new(wanted: Vec<String>) -> Self {
        Self { wanted, heard: Mutex::default() }
    }

    /// What was heard since the last call, in the order of the network.
    pub fn take(&self) -> Vec<Heard> {
        std::mem::take(&mut *self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// # Shapes
    /// - q, k `[b, n·h·w, heads·d]`, bias as of [`Coupling::bias`]
    pub fn hear(
        &self,
        layer: &str,
        (q, k): (&Tensor, &Tensor),
        heads: usize,
        images: usize,
        (height, width): (usize, usize),
        bias: Option<&Tensor>,
    ) -> Result<()> {
        if !self.wanted.is_empty() && !self.wanted.iter().any(|wanted| layer.contains(wanted.as_str())) {
            return Ok(());
        }
        let kept = |x: &Tensor| x.detach().to_dtype(DType::F32)?.to_device(&Device::Cpu);
        let heard = Heard {
            layer: layer.to_owned(),
            height,
            width,
            images,
            heads,
            q: kept(q)?,
            k: kept(k)?,
            bias: bias.cloned(),
        };
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).push(heard);
        Ok(())
    }
}

impl Heard {
    /// How the attention of some places of one image, averaged over the heads, is shared out among all places of all images
    /// of its set.
    ///
    /// # Shapes
    /// - places `y·w + x` of image `image` of set `set` → `[places, n, h·w]`; each row sums to 1
    pub fn of_places(&self, set: usize, image: usize, places: &[usize]) -> Result<Tensor> {
        let (l, d) = (self.height * self.width, self.q.dim(2)? / self.heads);
        let rows: Vec<u32> = places.iter().map(|place| (image * l + place) as u32).collect();
        let rows = Tensor::from_vec(rows, places.len(), &Device::Cpu)?;
        let split = |x: Tensor| x.reshape(((), self.heads, d))?.transpose(0, 1)?.contiguous(); // [heads, rows, d]
        let (q, k) = (split(self.q.get(set)?.index_select(&rows, 0)?)?, split(self.k.get(set)?)?);
        let mut scores = (q.matmul(&k.t()?)? / (d as f64).sqrt())?; // [heads, places, n·l]
        if let Some(bias) = &self.bias {
            scores = scores.broadcast_add(&bias.get(set)?.get(image)?.reshape((1, 1, self.images * l))?)?;
        }
        let shares = candle_nn::ops::softmax(&scores, D::Minus1)?.mean(0)?;
        shares.reshape((places.len(), self.images, l))
    }

    /// n: the images of its sets.
    pub fn images(&self) -> usize {
        self.images
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_become_logarithms_for_others_and_nothing_for_oneself() {
        // One set of two images of 2×2, pooled to 1×2; the second image is half hidden.
        let weights = [1f32, 1.0, 1.0, 1.0, 2.0, 0.0, 4.0, 0.0];
        let key_weights = Some(Tensor::from_slice(&weights, (2, 2, 2), &Device::Cpu).unwrap());
        let sight = Sight { key_weights, probe: None };
        let coupling = Coupling { images: 2, sight };
        let bias = coupling.bias((1, 2)).unwrap().unwrap().to_vec3::<f32>().unwrap();
        assert_eq!(bias, [[[0.0, 0.0, 3f32.ln(), f32::NEG_INFINITY], [0.0, 0.0, 0.0, 0.0]]]);
        assert!(coupling.bias((2, 4)).is_err());
        assert!(Coupling { images: 1, ..coupling }.bias((1, 2)).unwrap().is_none());
    }

    #[test]
    fn what_is_heard_is_shared_out_whole_and_as_the_scores_say() {
        let probe = Probe::new(vec!["mid".into()]);
        // Two images of one place, one head of width 1: scores of the first query are 2·[0, ln 3 / 2].
        let q = Tensor::new(&[[[2f32], [0.0]]], &Device::Cpu).unwrap();
        let k = Tensor::new(&[[[0f32], [3f32.ln() / 2.0]]], &Device::Cpu).unwrap();
        probe.hear("down", (&q, &k), 1, 2, (1, 1), None).unwrap();
        probe.hear("mid.attn1", (&q, &k), 1, 2, (1, 1), None).unwrap();
        let heard = probe.take();
        assert_eq!(heard.len(), 1, "only what was asked for");
        assert!(probe.take().is_empty());
        let shares =
            |image| heard[0].of_places(0, image, &[0]).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (found, expected) in shares(0).into_iter().zip([0.25, 0.75]).chain(shares(1).into_iter().zip([0.5, 0.5])) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }
}

//! Multi-head attention: softmax(q·kᵀ/√d + bias)·v, in blocks of queries and keys.
//!
//! The forward pass keeps one number a query (the logarithm of the softmax's denominator); the backward pass recomputes
//! each block's probabilities from it, so that no [l, s] matrix is ever kept (FlashAttention's bookkeeping, Dao et al.
//! 2022).

mod backward;
mod composed;
mod forward;
mod kernel;

use candle_core::{Result, Tensor, bail};

use self::composed::composed;
use super::cuda;
use super::graft::{for_float, graft, on_cpu, tensor, with_values};
use super::real::Real;

/// Which keys a query sees.
#[derive(Clone, Copy, Debug)]
pub enum Mask<'a> {
    /// All of them.
    None,
    /// Query i sees keys 0..=i (CLIP's text encoder).
    Causal,
    /// All of them, with this added to the scores, `[b, groups, s]`: consecutive queries, l/groups of them, share a row. −∞
    /// hides a key; every query must see one. It gets no gradient.
    Biased(&'a Tensor),
}

/// Attention of every head; the heads lie side by side in the last dimension.
///
/// # Shapes
/// - q `[b, l, heads·d]`, k and v `[b, s, heads·d]` → `[b, l, heads·d]`
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    let (b, l, width) = q.dims3()?;
    let s = k.dim(1)?;
    if [b, l, s, width, heads].contains(&0) {
        bail!("attention: q {:?}, k {:?} with {heads} heads leave nothing to attend to", q.dims(), k.dims());
    }
    let is_causal = matches!(mask, Mask::Causal);
    if width % heads != 0 || k.dims() != [b, s, width] || v.dims() != k.dims() || (is_causal && l != s) {
        bail!("attention: q {:?}, k {:?}, v {:?} with {heads} heads do not fit", q.dims(), k.dims(), v.dims());
    }
    let sizes = Sizes { b, l, s, heads, d: width / heads, is_causal };
    let bias = match mask {
        Mask::Biased(bias) => Some(sizes.checked(bias)?),
        Mask::None | Mask::Causal => None,
    };
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    if !on_cpu(&q) {
        if let Some(out) = cuda::attention([&q, &k, &v], bias, sizes)? {
            return Ok(out);
        }
        return composed(&q, &k, &v, bias, sizes);
    }
    for_float!(q, T => {
        let bias = bias.map(|bias| bias.to_dtype(<T as candle_core::WithDType>::DTYPE)?.flatten_all()?.to_vec1::<T>()).transpose()?;
        let (values, denominators) = with_values::<T, _>(&q, |q| with_values::<T, _>(&k, |k| {
            with_values::<T, _>(&v, |v| kernel::forward(q, k, v, bias.as_deref(), sizes))
        }))???;
        graft("attention", &[&q, &k, &v], (values, (b, l, width)), move |inputs, result, gradient| {
            let gradients = with_values::<T, _>(inputs[0], |q| with_values::<T, _>(inputs[1], |k| {
                with_values::<T, _>(inputs[2], |v| with_values::<T, _>(result, |o| {
                    with_values::<T, _>(gradient, |dy| {
                        kernel::backward([q, k, v, o, dy], &denominators, bias.as_deref(), sizes)
                    })
                }))
            }))?????;
            Ok(gradients.into_iter().zip(inputs).map(|(g, input)| Some(tensor(g, input.shape()))).collect())
        })
    })
}

/// Sizes of an attention; heads lie side by side in rows of `heads·d`.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub b: usize,
    /// Queries.
    pub l: usize,
    /// Keys.
    pub s: usize,
    pub heads: usize,
    pub d: usize,
    pub is_causal: bool,
}

impl Sizes {
    pub fn width(self) -> usize {
        self.heads * self.d
    }

    pub fn scale<T: Real>(self) -> T {
        T::of(1.0 / (self.d as f64).sqrt())
    }

    /// Refuses a bias that does not fit.
    fn checked(self, bias: &Tensor) -> Result<&Tensor> {
        let (b, groups, s) = bias.dims3()?;
        if b != self.b || s != self.s || groups == 0 || !self.l.is_multiple_of(groups) {
            bail!(
                "attention: a bias {:?} does not fit {} x {} queries of {} keys",
                bias.dims(),
                self.b,
                self.l,
                self.s
            );
        }
        Ok(bias)
    }

    /// Which row of a bias of `values` values, `[b, groups, s]`, is a query's.
    pub fn bias_row(self, values: usize, (set, query): (usize, usize)) -> usize {
        let groups = values / (self.b * self.s);
        set * groups + query * groups / self.l
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn refuses_no_heads_no_queries_and_no_keys() {
        // These divided by zero.
        let zeros = |rows: usize| Tensor::zeros((1, rows, 4), DType::F32, &Device::Cpu).unwrap();
        for (queries, keys, heads) in [(3, 3, 0), (0, 3, 2), (3, 0, 2)] {
            let (q, kv) = (zeros(queries), zeros(keys));
            let error = attention(&q, &kv, &kv, heads, Mask::None).unwrap_err().to_string();
            assert!(error.contains("nothing to attend to"), "{error}");
        }
    }
}

//! The same values in another shape, order or company.

use candle_core::{D, Result, Shape, Tensor, bail};

use super::buffer::unwritten;
use super::graft::{for_float, graft, graft_tensor, on_cpu, tensor, with_values};
use super::parallel;
use super::real::Real;
use super::tape::record_reshape;

/// Elements a thread copies at least.
const GRAIN: usize = 16_384;

/// The values in their order under another shape, sharing their memory (a variable's are copied).
pub fn reshape(x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let reshaped = x.reshape(shape.into())?;
    if !x.track_op() || !on_cpu(x) || record_reshape(x, &reshaped) {
        return Ok(reshaped);
    }
    if !x.is_variable() {
        // Of an operation that is not ours: the backward pass will say so.
        return Ok(reshaped);
    }
    // No operation of ours made a variable that could carry the entry in the table.
    graft_tensor("reshape", &[x], &reshaped, |inputs, _, gradient| Ok(vec![Some(gradient.reshape(inputs[0].shape())?)]))
}

/// Two tensors side by side in the last dimension.
///
/// # Shapes
/// - a `[.., c]`, b `[.., d]` → `[.., c + d]`
pub fn concat(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (Some((&c, rows)), Some((&d, rows_b))) = (a.dims().split_last(), b.dims().split_last()) else {
        bail!("concat: {:?} and {:?} need a dimension", a.dims(), b.dims());
    };
    if rows != rows_b {
        bail!("concat: {:?} and {:?} differ before the last dimension", a.dims(), b.dims());
    }
    if !on_cpu(a) {
        return Tensor::cat(&[a, b], D::Minus1);
    }
    let width = c + d;
    let shape = [rows, &[width]].concat();
    for_float!(a, T => {
        let values = with_values::<T, _>(a, |a| with_values::<T, _>(b, |b| {
            let mut y = unwritten(a.len() + b.len());
            parallel::for_rows(&mut y, width, GRAIN / width.max(1) + 1, |rows, y| {
                for (row, y) in rows.zip(y.chunks_exact_mut(width)) {
                    y[..c].copy_from_slice(&a[row * c..][..c]);
                    y[c..].copy_from_slice(&b[row * d..][..d]);
                }
            });
            y
        }))??;
        graft("concat", &[a, b], (values, shape), move |inputs, _, gradient| {
            let part = |input: &Tensor, first: usize| -> Result<Option<Tensor>> {
                if !input.track_op() {
                    return Ok(None);
                }
                let values = with_values::<T, _>(gradient, |dy| columns(dy, width, first, input.elem_count()))?;
                Ok(Some(tensor(values, input.shape())))
            };
            Ok(vec![part(inputs[0], 0)?, part(inputs[1], c)?])
        })
    })
}

/// As many columns from `first` on of rows of `width` as make `count` values.
fn columns<T: Real>(values: &[T], width: usize, first: usize, count: usize) -> Vec<T> {
    let taken = count * width / values.len().max(1);
    let mut out = unwritten(count);
    parallel::for_rows(&mut out, taken, GRAIN / taken.max(1) + 1, |rows, out| {
        for (row, out) in rows.zip(out.chunks_exact_mut(taken)) {
            out.copy_from_slice(&values[row * width + first..][..taken]);
        }
    });
    out
}

/// `count` places from `first` on of dimension `dim`.
pub fn narrow(x: &Tensor, dim: usize, first: usize, count: usize) -> Result<Tensor> {
    let part = x.narrow(dim, first, count)?;
    if !x.track_op() || !on_cpu(x) {
        return Ok(part);
    }
    for_float!(x, T => {
        let values = with_values::<T, _>(&part, |values| values.to_vec())?;
        graft("narrow", &[x], (values, part.shape().clone()), move |inputs, _, gradient| {
            let dims = inputs[0].dims();
            let inner: usize = dims[dim + 1..].iter().product();
            let (whole, taken) = (dims[dim] * inner, count * inner);
            let mut dx = vec![T::ZERO; inputs[0].elem_count()];
            with_values::<T, _>(gradient, |dy| {
                for (dx, dy) in dx.chunks_exact_mut(whole).zip(dy.chunks_exact(taken)) {
                    dx[first * inner..][..taken].copy_from_slice(dy);
                }
            })?;
            Ok(vec![Some(tensor(dx, dims))])
        })
    })
}

/// Each row `n` times in a row: what belongs to a set, for each of its images.
///
/// # Shapes
/// - x `[b, d]` → `[b·n, d]`
pub fn repeat_rows(x: &Tensor, n: usize) -> Result<Tensor> {
    let (b, d) = x.dims2()?;
    if !on_cpu(x) {
        return x.unsqueeze(1)?.broadcast_as((b, n, d))?.contiguous()?.reshape((b * n, d)); // [b, n, d] → [b·n, d]
    }
    for_float!(x, T => {
        let values = with_values::<T, _>(x, |x| {
            let mut y = Vec::with_capacity(b * n * d);
            x.chunks_exact(d).for_each(|row| (0..n).for_each(|_| y.extend_from_slice(row)));
            y
        })?;
        graft("repeat_rows", &[x], (values, (b * n, d)), move |inputs, _, gradient| {
            let mut dx = vec![T::ZERO; b * d];
            with_values::<T, _>(gradient, |dy| {
                for (sum, rows) in dx.chunks_exact_mut(d).zip(dy.chunks_exact(n * d)) {
                    for row in rows.chunks_exact(d) {
                        sum.iter_mut().zip(row).for_each(|(sum, v)| *sum += *v);
                    }
                }
            })?;
            Ok(vec![Some(tensor(dx, inputs[0].shape()))])
        })
    })
}

/// # Shapes
/// - x `[b, c, h, w]` → `[b, h, w, c]`
pub fn to_channels_last(x: &Tensor) -> Result<Tensor> {
    permuted(x, [0, 2, 3, 1], [0, 3, 1, 2])
}

/// # Shapes
/// - x `[b, h, w, c]` → `[b, c, h, w]`
pub fn to_channels_first(x: &Tensor) -> Result<Tensor> {
    permuted(x, [0, 3, 1, 2], [0, 2, 3, 1])
}

fn permuted(x: &Tensor, order: [usize; 4], back: [usize; 4]) -> Result<Tensor> {
    if !x.track_op() || !on_cpu(x) {
        return x.permute(order)?.contiguous();
    }
    graft_tensor("permute", &[x], &x.detach().permute(order)?, move |_, _, gradient| {
        Ok(vec![Some(gradient.permute(back)?.contiguous()?)])
    })
}

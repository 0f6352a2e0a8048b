//! Linear layers over the last dimension, and a vector per image added at every position.

use std::ops::Range;

use candle_core::{Result, Tensor, bail};

use super::any_batch::is_alike;
use super::buffer::unwritten;
use super::cuda;
use super::graft::{for_float, graft, on_cpu, tensor, with_values};
use super::packed::Packed;
use super::parallel;
use super::product::{Matrix, Panels, SMALL, Start, matmul, matmul_alike, takes_panels};
use super::real::{Real, vectorised};

/// Rows of a product that a thread takes at least.
const GRAIN: usize = 16;

/// `x·weightᵀ + bias`.
///
/// # Shapes
/// - x `[.., in]`, weight `[out, in]` or, as a 1×1 convolution, `[out, in, 1, 1]`, bias `[out]` → `[.., out]`
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    linear_packed(x, weight, bias, None)
}

/// The same with the weight packed once.
pub fn linear_packed(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, packed: Option<&Packed>) -> Result<Tensor> {
    let (outputs, inputs) = matrix_dims(weight)?;
    let dims = x.dims();
    if dims.last() != Some(&inputs) {
        bail!("linear: input {dims:?} does not end with the weight's {inputs} columns");
    }
    let mut shape = dims.to_vec();
    shape[dims.len() - 1] = outputs;
    if !on_cpu(x) {
        if let Some(bias) = bias
            && let Some(y) = cuda::linear(x, weight, bias)?
        {
            return Ok(y);
        }
        let rows = x.reshape(((), inputs))?; // [m, in]
        let y = rows.matmul(&weight.flatten_from(1)?.t()?)?.reshape(shape)?;
        return match bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        };
    }
    let x = x.contiguous()?;
    let rows = x.elem_count() / inputs;
    for_float!(x, T => {
        // Few rows are packed themselves; a large weight is next to nothing of a large network's work.
        let is_kept = rows >= 2 * GRAIN && weight.elem_count() <= SMALL;
        let packed = packed.filter(|_| is_kept);
        let panels = |w: &[T]| packed.and_then(|packed| packed.panels(weight, w.len(), || {
            let b = Matrix::rows(w, inputs).transposed();
            // SAFETY: the weight has out·in values.
            vec![unsafe { Panels::pack(b, inputs, outputs) }]
        }));
        let values = with_values::<T, _>(&x, |x| with_values::<T, _>(weight, |w| match bias {
            Some(bias) => with_values::<T, _>(bias, |b| forward(x, w, Some(b), panels(w), (inputs, outputs))),
            None => Ok(forward(x, w, None, panels(w), (inputs, outputs))),
        }))???;
        match bias {
            Some(bias) => graft("linear", &[&x, weight, bias], (values, shape), backward::<T>),
            None => graft("linear", &[&x, weight], (values, shape), backward::<T>),
        }
    })
}

/// Outputs and inputs of a weight.
fn matrix_dims(weight: &Tensor) -> Result<(usize, usize)> {
    match *weight.dims() {
        [outputs, inputs] | [outputs, inputs, 1, 1] => Ok((outputs, inputs)),
        ref other => bail!("linear: a weight {other:?} is neither a matrix nor a 1×1 convolution's"),
    }
}

/// Rows of `x` `[m, inputs]` times `w` `[outputs, inputs]` transposed.
fn forward<T: Real>(
    x: &[T],
    w: &[T],
    bias: Option<&[T]>,
    panels: Option<&[Panels<T>]>,
    (inputs, outputs): (usize, usize),
) -> Vec<T> {
    let rows = x.len() / inputs;
    let mut y = unwritten(rows * outputs);
    let y_at = parallel::Disjoint::new(&mut y);
    let matmul = if is_alike() { matmul_alike } else { matmul };
    let part = |rows: Range<usize>, columns: Range<usize>| {
        let a = Matrix::rows(&x[rows.start * inputs..], inputs);
        let b = Matrix::rows(&w[columns.start * inputs..], inputs).transposed();
        let start = y_at.at(rows.start * outputs + columns.start);
        let out = Matrix { start, row_stride: outputs, column_stride: 1 };
        let start = Start::row(bias).columns(columns.clone());
        // SAFETY: x has these rows of `inputs` values, w these columns; y's elements are this part's own.
        match panels {
            Some(panels) => unsafe { panels[0].product(rows.len(), a, (out, start)) },
            None => unsafe { matmul((rows.len(), columns.len(), inputs), a, b, (out, start)) },
        }
    };
    if panels.is_none() && takes_panels::<T>() && 2 * rows <= outputs {
        parallel::map(outputs, GRAIN, |columns| part(0..rows, columns));
    } else {
        parallel::map(rows, GRAIN, |rows| part(rows, 0..outputs));
    }
    y
}

/// dx = dy·w, dw = dyᵀ·x, db = Σ dy.
fn backward<T: Real>(inputs: &[&Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (inputs[0], inputs[1]);
    let (out, width) = matrix_dims(weight)?;
    with_values::<T, _>(gradient, |dy| {
        let rows = dy.len() / out;
        let dx = if x.track_op() {
            let mut dx = unwritten(rows * width);
            with_values::<T, _>(weight, |w| {
                parallel::for_rows(&mut dx, width, GRAIN, |range, dx| {
                    let (a, b) = (Matrix::rows(&dy[range.start * out..], out), Matrix::rows(w, width));
                    let target = (Matrix::rows_mut(dx, width), Start::Zero);
                    // SAFETY: dy has these rows of `out` values, w out·in values; dx is this part's own rows.
                    unsafe { matmul((range.len(), width, out), a, b, target) }
                })
            })?;
            Some(tensor(dx, x.shape()))
        } else {
            None
        };
        let dw = if weight.track_op() {
            let dw = with_values::<T, _>(x, |x| weight_gradient(dy, x, (out, width)))?;
            Some(tensor(dw, weight.shape()))
        } else {
            None
        };
        let mut gradients = vec![dx, dw];
        if let Some(bias) = inputs.get(2) {
            gradients.push(bias.track_op().then(|| tensor(column_sums(dy, out), bias.shape())));
        }
        Ok(gradients)
    })?
}

/// dyᵀ·x. Threads share out the rows where these are many, so that nothing is read by two of them; else the longer side of the
/// result.
fn weight_gradient<T: Real>(dy: &[T], x: &[T], (out, width): (usize, usize)) -> Vec<T> {
    /// Rows a thread for each place of the longer side that are worth a sum of its own.
    const ROWS: usize = 4;
    let rows = dy.len() / out;
    let longer = out.max(width);
    // SAFETY (of both): the columns lie inside dy's rows of `out` values and x's of `width`; what is written is the part's own.
    let product = |rows: Range<usize>, (down, across): (Range<usize>, Range<usize>), target: Matrix<*mut T>| {
        let a = Matrix { start: &raw const dy[rows.start * out + down.start], row_stride: 1, column_stride: out };
        let b = Matrix { start: &raw const x[rows.start * width + across.start], row_stride: width, column_stride: 1 };
        unsafe { matmul((down.len(), across.len(), rows.len()), a, b, (target, Start::Zero)) }
    };
    let threads = parallel::parts(usize::MAX, 1);
    if threads > 1 && rows >= threads * ROWS * longer {
        return sum_of(parallel::map(rows, ROWS, |range| {
            let mut sums = unwritten(out * width);
            product(range, (0..out, 0..width), Matrix::rows_mut(&mut sums, width));
            sums
        }));
    }
    let mut dw = unwritten(out * width);
    let dw_at = parallel::Disjoint::new(&mut dw);
    parallel::map(longer, GRAIN, |range| {
        let (down, across) = if out >= width { (range, 0..width) } else { (0..out, range) };
        let start = dw_at.at(down.start * width + across.start);
        product(0..rows, (down, across), Matrix { start, row_stride: width, column_stride: 1 });
    });
    dw
}

/// Sums over the rows of `[m, width]`.
pub fn column_sums<T: Real>(values: &[T], width: usize) -> Vec<T> {
    let partial = parallel::map(values.len() / width, 256, |range| {
        let mut sums = vec![T::ZERO; width];
        add_rows(&mut sums, &values[range.start * width..range.end * width]);
        sums
    });
    sum_of(partial)
}

/// Rows whose sum is taken by itself: in one sum of all, each of a hundred thousand would lose what it is too small for.
pub const ROWS_OF_A_SUM: usize = 256;

vectorised! {
    /// Adds every row of `values` to `sums`.
    fn add_rows[T: Real](sums: &mut [T], values: &[T]) {
        let width = sums.len();
        let mut of_block = vec![T::ZERO; width];
        for block in values.chunks(ROWS_OF_A_SUM * width) {
            of_block.fill(T::ZERO);
            for row in block.chunks_exact(width) {
                of_block.iter_mut().zip(row).for_each(|(sum, v)| *sum += *v);
            }
            sums.iter_mut().zip(&of_block).for_each(|(sum, v)| *sum += *v);
        }
    }
}

vectorised! {
    /// y = x + vector in every row.
    fn add_to_rows[T: Real](y: &mut [T], x: &[T], vector: &[T]) {
        for (y, x) in y.chunks_exact_mut(vector.len()).zip(x.chunks_exact(vector.len())) {
            y.iter_mut().zip(x.iter().zip(vector)).for_each(|(y, (x, v))| *y = *x + *v);
        }
    }
}

/// The element-wise sum of the threads' partial results, in their order.
pub fn sum_of<T: Real>(partial: Vec<Vec<T>>) -> Vec<T> {
    let mut partial = partial.into_iter();
    let mut total = partial.next().unwrap_or_default();
    for part in partial {
        total.iter_mut().zip(&part).for_each(|(sum, v)| *sum += *v);
    }
    total
}

/// [`sum_of`] the first ones, and of the second ones.
pub fn sums_of<T: Real>(pairs: impl Iterator<Item = (Vec<T>, Vec<T>)>) -> (Vec<T>, Vec<T>) {
    let (first, second) = pairs.unzip();
    (sum_of(first), sum_of(second))
}

/// Adds each image's vector at all its positions (the time embedding of a residual block).
///
/// # Shapes
/// - x `[b, .., c]`, vector `[b, c]` → x's
pub fn add_per_image(x: &Tensor, vector: &Tensor) -> Result<Tensor> {
    let (b, c) = vector.dims2()?;
    let dims = x.dims();
    if dims.first() != Some(&b) || dims.last() != Some(&c) {
        bail!("add_per_image: vectors [{b}, {c}] do not fit a batch {dims:?}");
    }
    if !on_cpu(x) {
        let rows = x.reshape((b, (), c))?; // [b, positions, c]
        return rows.broadcast_add(&vector.unsqueeze(1)?)?.reshape(dims);
    }
    let x = x.contiguous()?;
    let vector = vector.contiguous()?;
    let positions = x.elem_count() / (b * c);
    for_float!(x, T => {
        let values = with_values::<T, _>(&x, |x| with_values::<T, _>(&vector, |vector| {
            let mut y = unwritten(x.len());
            parallel::for_rows(&mut y, positions * c, 1, |range, y| {
                for (image, y) in range.zip(y.chunks_exact_mut(positions * c)) {
                    add_to_rows(y, &x[image * positions * c..][..positions * c], &vector[image * c..][..c]);
                }
            });
            y
        }))??;
        graft("add_per_image", &[&x, &vector], (values, dims.to_vec()), move |inputs, _, gradient| {
            let sums = with_values::<T, _>(gradient, |dy| {
                let mut sums = vec![T::ZERO; b * c];
                parallel::for_rows(&mut sums, c, 1, |range, out| {
                    for (image, sum) in range.zip(out.chunks_exact_mut(c)) {
                        add_rows(sum, &dy[image * positions * c..][..positions * c]);
                    }
                });
                sums
            })?;
            Ok(vec![Some(gradient.clone()), Some(tensor(sums, inputs[1].shape()))])
        })
    })
}

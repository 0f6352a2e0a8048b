//! Multi-scale deformable sampling (Deformable DETR): each query reads a few places of several maps, between their
//! positions by bilinear interpolation, and sums what it reads by given shares. Forward only: nothing here is trained.

use candle_core::{DType, Result, Tensor, bail};

use super::graft::{for_float, on_cpu, tensor, with_values};
use super::parallel;
use super::real::{Real, vectorised};

/// Rows (a query and a head each) that a thread takes at least.
const GRAIN: usize = 64;

/// Σ share · value(place), over the points in all maps; outside a map all is 0.
///
/// Places are shares of a map's width and height, so that (0, 0) is its upper left corner and (1, 1) its lower right one
/// (PyTorch's `grid_sample` with `align_corners=False` and zero padding).
///
/// # Shapes
/// - values `[b, s, heads·d]`: the maps of `sizes` (height, width) one behind the other, row by row
/// - places `[b, q, heads, levels, points, 2]` (x, y), shares `[b, q, heads, levels, points]` → `[b, q, heads·d]`
///
/// # Errors
/// When shapes do not fit, or one of the inputs wants a gradient.
pub fn deformable_sample(
    values: &Tensor,
    sizes: &[(usize, usize)],
    places: &Tensor,
    shares: &Tensor,
) -> Result<Tensor> {
    let ((b, s, width), (_, q, heads, levels, points)) = (values.dims3()?, shares.dims5()?);
    let positions: usize = sizes.iter().map(|(h, w)| h * w).sum();
    let fits = places.dims() == [b, q, heads, levels, points, 2] && shares.dim(0)? == b && sizes.len() == levels;
    if !fits || positions != s || heads == 0 || width % heads != 0 {
        bail!(
            "deformable_sample: values {:?}, places {:?}, shares {:?} and maps {sizes:?} do not fit",
            values.dims(),
            places.dims(),
            shares.dims()
        );
    }
    if values.track_op() || places.track_op() || shares.track_op() {
        bail!("deformable_sample: has no gradient; detach its inputs");
    }
    let layout = Layout { s, q, heads, points, d: width / heads };
    if !on_cpu(values) {
        return composed(values, sizes, places, shares, layout);
    }
    for_float!(values, T => {
        let out = with_values::<T, _>(values, |values| with_values::<T, _>(places, |places| {
            with_values::<T, _>(shares, |shares| {
                let mut out = vec![T::ZERO; b * q * width];
                parallel::for_rows(&mut out, layout.d, GRAIN, |rows, out| {
                    sample_rows(out, rows.start, (values, places, shares), sizes, layout);
                });
                out
            })
        }))???;
        Ok(tensor(out, (b, q, width)))
    })
}

#[derive(Clone, Copy)]
struct Layout {
    /// Positions in all maps.
    s: usize,
    /// Queries.
    q: usize,
    heads: usize,
    points: usize,
    /// Values of a head.
    d: usize,
}

/// The four positions around (x, y), in pixels, that are inside a map, with their shares.
#[inline(always)]
fn around(x: f64, y: f64, (height, width): (usize, usize)) -> [Option<(usize, f64)>; 4] {
    let (left, top) = (x.floor(), y.floor());
    let (right_share, lower_share) = (x - left, y - top);
    [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)].map(|(dx, dy)| {
        let (column, row) = (left + dx, top + dy);
        let is_inside = column >= 0.0 && row >= 0.0 && column < width as f64 && row < height as f64;
        let share = |at: f64, of: f64| if at == 0.0 { 1.0 - of } else { of };
        is_inside.then(|| (row as usize * width + column as usize, share(dx, right_share) * share(dy, lower_share)))
    })
}

vectorised! {
    /// Rows of `d` values from row `first` on, counted over `[b, q, heads]`.
    fn sample_rows[T: Real](
        out: &mut [T],
        first: usize,
        inputs: (&[T], &[T], &[T]),
        sizes: &[(usize, usize)],
        layout: Layout,
    ) {
        let (values, places, shares) = inputs;
        let Layout { s, q, heads, points, d } = layout;
        let per_row = sizes.len() * points;
        for (row, out) in (first..).zip(out.chunks_exact_mut(d)) {
            let (picture, head) = (row / (q * heads), row % heads);
            let mut start = picture * s;
            for (level, &(height, width)) in sizes.iter().enumerate() {
                for point in 0..points {
                    let at = row * per_row + level * points + point;
                    let x = places[2 * at].to_f64() * width as f64 - 0.5;
                    let y = places[2 * at + 1].to_f64() * height as f64 - 0.5;
                    for (position, share) in around(x, y, (height, width)).into_iter().flatten() {
                        let share = T::of(share) * shares[at];
                        let value = &values[((start + position) * heads + head) * d..][..d];
                        for i in 0..d {
                            out[i] += share * value[i];
                        }
                    }
                }
                start += height * width;
            }
        }
    }
}

/// The same in tensor operations: the four neighbours of all points of a level are gathered one after the other.
fn composed(
    values: &Tensor,
    sizes: &[(usize, usize)],
    places: &Tensor,
    shares: &Tensor,
    layout: Layout,
) -> Result<Tensor> {
    let Layout { q, heads, points, d, .. } = layout;
    let b = values.dim(0)?;
    let by_head = |x: Tensor, rows: usize, columns: usize| -> Result<Tensor> {
        x.reshape((b, rows, heads, columns))?.transpose(1, 2)?.contiguous()?.reshape((b * heads, rows, columns))
    };
    let values = by_head(values.contiguous()?, layout.s, d)?; // [b·heads, s, d]
    let mut sum = Tensor::zeros((b * heads, q, d), values.dtype(), values.device())?;
    let mut start = 0;
    for (level, &(height, width)) in sizes.iter().enumerate() {
        let map = values.narrow(1, start, height * width)?.contiguous()?;
        start += height * width;
        let places = places.narrow(3, level, 1)?.contiguous()?;
        let axis = |axis: usize, side: usize| -> Result<Tensor> {
            by_head(places.narrow(5, axis, 1)?.contiguous()?, q, points)?.affine(side as f64, -0.5)
        };
        let (x, y) = (axis(0, width)?, axis(1, height)?); // [b·heads, q, points]
        let share = by_head(shares.narrow(3, level, 1)?.contiguous()?, q, points)?;
        let (left, top) = (x.floor()?, y.floor()?);
        for (dx, dy) in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)] {
            let (column, row) = ((&left + dx)?, (&top + dy)?);
            let near = |at: &Tensor, exact: &Tensor| (at - exact)?.abs()?.affine(-1.0, 1.0);
            let inside = |at: &Tensor, side: usize| at.ge(0.0)?.mul(&at.lt(side as f64)?)?.to_dtype(share.dtype());
            let share = (near(&column, &x)? * near(&row, &y)?)?.mul(&share)?;
            let share = (share * inside(&column, width)?)?.mul(&inside(&row, height)?)?;
            let last = |side: usize| side as f64 - 1.0;
            let position = ((row.clamp(0.0, last(height))? * width as f64)? + column.clamp(0.0, last(width))?)?;
            let index = position.to_dtype(DType::U32)?.reshape((b * heads, q * points, 1))?;
            let index = index.broadcast_as((b * heads, q * points, d))?.contiguous()?;
            let read = map.gather(&index, 1)?.reshape((b * heads, q, points, d))?;
            sum = (sum + read.broadcast_mul(&share.unsqueeze(3)?)?.sum(2)?)?;
        }
    }
    sum.reshape((b, heads, q, d))?.transpose(1, 2)?.contiguous()?.reshape((b, q, heads * d)) // [b, q, heads·d]
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::ops::graft::composed as without_kernels;
    use crate::rng::Rng;

    #[test]
    fn the_kernel_and_the_composition_agree() {
        let mut rng = Rng::new(5, "deformable twins", 0);
        let sizes = [(5, 3), (2, 4)];
        let values = rng.normal_tensor(&[2, 23, 6]).unwrap();
        // Around the maps too: a third of the places lie outside.
        let places = rng.normal_tensor(&[2, 70, 2, 2, 3, 2]).unwrap().affine(0.5, 0.5).unwrap();
        let shares = rng.normal_tensor(&[2, 70, 2, 2, 3]).unwrap();
        let sample = || deformable_sample(&values, &sizes, &places, &shares).unwrap().flatten_all().unwrap();
        let [kernel, twin] = [sample(), without_kernels(sample)].map(|t| t.to_vec1::<f32>().unwrap());
        let largest = kernel.iter().fold(0f32, |largest, v| largest.max(v.abs()));
        assert!(largest > 1.0);
        for (kernel, twin) in kernel.iter().zip(&twin) {
            assert!((kernel - twin).abs() < 1e-5 * largest, "kernel {kernel}, composition {twin}");
        }
    }

    #[test]
    fn a_place_in_the_middle_of_a_position_reads_it_alone() {
        let values = Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap().reshape((1, 6, 1)).unwrap();
        // Column 2, row 1 of 3 × 2; halfway between columns 0 and 1 of row 0; the corner, of which a quarter is inside.
        let places = [2.5f32 / 3.0, 0.75, 1.0 / 3.0, 0.25, 1.0, 1.0];
        let places = Tensor::new(&places, &Device::Cpu).unwrap().reshape((1, 3, 1, 1, 1, 2)).unwrap();
        let shares = Tensor::ones((1, 3, 1, 1, 1), DType::F32, &Device::Cpu).unwrap();
        let read = deformable_sample(&values, &[(2, 3)], &places, &shares).unwrap();
        let read: Vec<f32> = read.flatten_all().unwrap().to_vec1().unwrap();
        assert!(read.iter().zip([5.0, 0.5, 1.25]).all(|(read, exact)| (read - exact).abs() < 1e-5), "{read:?}");
    }

    #[test]
    fn refuses_what_wants_a_gradient() {
        let var = |shape: &[usize]| Var::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let error = deformable_sample(&var(&[1, 1, 1]), &[(1, 1)], &var(&[1, 1, 1, 1, 1, 2]), &var(&[1; 5]));
        assert!(error.unwrap_err().to_string().contains("no gradient"));
    }
}

//! Sums over everything: means for losses, and the length of a gradient.

use candle_core::{DType, Result, Tensor, bail};

use super::cuda;
use super::elementwise::GRAIN;
use super::graft::{for_float, graft, on_cpu, tensor, values_in, with_values};
use super::joined::Joined;
use super::parallel;
use super::real::{Real, vectorised};

/// The mean of all elements, summed in f64 on the CPU.
///
/// # Shapes
/// - any → scalar
pub fn mean_all(x: &Tensor) -> Result<Tensor> {
    if !on_cpu(x) {
        return x.mean_all();
    }
    let count = x.elem_count() as f64;
    if count == 0.0 {
        bail!("mean_all: {:?} holds no elements", x.dims());
    }
    for_float!(x, T => {
        let sums = with_values::<T, _>(x, |x| parallel::map(x.len(), GRAIN, |range| sum(&x[range])))?;
        let total: f64 = sums.into_iter().sum();
        graft("mean_all", &[x], (vec![T::of(total / count)], ()), move |inputs, _, gradient| {
            let each = with_values::<T, _>(gradient, |dy| dy[0] * T::of(1.0 / count))?;
            let shape = inputs[0].shape();
            Ok(vec![Some(tensor(vec![each; shape.elem_count()], shape))])
        })
    })
}

/// √Σx² over all elements of all tensors, without history. On the CPU they are of one number format and added in f64; the
/// result has the same bits with any number of threads.
pub fn global_norm(tensors: &[Tensor]) -> Result<f64> {
    let Some(first) = tensors.first() else { return Ok(0.0) };
    if tensors.iter().all(on_cpu) {
        return for_float!(first, T => sum_of_squares::<T>(tensors)).map(f64::sqrt);
    }
    if let Some(sum) = cuda::sum_of_squares(tensors)? {
        return Ok(sum.sqrt());
    }
    let squares = tensors.iter().map(|x| x.detach().sqr()?.sum_all()?.to_dtype(DType::F32));
    // Stacked, so that the device is waited for once.
    let squares: Vec<f64> = Tensor::stack(&squares.collect::<Result<Vec<_>>>()?, 0)?.to_dtype(DType::F64)?.to_vec1()?;
    Ok(squares.iter().sum::<f64>().sqrt())
}

/// In one parallel section, by parts of one length, each summed by one thread.
fn sum_of_squares<T: Real>(tensors: &[Tensor]) -> Result<f64> {
    let tensors = tensors.iter().map(Tensor::contiguous).collect::<Result<Vec<_>>>()?;
    let held: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let values = held.iter().map(|(storage, layout)| values_in::<T>(storage, layout)).collect::<Result<Vec<_>>>()?;
    let whole = Joined::new(values.iter().map(|values| values.len()));
    let of_part = |part: usize| {
        let mut sum = 0.0;
        let range = part * GRAIN..whole.total().min((part + 1) * GRAIN);
        whole.for_pieces(range, |idx, range| sum += squares(&values[idx][range]));
        sum
    };
    let sums = parallel::map(whole.total().div_ceil(GRAIN), 1, |parts| parts.map(of_part).collect::<Vec<f64>>());
    Ok(sums.iter().flatten().sum())
}

/// Sums that run side by side, so that they vectorise.
const LANES: usize = 8;

vectorised! {
    fn sum[T: Real](x: &[T]) -> f64 {
        let mut lanes = [0.0; LANES];
        let mut chunks = x.chunks_exact(LANES);
        for chunk in &mut chunks {
            lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += x.to_f64());
        }
        lanes.iter().sum::<f64>() + chunks.remainder().iter().map(|x| x.to_f64()).sum::<f64>()
    }
}

vectorised! {
    fn squares[T: Real](x: &[T]) -> f64 {
        let mut lanes = [0.0; LANES];
        let mut chunks = x.chunks_exact(LANES);
        for chunk in &mut chunks {
            lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += x.to_f64() * x.to_f64());
        }
        lanes.iter().sum::<f64>() + chunks.remainder().iter().map(|x| x.to_f64() * x.to_f64()).sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn the_norm_is_over_all_tensors_and_over_every_thread() {
        let cpu = Device::Cpu;
        // 3² + 4² and 100,003 times 2².
        let tensors = [Tensor::new(&[[3f32], [4.0]], &cpu).unwrap(), Tensor::full(2f32, 100_003, &cpu).unwrap()];
        let expected = (25.0 + 4.0 * 100_003.0f64).sqrt();
        assert!((global_norm(&tensors).unwrap() - expected).abs() < 1e-9);
        let composed = super::super::graft::composed(|| global_norm(&tensors).unwrap());
        assert!((composed - expected).abs() < 1e-3, "{composed}");
        assert_eq!(global_norm(&[]).unwrap(), 0.0);
        // The parts are the same whatever the number of threads.
        let x = crate::rng::Rng::new(7, "norm", 0).normal_tensor(&[50_003]).unwrap();
        let expected: f64 = x.to_vec1::<f32>().unwrap().chunks(GRAIN).map(squares).sum();
        assert_eq!(global_norm(&[x]).unwrap(), expected.sqrt());
        let broken = [Tensor::new(&[1f32, f32::NAN], &cpu).unwrap()];
        assert!(global_norm(&broken).unwrap().is_nan());
    }
}

//! Arithmetic of whole tensors, element by element: what stands between the layers and in the losses.

use candle_core::{Result, Tensor, bail};

use super::buffer::unwritten;
use super::graft::{for_float, graft, on_cpu, tensor, with_values, with_values_mut};
use super::parallel;
use super::real::{Real, vectorised};

/// Elements a thread takes at least.
pub const GRAIN: usize = 8192;

/// a + b.
///
/// # Shapes
/// - a, b of one shape → the same
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !on_cpu(a) {
        return a + b;
    }
    for_float!(a, T => {
        let values = zip::<T>("add", [a, b], |a, b| a + b)?;
        graft("add", &[a, b], (values, a.shape().clone()), |_, _, gradient| {
            Ok(vec![Some(gradient.clone()), Some(gradient.clone())])
        })
    })
}

/// a − b.
///
/// # Shapes
/// - a, b of one shape → the same
pub fn sub(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !on_cpu(a) {
        return a - b;
    }
    for_float!(a, T => {
        let values = zip::<T>("sub", [a, b], |a, b| a - b)?;
        graft("sub", &[a, b], (values, a.shape().clone()), |_, _, gradient| {
            let negative = with_values::<T, _>(gradient, |dy| mapped(dy, |dy| -dy))?;
            Ok(vec![Some(gradient.clone()), Some(tensor(negative, gradient.shape()))])
        })
    })
}

/// a·b.
///
/// # Shapes
/// - a, b of one shape → the same
pub fn mul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !on_cpu(a) {
        return a * b;
    }
    for_float!(a, T => {
        let values = zip::<T>("mul", [a, b], |a, b| a * b)?;
        graft("mul", &[a, b], (values, a.shape().clone()), |inputs, _, gradient| {
            let times = |other: &Tensor| zip::<T>("mul", [gradient, other], |dy, other| dy * other);
            let gradient_of = |i: usize| -> Result<Option<Tensor>> {
                Ok(if inputs[i].track_op() { Some(tensor(times(inputs[1 - i])?, gradient.shape())) } else { None })
            };
            Ok(vec![gradient_of(0)?, gradient_of(1)?])
        })
    })
}

/// factor·x + offset.
pub fn affine(x: &Tensor, factor: f64, offset: f64) -> Result<Tensor> {
    if !on_cpu(x) {
        return x.affine(factor, offset);
    }
    for_float!(x, T => {
        let (factor, offset) = (T::of(factor), T::of(offset));
        map::<T>("affine", x, move |x| x * factor + offset, move |_| factor)
    })
}

/// x².
pub fn square(x: &Tensor) -> Result<Tensor> {
    if !on_cpu(x) {
        return x.sqr();
    }
    for_float!(x, T => map::<T>("square", x, |x| x * x, |x| x + x))
}

/// |x|, its slope at 0 taken as 1.
pub fn abs(x: &Tensor) -> Result<Tensor> {
    if !on_cpu(x) {
        return x.abs();
    }
    let slope = |is_negative: bool| if is_negative { -1.0 } else { 1.0 };
    for_float!(x, T => {
        map::<T>("abs", x, |x| if x < T::ZERO { -x } else { x }, move |x| T::of(slope(x < T::ZERO)))
    })
}

/// eˣ.
pub fn exp(x: &Tensor) -> Result<Tensor> {
    if !on_cpu(x) {
        return x.exp();
    }
    for_float!(x, T => map::<T>("exp", x, |x| x.exp(), |x| x.exp()))
}

/// x, but no less than `low` and no more than `high`; no gradient flows where it is cut. What is not a number stays so.
pub fn clamp(x: &Tensor, low: f64, high: f64) -> Result<Tensor> {
    if !on_cpu(x) {
        return x.clamp(low, high);
    }
    for_float!(x, T => {
        let (low, high) = (T::of(low), T::of(high));
        let value = move |x| if x < low { low } else if x > high { high } else { x };
        map::<T>("clamp", x, value, move |x| if x < low || x > high { T::ZERO } else { T::ONE })
    })
}

/// f(x), with the slope f′(x). On the CPU only.
pub fn map<T: Real>(
    name: &'static str,
    x: &Tensor,
    f: impl Fn(T) -> T + Copy + Send + Sync + 'static,
    slope: impl Fn(T) -> T + Copy + Send + Sync + 'static,
) -> Result<Tensor> {
    let values = with_values::<T, _>(x, |x| mapped(x, f))?;
    graft(name, &[x], (values, x.shape().clone()), move |inputs, _, gradient| {
        let dx = with_values::<T, _>(inputs[0], |x| {
            with_values::<T, _>(gradient, |dy| {
                let mut dx = unwritten(x.len());
                parallel::for_rows(&mut dx, 1, GRAIN, |range, dx| scale_by(dx, &x[range.clone()], &dy[range], slope));
                dx
            })
        })??;
        Ok(vec![Some(tensor(dx, inputs[0].shape()))])
    })
}

/// a + b without history.
pub fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !on_cpu(a) {
        return a.detach() + b.detach();
    }
    for_float!(a, T => Ok(tensor(zip::<T>("sum", [a, b], |a, b| a + b)?, a.shape())))
}

/// target ← target + addend. On the CPU only; for memory that no one else looks at.
pub fn add_in_place(target: &Tensor, addend: &Tensor) -> Result<()> {
    same_shape("add_in_place", [target, addend])?;
    for_float!(target, T => {
        with_values::<T, _>(addend, |addend| {
            with_values_mut::<T, _>(target, |target| {
                parallel::for_rows(target, 1, GRAIN, |range, target| add_values(target, &addend[range]));
            })
        })?
    })
}

fn same_shape(name: &str, [a, b]: [&Tensor; 2]) -> Result<()> {
    if a.dims() != b.dims() {
        bail!("{name}: {:?} and {:?} are not of one shape", a.dims(), b.dims());
    }
    Ok(())
}

fn mapped<T: Real>(x: &[T], f: impl Fn(T) -> T + Copy + Send + Sync) -> Vec<T> {
    let mut y = unwritten(x.len());
    parallel::for_rows(&mut y, 1, GRAIN, |range, y| map_values(y, &x[range], f));
    y
}

fn zip<T: Real>(name: &str, inputs: [&Tensor; 2], f: impl Fn(T, T) -> T + Copy + Send + Sync) -> Result<Vec<T>> {
    same_shape(name, inputs)?;
    with_values::<T, _>(inputs[0], |a| {
        with_values::<T, _>(inputs[1], |b| {
            let mut y = unwritten(a.len());
            parallel::for_rows(&mut y, 1, GRAIN, |range, y| zip_values(y, &a[range.clone()], &b[range], f));
            y
        })
    })?
}

vectorised! {
    /// y = f(x).
    fn map_values[T: Real, F: Fn(T) -> T](y: &mut [T], x: &[T], f: F) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = f(*x));
    }
}

vectorised! {
    /// y = f(a, b).
    fn zip_values[T: Real, F: Fn(T, T) -> T](y: &mut [T], a: &[T], b: &[T], f: F) {
        y.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (a, b))| *y = f(*a, *b));
    }
}

vectorised! {
    /// dx = dy·slope(x).
    fn scale_by[T: Real, F: Fn(T) -> T](dx: &mut [T], x: &[T], dy: &[T], slope: F) {
        dx.iter_mut().zip(x.iter().zip(dy)).for_each(|(dx, (x, dy))| *dx = *dy * slope(*x));
    }
}

vectorised! {
    fn add_values[T: Real](target: &mut [T], addend: &[T]) {
        target.iter_mut().zip(addend).for_each(|(target, addend)| *target += *addend);
    }
}

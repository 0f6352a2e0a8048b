//! One AdamW update with its exponential moving average, in a single pass over a parameter.

use std::ops::Range;

use candle_core::{Result, Tensor, Var, bail};

use super::cuda;
use super::elementwise::GRAIN;
use super::graft::{on_cpu, with_values, with_values_mut};
use super::parallel;
use super::real::{Real, vectorised};

/// AdamW (Loshchilov & Hutter 2019) as `torch.optim.AdamW`, at one step.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first and the second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled: a share `lr·weight_decay` of the parameter itself.
    pub weight_decay: f64,
    /// Updates made including this one, from 1.
    pub step: u64,
    /// What gradients are multiplied with first (clipping by the global norm).
    pub gradient_scale: f64,
    /// ema ← decay·ema + (1 − decay)·parameter.
    pub ema_decay: f64,
}

/// What AdamW remembers of a parameter; all of its shape. While the parameter is on a GPU, the average alone or all of them
/// may be kept in the host's memory.
pub struct Moments {
    /// Mean of the gradient.
    pub first: Var,
    /// Mean of its square.
    pub second: Var,
    /// Averaged parameter; None: no average is kept.
    pub ema: Option<Var>,
}

impl AdamW {
    /// Updates the parameter and its moments in place.
    ///
    /// # Shapes
    /// - gradient of the parameter's shape
    pub fn update(&self, parameter: &Var, gradient: &Tensor, moments: &Moments) -> Result<()> {
        if gradient.dims() != parameter.dims() {
            bail!("adamw: gradient {:?} for a parameter {:?}", gradient.dims(), parameter.dims());
        }
        let device = |var: &Var| var.device().location();
        if device(&moments.first) != device(parameter) {
            return self.update_from_afar(parameter, gradient, moments);
        }
        if let Some(ema) = moments.ema.as_ref().filter(|ema| device(ema) != device(parameter)) {
            let here = Moments { first: moments.first.clone(), second: moments.second.clone(), ema: None };
            self.update(parameter, gradient, &here)?;
            return self.follow(ema, parameter);
        }
        if !on_cpu(parameter) {
            if cuda::adamw(parameter, gradient, moments, self.factors())? {
                return Ok(());
            }
            return self.update_on_device(parameter, gradient, moments);
        }
        let factors = self.factors();
        with_values::<f32, _>(gradient, |g| {
            with_values_mut(parameter, |p| {
                with_values_mut(&moments.first, |m| {
                    with_values_mut(&moments.second, |v| match &moments.ema {
                        Some(ema) => with_values_mut(ema, |e| {
                            in_parts([p, m, v, e], |[p, m, v, e], range| fused(p, m, v, e, &g[range], factors));
                        }),
                        None => {
                            in_parts([p, m, v], |[p, m, v], range| fused_without_average(p, m, v, &g[range], factors));
                            Ok(())
                        }
                    })
                })
            })
        })?????;
        Ok(())
    }

    /// Where the moments are; the parameter travels there and back.
    fn update_from_afar(&self, parameter: &Var, gradient: &Tensor, moments: &Moments) -> Result<()> {
        let device = moments.first.device();
        let copy = Var::from_tensor(&parameter.as_detached_tensor().to_device(device)?)?;
        self.update(&copy, &gradient.to_device(device)?, moments)?;
        parameter.set(&copy.as_detached_tensor().to_device(parameter.device())?)
    }

    /// The average alone, in the host's memory.
    fn follow(&self, ema: &Var, parameter: &Var) -> Result<()> {
        let parameter = parameter.as_detached_tensor().to_device(ema.device())?;
        let decay = self.ema_decay as f32;
        with_values::<f32, _>(&parameter, |p| {
            with_values_mut(ema, |e| in_parts([e], |[e], range| averaged(e, &p[range], decay)))
        })??;
        Ok(())
    }

    fn factors(&self) -> Factors<f32> {
        let (b1, b2) = self.betas;
        let correction = |beta: f64| 1.0 - beta.powi(self.step.min(i32::MAX as u64) as i32);
        Factors {
            gradient_scale: self.gradient_scale as f32,
            shrink: (1.0 - self.lr * self.weight_decay) as f32,
            betas: (b1 as f32, b2 as f32),
            step_size: (self.lr / correction(b1)) as f32,
            inverse_root: (1.0 / correction(b2).sqrt()) as f32,
            eps: self.eps as f32,
            ema_decay: self.ema_decay as f32,
        }
    }

    fn update_on_device(&self, parameter: &Var, gradient: &Tensor, moments: &Moments) -> Result<()> {
        let (b1, b2) = self.betas;
        let f = self.factors();
        let gradient = (gradient.detach() * self.gradient_scale)?;
        let first = ((moments.first.as_detached_tensor() * b1)? + (&gradient * (1.0 - b1))?)?;
        let second = ((moments.second.as_detached_tensor() * b2)? + (gradient.sqr()? * (1.0 - b2))?)?;
        let denominator = ((second.sqrt()? * f.inverse_root as f64)? + self.eps)?;
        let shrunk = (parameter.as_detached_tensor() * f.shrink as f64)?;
        let updated = (shrunk - ((&first / denominator)? * f.step_size as f64)?)?;
        parameter.set(&updated)?;
        moments.first.set(&first)?;
        moments.second.set(&second)?;
        let Some(average) = &moments.ema else { return Ok(()) };
        let ema = ((average.as_detached_tensor() * self.ema_decay)? + (&updated * (1.0 - self.ema_decay))?)?;
        average.set(&ema)
    }
}

/// Calls `f` with the same range of each, in parallel.
fn in_parts<const N: usize>(all: [&mut [f32]; N], f: impl Fn([&mut [f32]; N], Range<usize>) + Send + Sync) {
    let len = all[0].len();
    assert!(all.iter().all(|values| values.len() == len), "a parameter and its moments are of one shape");
    let all = all.map(parallel::Disjoint::new);
    parallel::map(len, GRAIN, |range| {
        // SAFETY: the ranges do not overlap and end at `len`.
        let part =
            |at: &parallel::Disjoint<f32>| unsafe { std::slice::from_raw_parts_mut(at.at(range.start), range.len()) };
        f(all.each_ref().map(part), range.clone());
    });
}

/// What the update multiplies with.
#[derive(Clone, Copy)]
pub struct Factors<T> {
    pub gradient_scale: T,
    pub shrink: T,
    pub betas: (T, T),
    pub step_size: T,
    pub inverse_root: T,
    pub eps: T,
    pub ema_decay: T,
}

vectorised! {
    fn fused[T: Real](p: &mut [T], m: &mut [T], v: &mut [T], e: &mut [T], g: &[T], f: Factors<T>) {
        let n = g.len();
        let (p, m, v, e) = (&mut p[..n], &mut m[..n], &mut v[..n], &mut e[..n]);
        for i in 0..n {
            let g = g[i] * f.gradient_scale;
            m[i] = f.betas.0 * m[i] + (T::ONE - f.betas.0) * g;
            v[i] = f.betas.1 * v[i] + (T::ONE - f.betas.1) * g * g;
            p[i] = p[i] * f.shrink - f.step_size * m[i] / (v[i].sqrt() * f.inverse_root + f.eps);
            e[i] = f.ema_decay * e[i] + (T::ONE - f.ema_decay) * p[i];
        }
    }
}

vectorised! {
    fn fused_without_average[T: Real](p: &mut [T], m: &mut [T], v: &mut [T], g: &[T], f: Factors<T>) {
        let n = g.len();
        let (p, m, v) = (&mut p[..n], &mut m[..n], &mut v[..n]);
        for i in 0..n {
            let g = g[i] * f.gradient_scale;
            m[i] = f.betas.0 * m[i] + (T::ONE - f.betas.0) * g;
            v[i] = f.betas.1 * v[i] + (T::ONE - f.betas.1) * g * g;
            p[i] = p[i] * f.shrink - f.step_size * m[i] / (v[i].sqrt() * f.inverse_root + f.eps);
        }
    }
}

vectorised! {
    fn averaged[T: Real](e: &mut [T], p: &[T], decay: T) {
        let p = &p[..e.len()];
        for i in 0..e.len() {
            e[i] = decay * e[i] + (T::ONE - decay) * p[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn moments(values: &[f32]) -> Moments {
        let var = |t: Tensor| Var::from_tensor(&t).unwrap();
        let p = Tensor::new(values, &Device::Cpu).unwrap();
        let zeros = p.zeros_like().unwrap();
        Moments { first: var(zeros.copy().unwrap()), second: var(zeros), ema: Some(var(p)) }
    }

    #[test]
    fn agrees_with_the_formulas_and_with_the_path_of_other_devices() {
        let start = [0.5f32, -1.0, 2.0];
        let (fused, composed) = (moments(&start), moments(&start));
        let bare = Moments { ema: None, ..moments(&start) };
        let r = Var::new(&start, &Device::Cpu).unwrap();
        let p = Var::new(&start, &Device::Cpu).unwrap();
        let q = Var::new(&start, &Device::Cpu).unwrap();
        // By hand in f64.
        let (mut value, mut m, mut v, mut ema) = (0.5f64, 0.0f64, 0.0f64, 0.5f64);
        for step in 1..=5u64 {
            let adamw = AdamW {
                lr: 0.01,
                betas: (0.9, 0.999),
                eps: 1e-8,
                weight_decay: 0.1,
                step,
                gradient_scale: 0.5,
                ema_decay: 0.9,
            };
            let gradient = Tensor::new(&[step as f32, -0.3, 0.0], &Device::Cpu).unwrap();
            adamw.update(&p, &gradient, &fused).unwrap();
            adamw.update_on_device(&q, &gradient, &composed).unwrap();
            adamw.update(&r, &gradient, &bare).unwrap();
            let g = step as f64 * 0.5;
            m = 0.9 * m + 0.1 * g;
            v = 0.999 * v + 0.001 * g * g;
            let corrected = (m / (1.0 - 0.9f64.powi(step as i32)), v / (1.0 - 0.999f64.powi(step as i32)));
            value = value * (1.0 - 0.01 * 0.1) - 0.01 * corrected.0 / (corrected.1.sqrt() + 1e-8);
            ema = 0.9 * ema + 0.1 * value;
        }
        let values = |t: &Tensor| t.to_vec1::<f32>().unwrap();
        assert!((values(&p)[0] as f64 - value).abs() < 1e-6, "{} {value}", values(&p)[0]);
        assert_eq!(values(&p), values(&r), "the average changes nothing");
        let [average, other] = [&fused, &composed].map(|moments| values(moments.ema.as_ref().unwrap()));
        assert!((average[0] as f64 - ema).abs() < 1e-6);
        for (a, b) in values(&p).iter().chain(&average).zip(values(&q).iter().chain(&other)) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }

    #[test]
    fn what_is_kept_elsewhere_follows_to_the_bit() {
        let start = [0.5f32, -1.0, 2.0];
        let [near, afar, beside] = [(); 3].map(|()| moments(&start));
        let [p, q, r] = [(); 3].map(|()| Var::new(&start, &Device::Cpu).unwrap());
        for step in 1..=3u64 {
            let adamw = AdamW {
                lr: 0.01,
                betas: (0.9, 0.999),
                eps: 1e-8,
                weight_decay: 0.1,
                step,
                gradient_scale: 0.5,
                ema_decay: 0.9,
            };
            let gradient = Tensor::new(&[step as f32, -0.3, 0.0], &Device::Cpu).unwrap();
            adamw.update(&p, &gradient, &near).unwrap();
            adamw.update_from_afar(&q, &gradient, &afar).unwrap();
            let here = Moments { first: beside.first.clone(), second: beside.second.clone(), ema: None };
            adamw.update(&r, &gradient, &here).unwrap();
            adamw.follow(beside.ema.as_ref().unwrap(), &r).unwrap();
        }
        let values = |var: &Var| var.to_vec1::<f32>().unwrap();
        let all = |parameter: &Var, moments: &Moments| {
            [parameter, &moments.first, &moments.second, moments.ema.as_ref().unwrap()].map(values)
        };
        assert_ne!(values(&p), start);
        assert_eq!(all(&p, &near), all(&q, &afar));
        assert_eq!(all(&p, &near), all(&r, &beside));
    }

    #[test]
    fn a_gradient_of_another_shape_is_refused() {
        let p = Var::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        let adamw = AdamW {
            lr: 0.1,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
            step: 1,
            gradient_scale: 1.0,
            ema_decay: 0.9,
        };
        assert!(adamw.update(&p, &Tensor::new(&[1f32], &Device::Cpu).unwrap(), &moments(&[1.0, 2.0])).is_err());
    }
}

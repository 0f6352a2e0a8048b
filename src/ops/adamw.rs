//! One AdamW update of parameters with their exponential moving averages, in a single pass over all of them.

use std::collections::HashSet;

use candle_core::{Result, Tensor, Var, bail};

use super::cuda;
use super::elementwise::GRAIN;
use super::graft::{on_cpu, values_in, with_values, with_values_mut};
use super::joined::Joined;
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

/// A parameter with its gradient, both of one shape, and what AdamW remembers of it.
#[derive(Clone, Copy)]
pub struct Parameter<'a> {
    /// What is updated, in f32.
    pub values: &'a Var,
    /// Of the loss, for the values; on the CPU in f32.
    pub gradient: &'a Tensor,
    /// Of all updates so far.
    pub moments: &'a Moments,
}

impl<'a> Parameter<'a> {
    fn is_here(&self, var: &Var) -> bool {
        var.device().location() == self.values.device().location()
    }

    /// The average, where it lies with the values.
    pub(super) fn average_here(&self) -> Option<&'a Var> {
        self.moments.ema.as_ref().filter(|ema| self.is_here(ema))
    }

    fn average_elsewhere(&self) -> Option<&'a Var> {
        self.moments.ema.as_ref().filter(|ema| !self.is_here(ema))
    }
}

impl AdamW {
    /// Updates all parameters and their moments in place. Those that lie together are updated in one go: many may be too
    /// small to be worth a launch or a parallel section of their own.
    ///
    /// Fails where a gradient is not of its parameter's shape, or a tensor would be updated twice.
    pub fn update(&self, parameters: &[Parameter]) -> Result<()> {
        for Parameter { values, gradient, moments } in parameters {
            let parts = [moments.first.dims(), moments.second.dims(), gradient.dims()];
            let average = moments.ema.as_ref().map(|ema| ema.dims());
            if let Some(other) = parts.into_iter().chain(average).find(|dims| *dims != values.dims()) {
                bail!("adamw: a gradient, moment or average {other:?} for a parameter {:?}", values.dims());
            }
        }
        let mut seen = HashSet::new();
        let vars = parameters.iter().flat_map(|Parameter { values, moments, .. }| {
            [Some(*values), Some(&moments.first), Some(&moments.second), moments.ema.as_ref()]
        });
        if !vars.flatten().all(|var| seen.insert(var.id())) {
            bail!("adamw: a tensor is given twice to one update");
        }
        let is_here = |own: &Parameter| own.is_here(&own.moments.first);
        let (here, from_afar): (Vec<_>, Vec<_>) = parameters.iter().copied().partition(is_here);
        let (of_cpu, of_device): (Vec<_>, Vec<_>) = here.iter().copied().partition(|own| on_cpu(own.values));
        self.update_on_cpu(&of_cpu)?;
        if !cuda::adamw(&of_device, self.factors())? {
            of_device.iter().try_for_each(|own| self.update_on_device(own))?;
        }
        for own in from_afar {
            self.update_from_afar(own)?;
        }
        for own in here {
            if let Some(average) = own.average_elsewhere() {
                self.follow(average, own.values)?;
            }
        }
        Ok(())
    }

    fn update_on_cpu(&self, parameters: &[Parameter]) -> Result<()> {
        let factors = self.factors();
        let gradients = parameters.iter().map(|own| own.gradient.contiguous()).collect::<Result<Vec<_>>>()?;
        let held: Vec<_> = gradients.iter().map(Tensor::storage_and_layout).collect();
        let gradients = held.iter().map(|(storage, layout)| values_in::<f32>(storage, layout));
        let gradients = gradients.collect::<Result<Vec<_>>>()?;
        let place = |var: &Var| with_values_mut::<f32, _>(var, parallel::Disjoint::new);
        let places = |own: &Parameter| {
            let average = own.average_here().map(place).transpose()?;
            Ok(([place(own.values)?, place(&own.moments.first)?, place(&own.moments.second)?], average))
        };
        let places = parameters.iter().map(places).collect::<Result<Vec<_>>>()?;
        let whole = Joined::new(gradients.iter().map(|gradient| gradient.len()));
        parallel::map(whole.total(), GRAIN, |range| {
            whole.for_pieces(range, |idx, range| {
                let (g, (own, average)) = (&gradients[idx][range.clone()], &places[idx]);
                // SAFETY: pieces of different threads do not overlap, nor do the tensors: each is a variable, with memory of
                // its own, and given once. They are as long as the gradient, and the caller holds them, so that they stay
                // where they are.
                let piece = |at: &parallel::Disjoint<f32>| unsafe {
                    std::slice::from_raw_parts_mut(at.at(range.start), range.len())
                };
                let [p, m, v] = own.each_ref().map(piece);
                match average.as_ref().map(piece) {
                    Some(e) => fused(p, m, v, e, g, factors),
                    None => fused_without_average(p, m, v, g, factors),
                }
            });
        });
        Ok(())
    }

    /// Where the moments are; the parameter travels there and back.
    fn update_from_afar(&self, Parameter { values, gradient, moments }: Parameter) -> Result<()> {
        let device = moments.first.device();
        let copy = Var::from_tensor(&values.as_detached_tensor().to_device(device)?)?;
        self.update(&[Parameter { values: &copy, gradient: &gradient.to_device(device)?, moments }])?;
        values.set(&copy.as_detached_tensor().to_device(values.device())?)
    }

    /// The average alone, in the host's memory.
    fn follow(&self, ema: &Var, parameter: &Var) -> Result<()> {
        let parameter = parameter.as_detached_tensor().to_device(ema.device())?;
        let decay = self.ema_decay as f32;
        with_values::<f32, _>(&parameter, |p| {
            with_values_mut(ema, |e| parallel::for_rows(e, 1, GRAIN, |range, e| averaged(e, &p[range], decay)))
        })?
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

    fn update_on_device(&self, own: &Parameter) -> Result<()> {
        let Parameter { values, gradient, moments } = own;
        let (b1, b2) = self.betas;
        let f = self.factors();
        let gradient = (gradient.detach() * self.gradient_scale)?;
        let first = ((moments.first.as_detached_tensor() * b1)? + (&gradient * (1.0 - b1))?)?;
        let second = ((moments.second.as_detached_tensor() * b2)? + (gradient.sqr()? * (1.0 - b2))?)?;
        let denominator = ((second.sqrt()? * f.inverse_root as f64)? + self.eps)?;
        let shrunk = (values.as_detached_tensor() * f.shrink as f64)?;
        let updated = (shrunk - ((&first / denominator)? * f.step_size as f64)?)?;
        values.set(&updated)?;
        moments.first.set(&first)?;
        moments.second.set(&second)?;
        let Some(average) = own.average_here() else { return Ok(()) };
        let ema = ((average.as_detached_tensor() * self.ema_decay)? + (&updated * (1.0 - self.ema_decay))?)?;
        average.set(&ema)
    }
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
    use crate::rng::Rng;
    use candle_core::Device;

    fn var(t: Tensor) -> Var {
        Var::from_tensor(&t).unwrap()
    }

    fn moments(values: &[f32]) -> Moments {
        let p = Tensor::new(values, &Device::Cpu).unwrap();
        let zeros = p.zeros_like().unwrap();
        Moments { first: var(zeros.copy().unwrap()), second: var(zeros), ema: Some(var(p)) }
    }

    fn adamw(step: u64) -> AdamW {
        AdamW { lr: 0.01, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.1, step, gradient_scale: 0.5, ema_decay: 0.9 }
    }

    fn values(var: &Tensor) -> Vec<f32> {
        var.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// A parameter's values and all that is remembered of it.
    fn all(parameter: &Var, moments: &Moments) -> Vec<Vec<f32>> {
        let parts = [Some(parameter), Some(&moments.first), Some(&moments.second), moments.ema.as_ref()];
        parts.into_iter().flatten().map(|var| values(var)).collect()
    }

    #[test]
    fn agrees_with_the_formulas_and_with_the_path_of_other_devices() {
        let start = [0.5f32, -1.0, 2.0];
        let (fused, composed) = (moments(&start), moments(&start));
        let bare = Moments { ema: None, ..moments(&start) };
        let [p, q, r] = [(); 3].map(|()| Var::new(&start, &Device::Cpu).unwrap());
        // By hand in f64.
        let (mut value, mut m, mut v, mut ema) = (0.5f64, 0.0f64, 0.0f64, 0.5f64);
        for step in 1..=5u64 {
            let gradient = &Tensor::new(&[step as f32, -0.3, 0.0], &Device::Cpu).unwrap();
            let with_average = Parameter { values: &p, gradient, moments: &fused };
            adamw(step).update(&[with_average, Parameter { values: &r, gradient, moments: &bare }]).unwrap();
            adamw(step).update_on_device(&Parameter { values: &q, gradient, moments: &composed }).unwrap();
            let g = step as f64 * 0.5;
            m = 0.9 * m + 0.1 * g;
            v = 0.999 * v + 0.001 * g * g;
            let corrected = (m / (1.0 - 0.9f64.powi(step as i32)), v / (1.0 - 0.999f64.powi(step as i32)));
            value = value * (1.0 - 0.01 * 0.1) - 0.01 * corrected.0 / (corrected.1.sqrt() + 1e-8);
            ema = 0.9 * ema + 0.1 * value;
        }
        assert!((values(&p)[0] as f64 - value).abs() < 1e-6, "{} {value}", values(&p)[0]);
        assert_eq!(values(&p), values(&r), "the average changes nothing");
        let [average, other] = [&fused, &composed].map(|moments| values(moments.ema.as_ref().unwrap()));
        assert!((average[0] as f64 - ema).abs() < 1e-6);
        for (a, b) in values(&p).iter().chain(&average).zip(values(&q).iter().chain(&other)) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }

    #[test]
    fn all_at_once_give_the_bits_of_one_by_one() {
        // Small ones beside some that more than one thread works on, and one of nothing; every other has an average.
        let shapes: [&[usize]; 7] = [&[5], &[3, 7], &[151, 211], &[1], &[0], &[2, 3, 3, 3], &[20_011]];
        let drawn = |what: &str, i: usize| Rng::new(5, what, i as u64).normal_tensor(shapes[i]).unwrap();
        let start = |i: usize| {
            let ema = (i % 2 == 1).then(|| var(drawn("ema", i)));
            let second = var(drawn("second", i).sqr().unwrap());
            (var(drawn("values", i)), Moments { first: var(drawn("first", i)), second, ema })
        };
        let gradients: Vec<Tensor> = (0..shapes.len()).map(|i| drawn("gradient", i)).collect();
        let [together, alone] = [(); 2].map(|()| (0..shapes.len()).map(start).collect::<Vec<_>>());
        fn given<'a>(slots: &'a [(Var, Moments)], gradients: &'a [Tensor]) -> Vec<Parameter<'a>> {
            let all = slots.iter().zip(gradients);
            all.map(|((values, moments), gradient)| Parameter { values, gradient, moments }).collect()
        }
        adamw(3).update(&given(&together, &gradients)).unwrap();
        for one in given(&alone, &gradients) {
            adamw(3).update(&[one]).unwrap();
        }
        for (i, ((p, moments), (q, others))) in together.iter().zip(&alone).enumerate() {
            assert_eq!(all(p, moments), all(q, others), "{:?}", shapes[i]);
            assert!(shapes[i] == [0] || values(p) != values(&drawn("values", i)), "{:?}", shapes[i]);
        }
    }

    #[test]
    fn what_is_kept_elsewhere_follows_to_the_bit() {
        let start = [0.5f32, -1.0, 2.0];
        let [near, afar, beside] = [(); 3].map(|()| moments(&start));
        let [p, q, r] = [(); 3].map(|()| Var::new(&start, &Device::Cpu).unwrap());
        for step in 1..=3u64 {
            let gradient = &Tensor::new(&[step as f32, -0.3, 0.0], &Device::Cpu).unwrap();
            adamw(step).update(&[Parameter { values: &p, gradient, moments: &near }]).unwrap();
            adamw(step).update_from_afar(Parameter { values: &q, gradient, moments: &afar }).unwrap();
            let here = &Moments { first: beside.first.clone(), second: beside.second.clone(), ema: None };
            adamw(step).update(&[Parameter { values: &r, gradient, moments: here }]).unwrap();
            adamw(step).follow(beside.ema.as_ref().unwrap(), &r).unwrap();
        }
        assert_ne!(values(&p), start);
        assert_eq!(all(&p, &near), all(&q, &afar));
        assert_eq!(all(&p, &near), all(&r, &beside));
    }

    #[test]
    fn a_gradient_of_another_shape_and_a_tensor_given_twice_are_refused() {
        let (values, own) = (Var::new(&[1f32, 2.0], &Device::Cpu).unwrap(), moments(&[1.0, 2.0]));
        let refused = |gradient: &[f32], others: &Moments| {
            let gradient = &Tensor::new(gradient, &Device::Cpu).unwrap();
            let first = Parameter { values: &values, gradient, moments: &own };
            let second =
                Parameter { values: &Var::new(&[1f32, 2.0], &Device::Cpu).unwrap(), gradient, moments: others };
            adamw(1).update(&[first, second]).expect_err("refused").to_string()
        };
        assert!(refused(&[1.0], &moments(&[1.0, 2.0])).contains("gradient"));
        assert!(refused(&[1.0, 1.0], &own).contains("twice"));
    }
}

//! Sixteen channels at a time: arrays that the compiler keeps in vector registers inside `vectorised!` functions.

use std::ops::{Add, Mul, Sub};

use super::real::Real;

/// Values in a [`Lanes`]: one AVX-512 register of f32.
pub const LANES: usize = 16;

#[derive(Clone, Copy)]
pub struct Lanes<T>(pub [T; LANES]);

impl<T: Real> Lanes<T> {
    #[inline(always)]
    pub fn all(value: T) -> Self {
        Self([value; LANES])
    }

    /// The values from `first` on; 0 beyond the end.
    #[inline(always)]
    pub fn load(values: &[T], first: usize) -> Self {
        if let Some(values) = values.get(first..first + LANES) {
            return Self(values.try_into().expect("the slice has this length"));
        }
        let mut lanes = Self::all(T::ZERO);
        if let Some(rest) = values.get(first..) {
            lanes.0[..rest.len()].copy_from_slice(rest);
        }
        lanes
    }

    /// Fills `target`, at most [`LANES`] values.
    #[inline(always)]
    pub fn store(self, target: &mut [T]) {
        if let Ok(target) = <&mut [T; LANES]>::try_from(&mut *target) {
            *target = self.0;
        } else {
            target.copy_from_slice(&self.0[..target.len()]);
        }
    }

    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(T, T) -> T) -> Self {
        let mut result = self;
        for lane in 0..LANES {
            result.0[lane] = f(self.0[lane], other.0[lane]);
        }
        result
    }
}

impl<T: Real> Add for Lanes<T> {
    type Output = Self;
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
}

impl<T: Real> Sub for Lanes<T> {
    type Output = Self;
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
}

impl<T: Real> Mul for Lanes<T> {
    type Output = Self;
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
}

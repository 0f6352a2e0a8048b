//! Machines without the tile unit: nothing is done on it.

use super::product::{Matrix, Start};
use super::real::Real;

/// Whether this machine has the unit.
pub fn available() -> bool {
    false
}

/// Returns that nothing was done.
///
/// # Safety
/// None needed; the unit's own has some.
pub unsafe fn matmul<T: Real>(
    _: (usize, usize, usize),
    _: T,
    _: Matrix<*const T>,
    _: Matrix<*const T>,
    _: (Matrix<*mut T>, Start<T>),
) -> bool {
    false
}

pub mod conv {
    use crate::ops::conv::Geometry;
    use crate::ops::real::Real;

    pub fn forward<T: Real>(_: &[T], _: &[T], _: Option<&[T]>, _: Geometry) -> Option<Vec<T>> {
        None
    }

    pub fn input_gradient<T: Real>(_: &[T], _: &[T], _: Geometry) -> Option<Vec<T>> {
        None
    }

    pub fn weight_gradient<T: Real>(_: &[T], _: &[T], _: Geometry) -> Option<Vec<T>> {
        None
    }
}

pub mod winograd {
    use crate::ops::conv::Geometry;
    use crate::ops::real::Real;
    use crate::ops::winograd::Pass;

    pub fn convolve<T: Real>(_: &[T], _: &[T], _: Option<&[T]>, _: Geometry, _: Pass) -> Option<Vec<T>> {
        None
    }

    pub fn weight_gradient<T: Real>(_: &[T], _: &[T], _: Geometry) -> Option<Vec<T>> {
        None
    }
}

pub mod attention {
    use crate::ops::attention::Sizes;
    use crate::ops::real::Real;

    pub fn forward<T: Real>(_: &[T], _: &[T], _: &[T], _: Option<&[T]>, _: Sizes) -> Option<(Vec<T>, Vec<T>)> {
        None
    }

    pub fn backward<T: Real>(_: [&[T]; 5], _: &[T], _: Option<&[T]>, _: Sizes) -> Option<[Vec<T>; 3]> {
        None
    }
}

//! Matrices in memory, and what a product starts from.

use crate::ops::real::Real;

/// A matrix in memory: element (row, column) is at `start + row·row_stride + column·column_stride`.
#[derive(Clone, Copy)]
pub struct Matrix<P> {
    pub start: P,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<T> Matrix<*const T> {
    /// Row-major with `columns` columns.
    pub fn rows(values: &[T], columns: usize) -> Self {
        Self { start: values.as_ptr(), row_stride: columns, column_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        Self { start: self.start, row_stride: self.column_stride, column_stride: self.row_stride }
    }

    /// What begins at this element.
    pub fn at(self, row: usize, column: usize) -> Self {
        Self { start: self.start.wrapping_add(row * self.row_stride + column * self.column_stride), ..self }
    }

    /// The same memory under another type.
    pub fn cast<U>(self) -> Matrix<*const U> {
        Matrix { start: self.start.cast(), row_stride: self.row_stride, column_stride: self.column_stride }
    }
}

impl<T> Matrix<*mut T> {
    /// As [`Matrix::rows`].
    pub fn rows_mut(values: &mut [T], columns: usize) -> Self {
        Self { start: values.as_mut_ptr(), row_stride: columns, column_stride: 1 }
    }

    /// As [`Matrix::at`].
    pub fn at_mut(self, row: usize, column: usize) -> Self {
        Self { start: self.start.wrapping_add(row * self.row_stride + column * self.column_stride), ..self }
    }

    /// As [`Matrix::cast`].
    pub fn cast_mut<U>(self) -> Matrix<*mut U> {
        Matrix { start: self.start.cast(), row_stride: self.row_stride, column_stride: self.column_stride }
    }
}

/// An output and what it starts from.
pub type Target<'a, T> = (Matrix<*mut T>, Start<'a, T>);

/// What a product is added to.
#[derive(Clone, Copy)]
pub enum Start<'a, T> {
    Zero,
    /// What its output holds.
    Held,
    /// One row for all of the output's.
    Row(&'a [T]),
}

impl<'a, T: Real> Start<'a, T> {
    /// A bias, where there is one.
    pub fn row(bias: Option<&'a [T]>) -> Self {
        bias.map_or(Self::Zero, Self::Row)
    }

    /// That of these columns.
    pub fn columns(self, columns: std::ops::Range<usize>) -> Self {
        if let Self::Row(row) = self { Self::Row(&row[columns]) } else { self }
    }

    /// The same under another name of the type.
    ///
    /// # Safety
    /// `T` is `U`.
    pub unsafe fn cast<U: Real>(self) -> Start<'a, U> {
        debug_assert!(T::DTYPE == U::DTYPE);
        match self {
            Self::Zero => Start::Zero,
            Self::Held => Start::Held,
            // SAFETY: the caller's contract.
            Self::Row(row) => Start::Row(unsafe { std::slice::from_raw_parts(row.as_ptr().cast(), row.len()) }),
        }
    }

    /// The value at a place of the output, which is read only where the product is added to it.
    ///
    /// # Safety
    /// `out` is an element of the output.
    pub unsafe fn at(self, column: usize, out: *const T) -> T {
        match self {
            Self::Zero => T::ZERO,
            // SAFETY: the caller's contract.
            Self::Held => unsafe { *out },
            Self::Row(row) => row[column],
        }
    }
}

//! Rows of a table by number: the words of a prompt, each with its place.

use candle_core::{DType, Result, Tensor, bail};

use super::buffer::unwritten;
use super::graft::{for_float, graft, on_cpu, tensor, with_values};
use super::real::Real;

/// The row of each token plus the row of its place.
///
/// # Shapes
/// - tokens `[b, l]` u32, table `[v, d]`, positions `[p, d]` with p at least l → `[b, l, d]`
pub fn embed(tokens: &Tensor, table: &Tensor, positions: &Tensor) -> Result<Tensor> {
    let ((b, l), (v, d), (p, width)) = (tokens.dims2()?, table.dims2()?, positions.dims2()?);
    if l > p || width != d {
        bail!("embed: tokens {:?}, table {:?} and positions {:?} do not fit", tokens.dims(), table.dims(), [p, width]);
    }
    if !on_cpu(table) {
        let words = table.index_select(&tokens.flatten_all()?, 0)?.reshape((b, l, d))?; // [b, l, d]
        return words.broadcast_add(&positions.narrow(0, 0, l)?);
    }
    let rows: Vec<u32> = tokens.flatten_all()?.to_dtype(DType::U32)?.to_vec1()?;
    if let Some(row) = rows.iter().find(|row| **row as usize >= v) {
        bail!("embed: token {row} for a table of {v} rows");
    }
    for_float!(table, T => {
        let values = with_values::<T, _>(table, |table| {
            with_values::<T, _>(positions, |positions| forward(&rows, table, &positions[..l * d], d))
        })??;
        graft("embed", &[table, positions], (values, (b, l, d)), move |inputs, _, gradient| {
            with_values::<T, _>(gradient, |dy| {
                let places: Vec<u32> = (0..rows.len()).map(|i| (i % l) as u32).collect();
                let gradient_of = |input: &Tensor, rows: &[u32]| {
                    input.track_op().then(|| tensor(backward(rows, dy, input.elem_count(), d), input.shape()))
                };
                vec![gradient_of(inputs[0], &rows), gradient_of(inputs[1], &places)]
            })
        })
    })
}

fn forward<T: Real>(rows: &[u32], table: &[T], positions: &[T], d: usize) -> Vec<T> {
    let mut y = unwritten(rows.len() * d);
    let places = positions.chunks_exact(d).cycle();
    for ((y, row), place) in y.chunks_exact_mut(d).zip(rows).zip(places) {
        let word = &table[*row as usize * d..][..d];
        y.iter_mut().zip(word.iter().zip(place)).for_each(|(y, (word, place))| *y = *word + *place);
    }
    y
}

/// Adds each row of `dy` to the row of a table of `len` values that it was read from.
fn backward<T: Real>(rows: &[u32], dy: &[T], len: usize, d: usize) -> Vec<T> {
    let mut sums = vec![T::ZERO; len];
    for (row, dy) in rows.iter().zip(dy.chunks_exact(d)) {
        sums[*row as usize * d..][..d].iter_mut().zip(dy).for_each(|(sum, dy)| *sum += *dy);
    }
    sums
}

//! What an update does to all parameters (`update.cu`): the squares of the gradients, AdamW with the averaged weights.

use candle_core::{DType, Result, Tensor};

use super::launch::{Argument, Fresh, Launch, format_of, run};
use crate::ops::adamw::{Factors, Parameter};

const THREADS: usize = 256;

/// Blocks that a GPU is filled with.
const BLOCKS: usize = 4096;

/// Rows of the kernels' tables.
const GRADIENTS: usize = 128;
const PARAMETERS: usize = 64;

/// Formats of gradients, each with kernels of its own.
const FORMATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Σx² over all elements of all tensors. None: no kernel for these.
pub fn sum_of_squares(tensors: &[Tensor]) -> Result<Option<f64>> {
    let Some(first) = tensors.first() else { return Ok(None) };
    if !tensors.iter().all(|x| format_of(x).is_some() && x.device().location() == first.device().location()) {
        return Ok(None);
    }
    let chunk = chunk(tensors);
    let mut sums = Vec::new();
    for dtype in FORMATS {
        let own = tensors.iter().filter(|x| x.dtype() == dtype && x.elem_count() > 0);
        let own = own.map(|x| x.detach().contiguous()).collect::<Result<Vec<_>>>()?;
        for group in own.chunks(GRADIENTS) {
            let rows = group.iter().map(|x| (vec![Argument::Read(x)], x.elem_count()));
            let (table, blocks) = table(rows, chunk, GRADIENTS);
            let mut sum = Fresh::new(first.device(), blocks, DType::F32)?;
            let mut launch = launch("squares", &group[0], blocks);
            launch.shared = THREADS / 32 * size_of::<f32>();
            let numbers = [group.len(), chunk].map(Argument::Int);
            let arguments = [table].into_iter().chain(numbers).chain([Argument::Fill(&mut sum)]);
            run(first.device(), &launch, &mut arguments.collect::<Vec<_>>())?;
            sums.push(sum.tensor());
        }
    }
    if sums.is_empty() {
        return Ok(Some(0.0));
    }
    // In one, so that the GPU is waited for once.
    let sums = Tensor::cat(&sums, 0)?.to_vec1::<f32>()?;
    Ok(Some(sums.into_iter().map(f64::from).sum()))
}

/// One AdamW update of all in place, of averages too where they lie with the parameter. False: no kernel for these, nothing
/// was done.
pub fn adamw(parameters: &[Parameter], f: Factors<f32>) -> Result<bool> {
    let Some(first) = parameters.first() else { return Ok(true) };
    let device = first.values.device();
    let is_served = |own: &Parameter| {
        let is_there = |x: &Tensor| x.device().location() == device.location();
        let is_plain = |x: &&Tensor| x.dtype() == DType::F32 && x.is_contiguous() && is_there(x);
        state(own).iter().flatten().all(is_plain) && format_of(own.gradient).is_some() && is_there(own.gradient)
    };
    if !parameters.iter().all(is_served) {
        return Ok(false);
    }
    let chunk = chunk(parameters.iter().map(|own| own.gradient));
    let factors = [f.gradient_scale, f.shrink, f.betas.0, f.betas.1, f.step_size, f.inverse_root, f.eps, f.ema_decay];
    for dtype in FORMATS {
        let own = parameters.iter().filter(|own| own.gradient.dtype() == dtype && own.gradient.elem_count() > 0);
        let own = own.map(|own| Ok((own, own.gradient.detach().contiguous()?))).collect::<Result<Vec<_>>>()?;
        for group in own.chunks(PARAMETERS) {
            let rows = group.iter().map(|(own, gradient)| {
                let state = state(own).map(|x| x.map_or(Argument::Nothing, Argument::Change));
                (state.into_iter().chain([Argument::Read(gradient)]).collect(), gradient.elem_count())
            });
            let (table, blocks) = table(rows, chunk, PARAMETERS);
            let numbers = [group.len(), chunk].map(Argument::Int);
            let arguments = [table].into_iter().chain(numbers).chain(factors.map(Argument::Float));
            run(device, &launch("adamw", &group[0].1, blocks), &mut arguments.collect::<Vec<_>>())?;
        }
    }
    Ok(true)
}

/// What is changed of a parameter, in the order of the kernel's rows.
fn state<'a>(own: &Parameter<'a>) -> [Option<&'a Tensor>; 4] {
    let moments = own.moments;
    [Some(own.values), Some(&moments.first), Some(&moments.second), own.average_here()]
        .map(|var| Some(var?.as_tensor()))
}

/// Values that a block works on.
fn chunk<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> usize {
    let total: usize = tensors.into_iter().map(Tensor::elem_count).sum();
    total.div_ceil(BLOCKS).next_multiple_of(THREADS).max(4 * THREADS)
}

/// Rows, each of so many values, as a kernel gets them in a table of `places`, and the number of their blocks.
fn table<'a>(
    rows: impl Iterator<Item = (Vec<Argument<'a>>, usize)>,
    chunk: usize,
    places: usize,
) -> (Argument<'a>, usize) {
    let (mut words, mut blocks, mut width) = (Vec::new(), 0, 0);
    for (row, n) in rows {
        width = row.len() + 2;
        words.extend(row.into_iter().chain([n, blocks].map(Argument::Int)));
        blocks += n.div_ceil(chunk);
    }
    words.resize_with(places * width, || Argument::Nothing);
    (Argument::Table(words), blocks)
}

fn launch(pass: &str, gradient: &Tensor, blocks: usize) -> Launch {
    let kernel = format!("{pass}_{}", format_of(gradient).expect("looked at before"));
    Launch { source: "update", kernel, blocks: [blocks, 1, 1], threads: THREADS, shared: 0 }
}

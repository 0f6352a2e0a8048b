//! Group norm, with SiLU or without (`group_norm.cu`).

use candle_core::{DType, Result, Tensor};

use super::launch::{Argument, Fresh, Launch, format_of, run, shared_limit};
use crate::ops::graft::graft_storage;
use crate::ops::group_norm::{Activation, Groups};

const THREADS: usize = 256;

/// A warp for each group of each image.
const GROUPS_OF_BLOCK: usize = THREADS / 32;

/// Blocks that a GPU is filled with.
const BLOCKS: usize = 1024;

/// [`crate::ops::group_norm`], differentiable in x, weight and bias. None: no kernel for these.
pub fn group_norm([x, weight, bias]: [&Tensor; 3], groups: Groups, activation: Activation) -> Result<Option<Tensor>> {
    let Some(format) = format_of(x) else { return Ok(None) };
    let (b, c) = (x.dim(0)?, weight.elem_count());
    let positions = x.elem_count() / (b * c).max(1);
    let are_alike = [weight, bias].iter().all(|affine| affine.dtype() == x.dtype() && affine.is_contiguous());
    let rows = THREADS / c.clamp(1, THREADS);
    let shared = 2 * rows * c * size_of::<f32>() + groups.count * size_of::<f32>();
    if positions == 0 || !are_alike || shared > shared_limit(x.device())? || i32::try_from(x.elem_count()).is_err() {
        return Ok(None);
    }
    let chunk = (b * positions).div_ceil(BLOCKS).max(rows).min(positions);
    let call = Call { b, c, positions, groups, activation, chunk, shared, format };
    let x = x.contiguous()?;
    let (y, kept) = call.forward(&x, weight, bias)?;
    let backward = move |inputs: &[&Tensor], _: &Tensor, gradient: &Tensor| {
        let gradients = call.backward([inputs[0], inputs[1], inputs[2]], &kept, &gradient.contiguous()?)?;
        Ok(gradients.into_iter().map(Some).collect())
    };
    graft_storage("group_norm", &[&x, weight, bias], y.storage, y.shape, backward).map(Some)
}

struct Call {
    b: usize,
    c: usize,
    positions: usize,
    groups: Groups,
    activation: Activation,
    /// Positions that a block takes.
    chunk: usize,
    shared: usize,
    format: &'static str,
}

impl Call {
    fn launch(&self, pass: &str, blocks: [usize; 2]) -> Launch {
        let kernel = format!("group_norm_{pass}_{}", self.format);
        let [x, y] = blocks;
        Launch { source: "group_norm", kernel, blocks: [x, y, 1], threads: THREADS, shared: self.shared }
    }

    fn chunks(&self) -> usize {
        self.positions.div_ceil(self.chunk)
    }

    /// A block for each chunk of each image.
    fn by_chunks(&self, pass: &str) -> Launch {
        self.launch(pass, [self.chunks(), self.b])
    }

    /// A warp for each group of each image.
    fn by_groups(&self, pass: &str) -> Launch {
        self.launch(pass, [(self.b * self.groups.count).div_ceil(GROUPS_OF_BLOCK), 1])
    }

    fn plane<'a>(&self) -> [Argument<'a>; 4] {
        [self.positions, self.c, self.groups.count, self.chunk].map(Argument::Int)
    }

    fn plane_and_silu<'a>(&self) -> impl Iterator<Item = Argument<'a>> + use<'a> {
        let is_silu = usize::from(self.activation == Activation::Silu);
        self.plane().into_iter().chain([Argument::Int(is_silu)])
    }

    /// The output, and mean and reciprocal deviation of each group, `[b, groups, 2]`.
    fn forward(&self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<(Fresh, Tensor)> {
        let (device, count) = (x.device(), self.groups.count);
        let mut partial = Fresh::new(device, (self.b, self.chunks(), count, 2), DType::F32)?;
        let outputs = [Argument::Read(x), Argument::Fill(&mut partial)];
        run(device, &self.by_chunks("partial"), &mut outputs.into_iter().chain(self.plane()).collect::<Vec<_>>())?;
        let partial = partial.tensor();

        let mut kept = Fresh::new(device, (self.b, count, 2), DType::F32)?;
        let numbers = [Argument::Int(self.b * count), Argument::Float(self.groups.eps as f32)];
        let tensors = [Argument::Read(&partial), Argument::Fill(&mut kept)];
        let finish = Launch { kernel: "group_norm_finish_all".into(), ..self.by_groups("finish") };
        run(device, &finish, &mut tensors.into_iter().chain(self.plane()).chain(numbers).collect::<Vec<_>>())?;
        let kept = kept.tensor();

        let mut y = Fresh::like(x)?;
        let tensors = [x, weight, bias, &kept].map(Argument::Read).into_iter().chain([Argument::Fill(&mut y)]);
        run(device, &self.by_chunks("apply"), &mut tensors.chain(self.plane_and_silu()).collect::<Vec<_>>())?;
        Ok((y, kept))
    }

    /// dx, dw, db.
    fn backward(&self, [x, weight, bias]: [&Tensor; 3], kept: &Tensor, dy: &Tensor) -> Result<[Tensor; 3]> {
        let (device, count) = (x.device(), self.groups.count);
        let new = |shape: &[usize]| Fresh::new(device, shape, DType::F32);
        let read = || [x, weight, bias, kept, dy].map(Argument::Read).into_iter();

        let mut partial = new(&[self.b, self.chunks(), 2, self.c])?;
        let arguments = read().chain([Argument::Fill(&mut partial)]).chain(self.plane_and_silu());
        run(device, &self.by_chunks("slopes"), &mut arguments.collect::<Vec<_>>())?;
        let partial = partial.tensor();

        let (mut sums, mut pooled) = (new(&[self.b, 2, self.c])?, new(&[self.b, count, 2])?);
        let tensors = [Argument::Read(&partial), Argument::Read(weight)].into_iter();
        let tensors = tensors.chain([Argument::Fill(&mut sums), Argument::Fill(&mut pooled)]);
        let arguments = tensors.chain(self.plane()).chain([Argument::Int(self.b * count)]);
        run(device, &self.by_groups("pool"), &mut arguments.collect::<Vec<_>>())?;
        let (sums, pooled) = (sums.tensor(), pooled.tensor());

        let mut dx = Fresh::like(x)?;
        let arguments = read().chain([Argument::Read(&pooled), Argument::Fill(&mut dx)]).chain(self.plane_and_silu());
        run(device, &self.by_chunks("dx"), &mut arguments.collect::<Vec<_>>())?;

        let affine = self.launch("affine", [self.c.div_ceil(THREADS), 1]);
        let [dw, db] = sums_of_slopes(affine, &sums, self.b, [weight, bias])?;
        Ok([dx.tensor(), dw, db])
    }
}

/// The gradients of weight and bias from `[n, 2, c]` sums, by `launch`.
pub fn sums_of_slopes(launch: Launch, sums: &Tensor, n: usize, affine: [&Tensor; 2]) -> Result<[Tensor; 2]> {
    let (mut dw, mut db) = (Fresh::like(affine[0])?, Fresh::like(affine[1])?);
    let sizes = [n, affine[0].elem_count()].map(Argument::Int);
    let tensors = [Argument::Read(sums), Argument::Fill(&mut dw), Argument::Fill(&mut db)];
    run(sums.device(), &launch, &mut tensors.into_iter().chain(sizes).collect::<Vec<_>>())?;
    Ok([dw.tensor(), db.tensor()])
}

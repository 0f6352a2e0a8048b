//! Attention in tiles that stay on the chip (`attention.cuh`).

use candle_core::{DType, Result, Tensor};

use super::launch::{Argument, Fresh, Launch, format_of, run, shared_limit};
use crate::ops::attention::Sizes;
use crate::ops::graft::graft_storage;

/// Head widths that there are kernels for: those of Stable Diffusion and of the families around it.
const WIDTHS: [usize; 6] = [32, 40, 64, 80, 128, 160];

const THREADS: usize = 128;

/// Rows of a block in the backward passes, 16 for each of its four warps.
const ROWS: usize = 64;

/// Tile sizes; `Sizes` and `stride_of` in the kernels' sources say the same.
struct Tiles {
    /// Queries of a block in the forward pass.
    rows: usize,
    keys: usize,
    queries: usize,
    /// Bytes of a row.
    row_bytes: usize,
}

impl Tiles {
    fn new(d: usize, dtype: DType) -> Self {
        let (is_single, is_wide) = (dtype == DType::F32, d > 80);
        let stride = match is_single {
            true => d + 4,
            false if (d / 8).is_multiple_of(2) => d + 8,
            false => d,
        };
        Self {
            rows: if !is_single && d <= 64 { 2 * ROWS } else { ROWS },
            keys: if is_single { 32 } else { 64 } / if is_wide { 2 } else { 1 },
            queries: if is_wide { 16 } else { 32 },
            row_bytes: stride * dtype.size_in_bytes(),
        }
    }

    fn forward_bytes(&self) -> usize {
        (self.rows + 4 * self.keys) * self.row_bytes
    }

    fn dq_bytes(&self) -> usize {
        (2 * ROWS + 4 * self.keys) * self.row_bytes
    }

    fn dkv_bytes(&self) -> usize {
        (2 * ROWS + 4 * self.queries) * self.row_bytes + 4 * self.queries * size_of::<f32>()
    }
}

/// [`crate::ops::attention`], differentiable in q, k and v, which are contiguous. None: no kernel for these.
pub fn attention([q, k, v]: [&Tensor; 3], bias: Option<&Tensor>, sizes: Sizes) -> Result<Option<Tensor>> {
    let Some(format) = format_of(q) else { return Ok(None) };
    let tiles = Tiles::new(sizes.d, q.dtype());
    let most = tiles.forward_bytes().max(tiles.dq_bytes()).max(tiles.dkv_bytes());
    let are_alike = [k, v].iter().all(|x| x.dtype() == q.dtype());
    if !WIDTHS.contains(&sizes.d) || !are_alike || most > shared_limit(q.device())? {
        return Ok(None);
    }
    let bias = match bias {
        Some(bias) => Some(bias.detach().to_device(q.device())?.to_dtype(DType::F32)?.contiguous()?),
        None => None,
    };
    let call = Call { sizes, tiles, format, groups: bias.as_ref().map_or(Ok(1), |bias| bias.dim(1))?, bias };
    let (out, lse) = call.forward(q, k, v)?;
    let backward = move |inputs: &[&Tensor], out: &Tensor, gradient: &Tensor| {
        let gradients = call.backward([inputs[0], inputs[1], inputs[2], out, &gradient.contiguous()?], &lse)?;
        Ok(gradients.into_iter().map(Some).collect())
    };
    graft_storage("attention", &[q, k, v], out.storage, out.shape, backward).map(Some)
}

struct Call {
    sizes: Sizes,
    tiles: Tiles,
    format: &'static str,
    bias: Option<Tensor>,
    groups: usize,
}

impl Call {
    fn launch(&self, source: &'static str, pass: &str, rows: usize, (block, shared): (usize, usize)) -> Launch {
        let Sizes { b, heads, d, .. } = self.sizes;
        let kernel = format!("attention_{pass}_{}_{d}", self.format);
        Launch { source, kernel, blocks: [rows.div_ceil(block), heads, b], threads: THREADS, shared }
    }

    /// The last arguments of all passes but one.
    fn numbers<'a>(&self) -> [Argument<'a>; 6] {
        let Sizes { l, s, heads, is_causal, .. } = self.sizes;
        let sizes = [l, s, heads, self.groups, usize::from(is_causal)].map(Argument::Int);
        let [l, s, heads, groups, is_causal] = sizes;
        [l, s, heads, groups, is_causal, Argument::Float(self.sizes.scale())]
    }

    /// The output, and the logarithm of each query's denominator, `[b, heads, l]`.
    fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Fresh, Tensor)> {
        let Sizes { b, l, heads, .. } = self.sizes;
        let (mut out, mut lse) = (Fresh::like(q)?, Fresh::new(q.device(), (b, heads, l), DType::F32)?);
        let launch = self.launch("attention_forward", "forward", l, (self.tiles.rows, self.tiles.forward_bytes()));
        let bias = Argument::optional(self.bias.as_ref());
        let tensors = [q, k, v].map(Argument::Read).into_iter().chain([bias]);
        let outputs = [Argument::Fill(&mut out), Argument::Fill(&mut lse)];
        run(q.device(), &launch, &mut tensors.chain(outputs).chain(self.numbers()).collect::<Vec<_>>())?;
        Ok((out, lse.tensor()))
    }

    /// dq, dk, dv.
    fn backward(&self, [q, k, v, out, dout]: [&Tensor; 5], lse: &Tensor) -> Result<[Tensor; 3]> {
        let Sizes { b, l, s, heads, d, .. } = self.sizes;
        let mut dot = Fresh::new(q.device(), (b, heads, l), DType::F32)?;
        let launch = Launch {
            source: "attention_backward",
            kernel: format!("attention_dot_{}_{d}", self.format),
            blocks: [(b * l * heads).div_ceil(THREADS / 32), 1, 1],
            threads: THREADS,
            shared: 0,
        };
        let sizes = [l, heads, b * l * heads].map(Argument::Int);
        let tensors = [Argument::Read(out), Argument::Read(dout), Argument::Fill(&mut dot)];
        run(q.device(), &launch, &mut tensors.into_iter().chain(sizes).collect::<Vec<_>>())?;
        let dot = dot.tensor();

        let (mut dq, mut dk, mut dv) = (Fresh::like(q)?, Fresh::like(k)?, Fresh::like(v)?);
        let (dq_shared, dkv_shared) = (self.tiles.dq_bytes(), self.tiles.dkv_bytes());
        let passes = [
            (self.launch("attention_backward", "dq", l, (ROWS, dq_shared)), vec![&mut dq]),
            (self.launch("attention_backward", "dkv", s, (ROWS, dkv_shared)), vec![&mut dk, &mut dv]),
        ];
        for (launch, outputs) in passes {
            let bias = Argument::optional(self.bias.as_ref());
            let tensors = [q, k, v].map(Argument::Read).into_iter().chain([bias]);
            let tensors = tensors.chain([dout, lse, &dot].map(Argument::Read));
            let arguments = tensors.chain(outputs.into_iter().map(Argument::Fill)).chain(self.numbers());
            run(q.device(), &launch, &mut arguments.collect::<Vec<_>>())?;
        }
        Ok([dq.tensor(), dk.tensor(), dv.tensor()])
    }
}

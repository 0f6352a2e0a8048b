//! Large pictures through the autoencoder in overlapping tiles with blended seams, as diffusers' `tiled_encode` and
//! `tiled_decode` do it: memory for one tile, whatever the size. Every tile has norms of its own, so that the result is near
//! the whole picture's and not equal to it. Without gradients: the blending is done on the host.

use candle_core::{Device, Result as CandleResult, Tensor, bail};

use super::vae::Vae;
use crate::ops;

impl Vae {
    /// The side of a tile where nobody chose one: the pictures that it was made for.
    pub fn native_tile(&self) -> usize {
        self.config().sample_size.unwrap_or(512)
    }

    /// The side of a tile must be a multiple of this: a quarter of it, the overlap, is then whole in latents.
    pub fn tile_multiple(&self) -> usize {
        4 * self.config().downscale()
    }

    /// [`Vae::latents_from_images`] in tiles of `tile` pixels a side.
    ///
    /// # Shapes
    /// - images `[b, 3, H, W]` in [−1, 1] → `[b, c, H/f, W/f]`
    pub fn latents_in_tiles(&self, images: &Tensor, tile: usize) -> CandleResult<Tensor> {
        self.check_tile(tile)?;
        let f = self.config().downscale();
        in_tiles(images, tile, tile / f, |tile| self.latents_from_images(tile))
    }

    /// [`Vae::decode`] in tiles of `tile` pixels a side.
    ///
    /// # Shapes
    /// - latents `[b, c, h, w]` as the U-Net sees them → pictures `[b, 3, h·f, w·f]`
    pub fn decode_in_tiles(&self, latents: &Tensor, tile: usize) -> CandleResult<Tensor> {
        self.check_tile(tile)?;
        let f = self.config().downscale();
        in_tiles(latents, tile / f, tile, |tile| self.decode(tile))
    }

    fn check_tile(&self, tile: usize) -> CandleResult<()> {
        let multiple = self.tile_multiple();
        if tile == 0 || !tile.is_multiple_of(multiple) {
            bail!("vae: tiles of {tile} pixels must be multiples of {multiple}");
        }
        Ok(())
    }
}

/// `through` of tiles of `side`, which give tiles of `side_out`; neighbours share a quarter.
fn in_tiles(
    x: &Tensor,
    side: usize,
    side_out: usize,
    through: impl Fn(&Tensor) -> CandleResult<Tensor>,
) -> CandleResult<Tensor> {
    let (b, _, h, w) = x.dims4()?;
    let (stride, blend) = (side - side / 4, side_out / 4);
    let shown = side_out - blend;
    let mut rows = Vec::new();
    let mut above: Vec<Tile> = Vec::new();
    for top in (0..h).step_by(stride) {
        let strip = ops::narrow(x, 2, top, side.min(h - top))?;
        let mut row: Vec<Tile> = Vec::new();
        for left in (0..w).step_by(stride) {
            let part = ops::narrow(&strip, 3, left, side.min(w - left))?.contiguous()?;
            let mut tile = Tile::of(&through(&part)?)?;
            if let Some(above) = above.get(row.len()) {
                tile.blend_below(above, blend);
            }
            if let Some(left) = row.last() {
                tile.blend_beside(left, blend);
            }
            row.push(tile);
        }
        rows.push(row.iter().map(|tile| tile.cut(shown)).collect::<Vec<_>>());
        above = row;
    }
    let rows: Vec<Tensor> = rows.iter().map(|row| side_by_side(row, b)).collect::<CandleResult<_>>()?;
    Tensor::cat(&rows, 2)?.to_dtype(x.dtype())?.to_device(x.device())
}

/// The tiles of a row, side by side, `[b, c, h, w]`.
fn side_by_side(row: &[Tile], b: usize) -> CandleResult<Tensor> {
    let tensors: Vec<Tensor> = row
        .iter()
        .map(|tile| Tensor::from_slice(&tile.values, (b, tile.planes / b, tile.h, tile.w), &Device::Cpu))
        .collect::<CandleResult<_>>()?;
    Tensor::cat(&tensors, 3)
}

/// A tile on the host.
struct Tile {
    /// `[planes, h, w]`, planes b·c.
    values: Vec<f32>,
    planes: usize,
    h: usize,
    w: usize,
}

impl Tile {
    fn of(tensor: &Tensor) -> CandleResult<Self> {
        let (b, c, h, w) = tensor.dims4()?;
        let values = tensor.to_device(&Device::Cpu)?.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()?;
        Ok(Self { values, planes: b * c, h, w })
    }

    /// The first rows fade from the last ones of the tile above.
    fn blend_below(&mut self, above: &Self, extent: usize) {
        let extent = extent.min(above.h).min(self.h);
        for plane in 0..self.planes {
            for y in 0..extent {
                let share = y as f32 / extent as f32;
                let from = (plane * above.h + above.h - extent + y) * above.w;
                let to = (plane * self.h + y) * self.w;
                for x in 0..self.w {
                    let old = above.values[from + x];
                    self.values[to + x] = old * (1.0 - share) + self.values[to + x] * share;
                }
            }
        }
    }

    /// The first columns fade from the last ones of the tile to the left.
    fn blend_beside(&mut self, left: &Self, extent: usize) {
        let extent = extent.min(left.w).min(self.w);
        for row in 0..self.planes * self.h {
            for x in 0..extent {
                let share = x as f32 / extent as f32;
                let old = left.values[row * left.w + left.w - extent + x];
                let new = &mut self.values[row * self.w + x];
                *new = old * (1.0 - share) + *new * share;
            }
        }
    }

    /// Its upper left part, at most `side` a side.
    fn cut(&self, side: usize) -> Self {
        let (h, w) = (self.h.min(side), self.w.min(side));
        let line = |plane: usize, y: usize| &self.values[(plane * self.h + y) * self.w..][..w];
        let values = (0..self.planes).flat_map(|plane| (0..h).flat_map(move |y| line(plane, y))).copied().collect();
        Self { values, planes: self.planes, h, w }
    }
}

//! The operations of a U-Net's forward pass, in the order of `jedi::model::unet`, each with its shapes.
//!
//! One picture of 512² comes to 803.4 GFLOP of products, as PyTorch's `FlopCounterMode` counts for diffusers' network.

use anyhow::{Context as _, Result};
use jedi::model::UnetConfig;
use jedi::shape::SetShape;

use super::case::{Pass, Work};

const PASS: Pass = Pass::Forward;

/// Tokens of a prompt.
const TOKENS: usize = 77;

/// All operations of one forward pass on latents of `side` pixels, equal ones counted.
pub fn unet_works(config: &UnetConfig, shape: SetShape, side: usize) -> Result<Vec<(Work, usize)>> {
    let mut walk = Walk { config, shape, side, works: Vec::new() };
    walk.network()?;
    Ok(walk.works)
}

struct Walk<'a> {
    config: &'a UnetConfig,
    shape: SetShape,
    /// Pixels a side where the walk is.
    side: usize,
    works: Vec<(Work, usize)>,
}

impl Walk<'_> {
    fn network(&mut self) -> Result<()> {
        let config = self.config;
        let widths = &config.block_out_channels;
        let (first, last) = (widths[0], widths.len() - 1);
        self.linear(self.shape.sets, first, 4 * first);
        self.linear(self.shape.sets, 4 * first, 4 * first);
        self.conv(config.in_channels, first, 3, 1);
        let mut skips = vec![first];
        let mut hidden = first;
        for (level, &width) in widths.iter().enumerate() {
            for _ in 0..config.layers_per_block {
                self.resnet(hidden, width);
                self.attention_where(&config.down_block_types[level], level)?;
                hidden = width;
                skips.push(width);
            }
            if level < last {
                self.conv(width, width, 3, 2);
                self.side /= 2;
                skips.push(width);
            }
        }
        self.resnet(hidden, hidden);
        self.transformer(last)?;
        self.resnet(hidden, hidden);
        for (index, &width) in widths.iter().rev().enumerate() {
            for _ in 0..=config.layers_per_block {
                let skip = skips.pop().context("unet config: more up stages than down stages")?;
                self.add(Work::Concatenate { pixels: self.pixels(), left: hidden, right: skip });
                self.resnet(hidden + skip, width);
                self.attention_where(&config.up_block_types[index], last - index)?;
                hidden = width;
            }
            if index < last {
                let (images, size) = (self.shape.total(), self.side);
                self.add(Work::Upsample { images, size, channels: width, pass: PASS });
                self.side *= 2;
                self.conv(width, width, 3, 1);
            }
        }
        self.group_norm(first, true);
        self.conv(first, config.out_channels, 3, 1);
        Ok(())
    }

    fn attention_where(&mut self, block: &str, level: usize) -> Result<()> {
        if block.starts_with("CrossAttn") { self.transformer(level) } else { Ok(()) }
    }

    fn resnet(&mut self, inputs: usize, outputs: usize) {
        self.group_norm(inputs, true);
        self.conv(inputs, outputs, 3, 1);
        self.linear(self.shape.total(), 4 * self.config.block_out_channels[0], outputs);
        self.group_norm(outputs, true);
        self.conv(outputs, outputs, 3, 1);
        if inputs != outputs {
            self.conv(inputs, outputs, 1, 1);
        }
        self.residual(outputs);
    }

    fn transformer(&mut self, level: usize) -> Result<()> {
        let config = self.config;
        let width = config.block_out_channels[level];
        let heads = config.num_attention_heads.as_ref().unwrap_or(&config.attention_head_dim).at(level);
        let heads = heads.context("unet config: attention_head_dim has too few entries")?;
        let layers = config.transformer_layers_per_block.at(level);
        let rows = self.pixels();
        let (total, images) = (self.shape.total(), self.shape.images);
        let tokens = self.side * self.side;
        self.group_norm(width, false);
        self.linear(rows, width, width);
        for _ in 0..layers.context("unet config: transformer_layers_per_block has too few entries")? {
            self.add(Work::LayerNorm { rows, width, pass: PASS });
            (0..3).for_each(|_| self.linear(rows, width, width));
            self.attention((self.shape.sets, images * tokens, images * tokens), heads, width);
            self.linear(rows, width, width);
            self.residual(width);
            self.add(Work::LayerNorm { rows, width, pass: PASS });
            self.linear(rows, width, width);
            (0..2).for_each(|_| self.linear(total * TOKENS, config.cross_attention_dim, width));
            self.attention((total, tokens, TOKENS), heads, width);
            self.linear(rows, width, width);
            self.residual(width);
            self.add(Work::LayerNorm { rows, width, pass: PASS });
            self.linear(rows, width, 8 * width);
            self.add(Work::Geglu { rows, width: 4 * width, pass: PASS });
            self.linear(rows, 4 * width, width);
            self.residual(width);
        }
        self.linear(rows, width, width);
        self.residual(width);
        Ok(())
    }

    /// Positions over the whole batch.
    fn pixels(&self) -> usize {
        self.shape.total() * self.side * self.side
    }

    fn conv(&mut self, inputs: usize, outputs: usize, kernel: usize, stride: usize) {
        let (images, size) = (self.shape.total(), self.side);
        self.add(Work::Conv { images, size, inputs, outputs, kernel, stride, pass: PASS });
    }

    fn group_norm(&mut self, channels: usize, silu: bool) {
        let (images, size, groups) = (self.shape.total(), self.side, self.config.norm_num_groups);
        self.add(Work::GroupNorm { images, size, channels, groups, silu, pass: PASS });
    }

    fn linear(&mut self, rows: usize, inputs: usize, outputs: usize) {
        self.add(Work::Linear { rows, inputs, outputs, pass: PASS });
    }

    fn attention(&mut self, (batch, queries, keys): (usize, usize, usize), heads: usize, width: usize) {
        self.add(Work::Attention { batch, queries, keys, heads, width: width / heads, pass: PASS });
    }

    fn residual(&mut self, channels: usize) {
        self.add(Work::Add { length: self.pixels() * channels });
    }

    fn add(&mut self, work: Work) {
        match self.works.iter_mut().find(|(known, _)| *known == work) {
            Some((_, count)) => *count += 1,
            None => self.works.push((work, 1)),
        }
    }
}

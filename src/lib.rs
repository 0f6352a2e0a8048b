//! JeDi: joint-image diffusion (CVPR 2024). One U-Net denoises a *set* of pictures together; known pictures of the
//! set are references, and coupled self-attention carries their subject into the new ones.
//!
//! Letters used for dimensions throughout: `b` sets, `n` images in a set, `c` channels, `h` `w` height and width,
//! `l` tokens, `d` width of a token. A batch is `[b·n, …]` with the images of a set adjacent.
//!
//! Read in this order; arrows point down (`tests/layers.rs` holds them).

pub mod device;
pub mod folder_lock;
pub mod interrupt;
pub mod invalid;
pub mod rng;
pub mod sha256;
pub mod shape;
pub mod whole_file;

pub mod data;
pub mod diffusion;
pub mod model;
pub mod ops;
pub mod ranks;

pub mod vision;

pub mod eval;
pub mod sample;
pub mod synth;
pub mod train;

#[allow(missing_docs)] // Clap turns the doc lines of these types into help; the flags have theirs.
pub mod cli;
pub mod commands;
pub mod config;
pub mod report;

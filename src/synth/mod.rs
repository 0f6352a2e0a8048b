//! Same-subject sets made by the program: the procedural toybox, drawn on demand or written to disk, and the pipeline of the
//! paper's Algorithm 1. Of the pipeline read `stage` (what is done, and the openings for models) and `tool` (models as it holds
//! them).

pub mod manifest;
pub mod toybox;
pub mod write;

pub mod stage;
pub mod tool;

pub use write::{Packing, Part, Summary, ToyboxData, write_toybox};

//! Same-subject sets made by the program: the procedural toybox, drawn on demand or written to disk.

pub mod manifest;
pub mod toybox;
pub mod write;

pub use write::{Packing, Part, Summary, ToyboxData, write_toybox};

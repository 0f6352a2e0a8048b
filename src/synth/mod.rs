//! Same-subject sets made by the program: the procedural toybox.

pub mod toybox;

//! Same-subject sets made by the program: the procedural toybox, drawn on demand or written to disk, and the pipeline of the
//! paper's Algorithm 1. Of the pipeline read `stage` (what is done, and the openings for models), `draft` (a set on its way),
//! the stages from `prompts` to `score`, the models (`embedded` are in the program, `painting` is Stable Diffusion, `seeing`
//! finds, cuts out and compares, `captioner` describes pictures, `chat` writes prompts), then how the work is done: `tool` (models), `patience` (asking again),
//! `saved` (what is kept between stages), `job` (how work is cut up), `pipeline` (the run), `finish` (shards), `yields` and
//! `page` (the report).

pub mod manifest;
pub mod toybox;
pub mod write;

pub mod draft;
pub mod settings;
pub mod stage;

mod affinity;
mod caption;
mod collage;
mod compose;
mod instances;
mod prompts;
mod score;
mod stylise;

pub mod embedded;

pub mod captioner;
pub mod chat;
pub mod painting;
mod patience;
mod saved;
mod seeing;
pub mod tool;
mod truth;

mod finish;
pub mod job;
mod output;
pub mod page;
pub mod pipeline;
#[cfg(test)]
mod rehearsal;
pub mod yields;

pub use captioner::BlipCaptioner;
pub use job::Job;
pub use pipeline::{Done, Progress, Watch, synthesise};
pub use seeing::VERSION as SEEING_VERSION;
pub use write::{Packing, Part, Summary, ToyboxData, write_toybox};

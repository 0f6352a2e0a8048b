//! How well generated pictures keep their subject and obey their prompt: the toybox protocol.
//!
//! `world` names the toys, kinds and scenes that can be answered; `protocol` says which pictures are asked for and counts
//! what the judge sees in them; `report` holds the counts, with the formulas of `metrics`. The judge is a linear discriminant (`discriminant`, solved by `cholesky`) on pooled patch responses
//! (`patches`), fitted at the start of every evaluation to freshly drawn pictures, half of them softened (`soften`). Who
//! draws is the caller's business: real pictures come in through closures.

mod judge;
mod protocol;
mod report;
mod world;

pub mod metrics;

mod cholesky;
mod discriminant;
mod patches;
mod soften;

pub use judge::{Judge, JudgeSettings, Verdict};
pub use protocol::{Outcome, Trial, judge_pictures, oracle, run, trials};
pub use report::{Report, Row};
pub use soften::{Softness, soften};
pub use world::{Draw, Label, Labelled, World};

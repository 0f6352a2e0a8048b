//! jedi against PyTorch, diffusers and transformers: the reference results of `scripts/make_golden.py`, smallest layer
//! first, so that a failure names its layer. `-- --nocapture` shows every comparison.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it compared")]

#[path = "parity/compare.rs"]
mod compare;
#[path = "parity/drawn.rs"]
mod drawn;
#[path = "parity/golden.rs"]
mod golden;

#[path = "parity/ops.rs"]
mod ops;

#[path = "parity/grounding.rs"]
mod grounding;
#[path = "parity/language.rs"]
mod language;
#[path = "parity/layouts.rs"]
mod layouts;
#[path = "parity/text.rs"]
mod text;
#[path = "parity/unet.rs"]
mod unet;
#[path = "parity/vae.rs"]
mod vae;
#[path = "parity/vision.rs"]
mod vision;

#[path = "parity/captions.rs"]
mod captions;
#[path = "parity/diffusion.rs"]
mod diffusion;
#[path = "parity/families.rs"]
mod families;
#[path = "parity/painting.rs"]
mod painting;
#[path = "parity/samplers.rs"]
mod samplers;
#[path = "parity/sampling.rs"]
mod sampling;

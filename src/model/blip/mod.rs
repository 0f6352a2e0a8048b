//! Captions: BLIP and BLIP-2, as transformers has them, for inference. One vision tower and one BERT layer serve both; BLIP's
//! decoder looks at the picture through cross-attention, BLIP-2's Q-Former reads it into a few vectors that a language model
//! (OPT) takes for words.
//!
//! candle-transformers has BLIP too, but its key/value cache lives inside the layers, where beams cannot be reordered.

pub mod blip1;
pub mod blip2;
pub mod config;
pub mod network;
pub mod search;

mod bert;
mod cache;
mod opt;
mod qformer;
mod vision;

pub use blip1::Blip;
pub use blip2::Blip2;
pub use config::{Blip2Config, BlipConfig};
pub use network::Network;
pub use search::Search;

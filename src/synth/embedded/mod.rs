//! What the pipeline can do by itself, without downloads: prompts by a grammar, instances on plain ground, embeddings of
//! colours and of layout, colour filters. The collages are in `toybox::sheet`; scenes are painted by the embedded toybox model with
//! `painting`.

pub mod filter;
pub mod grammar;
pub mod layout;
pub mod palette;
pub mod plain_ground;
pub mod repeat;
mod words;

pub use filter::Filter;
pub use grammar::{Grammar, Scenes, kind_of};
pub use layout::Layout;
pub use palette::Palette;
pub use plain_ground::PlainGround;
pub use repeat::PromptAsCaption;

/// 2,194 common nouns that a picture can show, a line each.
pub const NOUNS: &str = include_str!("nouns.txt");

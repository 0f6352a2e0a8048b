//! The scene prompt as the caption.

use crate::synth::stage::{Answers, CaptionAsk, Captioner};

/// Goes up when the captions change.
pub const VERSION: u32 = 1;

/// Says what the picture was painted from.
pub struct PromptAsCaption;

impl Captioner for PromptAsCaption {
    fn captions(&mut self, asks: &[CaptionAsk]) -> Answers<String> {
        let caption = |ask: &CaptionAsk| match ask.style {
            Some(style) => format!("{}, {style}", ask.prompt),
            None => ask.prompt.to_owned(),
        };
        asks.iter().map(|ask| Ok(caption(ask))).collect()
    }
}

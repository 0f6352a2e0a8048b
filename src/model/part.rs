//! The parts of a model folder, for those who need only some of them.

/// A part of a model folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The denoising network.
    Unet,
    /// Pictures to latents and back.
    Vae,
    /// Tokens to context.
    TextEncoder,
    /// Text to tokens.
    Tokenizer,
    /// The noise levels.
    Scheduler,
}

impl Part {
    /// A whole model.
    pub const ALL: &[Part] = &[Part::Unet, Part::Vae, Part::TextEncoder, Part::Tokenizer, Part::Scheduler];

    /// One of these files must be there.
    pub fn files(self) -> &'static [&'static str] {
        match self {
            Part::Unet => &["unet/config.json"],
            Part::Vae => &["vae/config.json"],
            Part::TextEncoder => &["text_encoder/config.json"],
            Part::Tokenizer => &["tokenizer/vocab.json", "tokenizer/tokenizer.json"],
            Part::Scheduler => &["scheduler/scheduler_config.json"],
        }
    }

    /// For people, of a single file.
    pub fn in_words(self) -> &'static str {
        match self {
            Part::Unet => "the U-Net (model.diffusion_model.…)",
            Part::Vae => "the VAE (first_stage_model.…)",
            Part::TextEncoder => "the text encoder (cond_stage_model.…)",
            Part::Tokenizer => "the tokenizer (give --tokenizer DIR)",
            Part::Scheduler => "the noise schedule",
        }
    }
}

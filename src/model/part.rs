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
    /// A network at the top of its folder, with what goes with it: transformers' layout.
    Network,
    /// A language model in one GGUF file.
    Gguf,
}

impl Part {
    /// A whole model that paints.
    pub const ALL: &[Part] = &[Part::Unet, Part::Vae, Part::TextEncoder, Part::Tokenizer, Part::Scheduler];

    /// One of these files must be there.
    pub fn files(self) -> &'static [&'static str] {
        match self {
            Part::Unet => &["unet/config.json"],
            Part::Vae => &["vae/config.json"],
            Part::TextEncoder => &["text_encoder/config.json"],
            Part::Tokenizer => &["tokenizer/vocab.json", "tokenizer/tokenizer.json"],
            Part::Scheduler => &["scheduler/scheduler_config.json"],
            Part::Network => &["config.json"],
            // Its name is its own affair.
            Part::Gguf => &[],
        }
    }

    /// One of these too, of a model that reads prompts with two text encoders.
    pub fn second_files(self) -> Option<&'static [&'static str]> {
        match self {
            Part::TextEncoder => Some(&["text_encoder_2/config.json"]),
            Part::Tokenizer => Some(&["tokenizer_2/vocab.json", "tokenizer_2/tokenizer.json"]),
            Part::Unet | Part::Vae | Part::Scheduler | Part::Network | Part::Gguf => None,
        }
    }

    /// For people, of a single file.
    pub fn in_words(self) -> &'static str {
        match self {
            Part::Unet => "the U-Net (model.diffusion_model.…)",
            Part::Vae => "the VAE (first_stage_model.…)",
            Part::TextEncoder => "the text encoder (cond_stage_model.…, conditioner.embedders.0.transformer.…)",
            Part::Tokenizer => "the tokenizer (give --tokenizer DIR)",
            Part::Scheduler => "the noise schedule",
            Part::Network => "a network in transformers' layout",
            Part::Gguf => "a language model (.gguf)",
        }
    }

    /// [`Part::in_words`] of its second.
    pub fn second_in_words(self) -> &'static str {
        match self {
            Part::TextEncoder => "the second text encoder (conditioner.embedders.1.model.…)",
            other => other.in_words(),
        }
    }
}

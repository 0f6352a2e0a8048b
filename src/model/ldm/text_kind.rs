//! Which text encoders a file holds, and where: one of its own kind in Stable Diffusion 1 and 2, two in XL.

use crate::model::text::{HiddenAct, TextConfig};

/// A text encoder as a single file holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextKind {
    /// OpenAI's CLIP ViT-L: Stable Diffusion 1.
    Clip,
    /// OpenCLIP ViT-H: Stable Diffusion 2.
    OpenClip,
    /// OpenAI's CLIP ViT-L, the first of Stable Diffusion XL.
    XlClip,
    /// OpenCLIP ViT-bigG, the second of Stable Diffusion XL, with the projection of what it pools.
    XlOpenClip,
}

impl TextKind {
    const ALL: [Self; 4] = [Self::Clip, Self::OpenClip, Self::XlClip, Self::XlOpenClip];

    /// Those of a file, by the names of its tensors.
    pub fn all_in<'a>(names: impl Iterator<Item = &'a String> + Clone) -> Vec<Self> {
        let is_there = |kind: &Self| names.clone().any(|name| name.starts_with(kind.prefix()));
        Self::ALL.into_iter().filter(is_there).collect()
    }

    /// The kind of a folder's component, by its config: transformers writes the first CLIP's activation for Stable Diffusion 1
    /// alone. `is_xl` where the model has a second text encoder.
    pub fn of_component(component: &str, config: &TextConfig, is_xl: bool) -> Self {
        match (is_xl, component, config.hidden_act) {
            (true, "text_encoder_2", _) => Self::XlOpenClip,
            (true, ..) => Self::XlClip,
            (false, _, HiddenAct::QuickGelu) => Self::Clip,
            (false, _, HiddenAct::Gelu) => Self::OpenClip,
        }
    }

    /// In front of its tensors' names. Those of CLIP are transformers' from there on, those of OpenCLIP its own.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Clip => "cond_stage_model.transformer.",
            Self::OpenClip => "cond_stage_model.model.",
            Self::XlClip => "conditioner.embedders.0.transformer.",
            Self::XlOpenClip => "conditioner.embedders.1.model.",
        }
    }

    /// Its folder in the diffusers layout.
    pub fn component(self) -> &'static str {
        if self == Self::XlOpenClip { "text_encoder_2" } else { "text_encoder" }
    }

    /// Its tokenizer's folder there.
    pub fn tokenizer(self) -> &'static str {
        if self == Self::XlOpenClip { "tokenizer_2" } else { "tokenizer" }
    }

    /// Whether its tensors have OpenCLIP's names.
    pub fn is_open_clip(self) -> bool {
        matches!(self, Self::OpenClip | Self::XlOpenClip)
    }
}

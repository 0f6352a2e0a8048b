//! How a question is laid out for a model that was taught to chat. A GGUF file carries its layout as a program (Jinja); two
//! layouts cover the models that are read, told apart by the tokens that they need.

/// A layout of turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `<|im_start|>role … <|im_end|>`: Qwen and many others.
    ChatMl {
        /// The model thinks before it answers unless it is shown an empty thought (Qwen3).
        thinks: bool,
    },
    /// `<|start_header_id|>role<|end_header_id|> … <|eot_id|>`: Llama 3.
    Llama3,
}

impl Format {
    /// None where the vocabulary has neither. `template` is the file's own layout, if it has one.
    pub fn of(has_token: impl Fn(&str) -> bool, template: Option<&str>) -> Option<Self> {
        if has_token("<|im_start|>") && has_token("<|im_end|>") {
            let thinks = template.is_some_and(|template| template.contains("enable_thinking"));
            Some(Self::ChatMl { thinks })
        } else if has_token("<|start_header_id|>") && has_token("<|eot_id|>") {
            Some(Self::Llama3)
        } else {
            None
        }
    }

    /// An instruction and a question, up to where the answer begins.
    pub fn text(self, instruction: &str, question: &str) -> String {
        match self {
            Self::ChatMl { thinks } => {
                let thought = if thinks { "<think>\n\n</think>\n\n" } else { "" };
                let turn = |role: &str, text: &str| format!("<|im_start|>{role}\n{text}<|im_end|>\n");
                format!("{}{}<|im_start|>assistant\n{thought}", turn("system", instruction), turn("user", question))
            }
            Self::Llama3 => {
                let head = |role: &str| format!("<|start_header_id|>{role}<|end_header_id|>\n\n");
                let turn = |role: &str, text: &str| format!("{}{text}<|eot_id|>", head(role));
                let turns = format!("{}{}", turn("system", instruction), turn("user", question));
                format!("<|begin_of_text|>{turns}{}", head("assistant"))
            }
        }
    }

    /// The tokens that end an answer, beside the one that the file names.
    pub fn ends(self) -> &'static [&'static str] {
        match self {
            Self::ChatMl { .. } => &["<|im_end|>", "<|endoftext|>"],
            Self::Llama3 => &["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_told_by_the_vocabulary_and_thinking_by_the_template() {
        let format = |tokens: &[&str], template| Format::of(|token| tokens.contains(&token), template);
        let chat = ["<|im_start|>", "<|im_end|>"];
        assert_eq!(format(&chat, None), Some(Format::ChatMl { thinks: false }));
        assert_eq!(format(&chat, Some("{% if enable_thinking %}")), Some(Format::ChatMl { thinks: true }));
        assert_eq!(format(&["<|start_header_id|>", "<|eot_id|>"], Some("")), Some(Format::Llama3));
        assert_eq!(format(&["[INST]"], None), None);
    }
}

//! What a phrase names in a picture, found by Grounding DINO: boxes, scores, and the words that they answer to.

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, IndexOp as _, Tensor};
use image::RgbImage;

use super::prepare::{Family, Preparation};
use super::words::Words;
use crate::device::Runtime;
use crate::invalid::invalid;
use crate::model::Files;
use crate::model::grounding_dino::{GroundingDino, Stages};

/// Something found.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// Left, upper, right and lower edge in pixels of the picture as it was given.
    pub edges: [f32; 4],
    /// How sure, 0 to 1.
    pub score: f32,
    /// The words of the phrase that it answers to.
    pub phrase: String,
}

/// What is found at all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholds {
    /// A finding's score is above.
    pub score: f32,
    /// A word that it answers to has a score above.
    pub word: f32,
}

impl Default for Thresholds {
    /// transformers' own.
    fn default() -> Self {
        Self { score: 0.25, word: 0.25 }
    }
}

/// The network with all that pictures and phrases need around it.
pub struct ObjectDetector {
    network: GroundingDino,
    preparation: Preparation,
    words: Words,
    device: Device,
}

impl ObjectDetector {
    /// Reads a folder of transformers' `GroundingDinoForObjectDetection`.
    pub fn load(files: &Files, runtime: &Runtime) -> Result<Self> {
        Ok(Self {
            network: GroundingDino::load(files, runtime)?,
            preparation: Preparation::read(files, Family::GroundingDino)?,
            words: Words::read(files)?,
            device: runtime.device.clone(),
        })
    }

    /// What each phrase names in the picture beside it, in the network's order.
    ///
    /// # Errors
    /// When a phrase has more tokens than the network reads (`Invalid`), or a picture cannot be prepared.
    pub fn find(&self, pictures: &[&RgbImage], phrases: &[&str], thresholds: Thresholds) -> Result<Vec<Vec<Finding>>> {
        anyhow::ensure!(pictures.len() == phrases.len(), "{} pictures with {} phrases", pictures.len(), phrases.len());
        let texts: Vec<Vec<u32>> = phrases.iter().map(|phrase| self.tokens(phrase)).collect::<Result<_>>()?;
        let mut found = Vec::new();
        // Pictures of one size go through together, for none is padded.
        let mut rest = (pictures, &texts[..]);
        while let Some(first) = rest.0.first() {
            let size = first.dimensions();
            let n_alike = rest.0.iter().take_while(|picture| picture.dimensions() == size).count();
            let stages = self.stages(&rest.0[..n_alike], &rest.1[..n_alike])?;
            for (i, tokens) in rest.1[..n_alike].iter().enumerate() {
                let answer = Answer { logits: &stages.logits.i(i)?, boxes: &stages.boxes.i(i)?, tokens };
                found.push(answer.findings(size, thresholds, &self.words)?);
            }
            rest = (&rest.0[n_alike..], &rest.1[n_alike..]);
        }
        Ok(found)
    }

    /// The tokens of a phrase as the network was trained to read it: in lower case, with a full stop at its end.
    pub fn tokens(&self, phrase: &str) -> Result<Vec<u32>> {
        let tokens = self.words.tokens(&ended(phrase))?;
        let limit = self.network.config().max_text_len.min(self.network.config().text_config.max_position_embeddings);
        if tokens.len() > limit {
            let n_tokens = tokens.len();
            return Err(invalid(format!(
                "phrase {phrase:?}: has {n_tokens} tokens, the network reads {limit}; shorten it"
            )));
        }
        Ok(tokens)
    }

    /// What makes tokens words again.
    pub fn words(&self) -> &Words {
        &self.words
    }

    /// A picture as the network sees it, `[1, 3, h, w]`.
    pub fn pixels(&self, picture: &RgbImage) -> Result<Tensor> {
        self.preparation.tensor(picture, &self.device)
    }

    /// All that the network goes through with pictures of one size.
    pub fn stages(&self, pictures: &[&RgbImage], texts: &[Vec<u32>]) -> Result<Stages> {
        let pixels: Vec<Tensor> = pictures.iter().map(|picture| self.pixels(picture)).collect::<Result<_>>()?;
        self.network.forward(&Tensor::cat(&pixels, 0)?, texts).context("Grounding DINO")
    }
}

/// Several phrases as one text.
pub fn together(phrases: &[String]) -> String {
    phrases.iter().map(|phrase| ended(phrase)).collect::<Vec<_>>().join(" ")
}

/// Lower case, and a stop where there is none.
fn ended(phrase: &str) -> String {
    let phrase = phrase.trim().to_lowercase();
    if phrase.ends_with(['.', '?']) { phrase } else { format!("{phrase}.") }
}

/// What the network says of one picture.
pub struct Answer<'a> {
    /// `[q, t]`, t tokens or more.
    pub logits: &'a Tensor,
    /// `[q, 4]`: middle and size in shares of the picture.
    pub boxes: &'a Tensor,
    /// The phrase's.
    pub tokens: &'a [u32],
}

impl Answer<'_> {
    /// The boxes whose best word is above the threshold, each with all such words
    /// (`post_process_grounded_object_detection`).
    pub fn findings(&self, (width, height): (u32, u32), limits: Thresholds, words: &Words) -> Result<Vec<Finding>> {
        let host = |x: &Tensor| x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec2::<f32>();
        let (logits, boxes) = (host(self.logits)?, host(self.boxes)?);
        let mut found = Vec::new();
        for (logits, own) in logits.iter().zip(&boxes) {
            let scores: Vec<f32> = logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect();
            let score = scores.iter().fold(0.0, |best: f32, score| best.max(*score));
            if score <= limits.score {
                continue;
            }
            // The first token is `[CLS]`, which is no word.
            let named = scores.iter().zip(self.tokens).skip(1).filter(|(score, _)| **score > limits.word);
            let named: Vec<u32> = named.map(|(_, token)| *token).collect();
            let (w, h) = (width as f32, height as f32);
            let [x, y, half_width, half_height] = [own[0], own[1], 0.5 * own[2], 0.5 * own[3]];
            let edges = [(x - half_width) * w, (y - half_height) * h, (x + half_width) * w, (y + half_height) * h];
            found.push(Finding { edges, score, phrase: words.text(&named)? });
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrases_end_with_a_stop() {
        assert_eq!([" A Toy", "a toy. ", "dog ?"].map(ended), ["a toy.", "a toy.", "dog ?"]);
        assert_eq!(together(&["a Toy".into(), "dogs. cats".into()]), "a toy. dogs. cats.");
    }
}

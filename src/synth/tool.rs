//! Models as the pipeline holds them: named, weighed, opened when first needed and closed when the memory is needed.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::stage::{Captioner, CollagePainter, Detector, Embedder, Inpainter, Prompter, Segmenter, Stage, Styler};

/// Which model it is, and what it takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// As the config names it.
    pub name: String,
    /// Goes up when the code around the weights changes what comes out.
    pub version: u32,
    /// SHA-256 of the weights, or a commit on the hub; empty for plain code.
    pub hash: String,
    /// On disk, in bytes; 0 for plain code.
    pub disk_bytes: u64,
    /// While it works, in bytes.
    pub memory_bytes: u64,
    /// Still to be downloaded, in bytes.
    pub missing_bytes: u64,
    /// It is asked over the network.
    pub is_elsewhere: bool,
}

impl Model {
    /// Plain code, without weights.
    pub fn code(name: &str, version: u32) -> Self {
        Self { name: name.to_owned(), version, ..Self::default() }
    }
}

/// Opens a model.
type Open<T> = Box<dyn Fn() -> Result<Box<T>>>;

/// A model that is opened when it is first needed.
pub struct Tool<T: ?Sized> {
    /// What it is.
    pub model: Model,
    open: Open<T>,
    opened: Option<Box<T>>,
}

impl<T: ?Sized> Tool<T> {
    /// A closed tool.
    pub fn new(model: Model, open: impl Fn() -> Result<Box<T>> + 'static) -> Self {
        Self { model, open: Box::new(open), opened: None }
    }

    /// The open model.
    pub fn get(&mut self) -> Result<&mut T> {
        let opened = match self.opened.take() {
            Some(opened) => opened,
            None => (self.open)()?,
        };
        Ok(self.opened.insert(opened))
    }

    /// Gives its memory back.
    pub fn close(&mut self) {
        self.opened = None;
    }
}

/// All models of a pipeline.
pub struct Tools {
    /// Writes the prompts.
    pub prompts: Tool<dyn Prompter>,
    /// Paints the collages.
    pub collage: Tool<dyn CollagePainter>,
    /// Finds things.
    pub detect: Tool<dyn Detector>,
    /// Cuts them out.
    pub segment: Tool<dyn Segmenter>,
    /// Tells subjects apart (the paper: CLIP).
    pub identity: Tool<dyn Embedder>,
    /// Tells another view from a mere copy (DINO); None: copies are let through.
    pub copies: Option<Tool<dyn Embedder>>,
    /// In the place of `identity` for final pictures; None: that one.
    pub score_identity: Option<Tool<dyn Embedder>>,
    /// In the place of `copies` for final pictures; None: that one.
    pub score_copies: Option<Tool<dyn Embedder>>,
    /// Paints scenes around things.
    pub compose: Tool<dyn Inpainter>,
    /// Changes styles.
    pub stylise: Tool<dyn Styler>,
    /// Describes.
    pub caption: Tool<dyn Captioner>,
}

impl Tools {
    /// The models that a stage works with.
    pub fn models(&self, stage: Stage) -> Vec<&Model> {
        let [copies, score_identity, score_copies] =
            [&self.copies, &self.score_identity, &self.score_copies].map(|tool| tool.as_ref().map(|tool| &tool.model));
        match stage {
            Stage::Prompts => vec![&self.prompts.model],
            Stage::Collage => vec![&self.collage.model],
            Stage::Instances => vec![&self.detect.model, &self.segment.model],
            Stage::Affinity => [Some(&self.identity.model), copies].into_iter().flatten().collect(),
            Stage::Score => {
                let identity = score_identity.unwrap_or(&self.identity.model);
                [Some(identity), score_copies.or(copies)].into_iter().flatten().collect()
            }
            Stage::Compose => vec![&self.compose.model],
            Stage::Stylise => vec![&self.stylise.model],
            Stage::Caption => vec![&self.caption.model],
        }
    }

    /// Closes all models that none of `stages` works with.
    pub fn close_all_but(&mut self, stages: &[Stage]) {
        for stage in Stage::ALL.into_iter().filter(|stage| !stages.contains(stage)) {
            match stage {
                Stage::Prompts => self.prompts.close(),
                Stage::Collage => self.collage.close(),
                Stage::Instances => {
                    self.detect.close();
                    self.segment.close();
                }
                Stage::Affinity | Stage::Score => {}
                Stage::Compose => self.compose.close(),
                Stage::Stylise => self.stylise.close(),
                Stage::Caption => self.caption.close(),
            }
        }
        // The score compares with the affinity's models where it has none of its own.
        let is_needed = |own: &Option<Tool<dyn Embedder>>| {
            stages.contains(&Stage::Affinity) || (stages.contains(&Stage::Score) && own.is_none())
        };
        if !is_needed(&self.score_identity) {
            self.identity.close();
        }
        if !is_needed(&self.score_copies) {
            self.copies.iter_mut().for_each(Tool::close);
        }
        if !stages.contains(&Stage::Score) {
            [&mut self.score_identity, &mut self.score_copies].into_iter().flatten().for_each(Tool::close);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::super::stage::{Answers, CaptionAsk};
    use super::*;

    struct Echo;

    impl Captioner for Echo {
        fn captions(&mut self, asks: &[CaptionAsk]) -> Answers<String> {
            asks.iter().map(|ask| Ok(ask.prompt.to_owned())).collect()
        }
    }

    #[test]
    fn a_tool_is_opened_when_it_is_needed_and_again_after_it_was_closed() {
        let opened = Rc::new(Cell::new(0));
        let count = opened.clone();
        let mut tool = Tool::<dyn Captioner>::new(Model::code("echo", 1), move || {
            count.set(count.get() + 1);
            Ok(Box::new(Echo))
        });
        assert_eq!(opened.get(), 0);
        tool.get().unwrap();
        tool.get().unwrap();
        assert_eq!(opened.get(), 1);
        tool.close();
        tool.get().unwrap();
        assert_eq!(opened.get(), 2);
    }
}

//! Prompts from a language model: what an object looks like, and scenes with it (GPT(l, object) and GPT(l, scene) of the
//! paper's Algorithm 1), in one question. `wording` asks and reads the answer, strictly; an answer that is refused, cut off or
//! not what was asked for is asked for again with another seed, then given up. `store` keeps what came, so that a second run
//! does not ask again. A model is an `endpoint` or a file on this machine.

mod endpoint;
mod store;
mod wording;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;

pub use endpoint::{Endpoint, EndpointSettings};
pub use store::Store;

use self::store::Kept;
use self::wording::{question, read};
use super::stage::{Answers, PromptAsk, Prompter, Prompts};
use crate::interrupt::Interrupt;
use crate::model::language::{Choice, LanguageModel};
use crate::sha256::sha256_hex;

/// What a model says to a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// All of it.
    Whole(String),
    /// It had not come to its end.
    Cut,
    /// It will not answer; in its own words.
    Refused(String),
}

/// A question for a model.
#[derive(Clone, Debug)]
pub struct Question {
    /// What the model is.
    pub instruction: &'static str,
    /// What is wanted.
    pub text: String,
    /// Another one brings another answer, where the model heeds it.
    pub seed: u64,
}

/// A model that chats: an endpoint, or a file.
pub trait Chat {
    /// Distinguishes its answers from those of other models and settings.
    fn identity(&self) -> String;

    /// An answer a question. An error is what waiting did not cure.
    fn replies(&mut self, questions: &[Question]) -> Vec<Result<Reply>>;
}

/// A language model in a file, and how it draws its words.
pub struct LocalChat {
    /// The model.
    pub model: LanguageModel,
    /// What the user calls it.
    pub name: String,
    /// How it draws.
    pub choice: Choice,
    /// No further question is begun when it is raised.
    pub interrupt: Interrupt,
}

impl Chat for LocalChat {
    fn identity(&self) -> String {
        format!("{} {:?}", self.name, self.choice)
    }

    fn replies(&mut self, questions: &[Question]) -> Vec<Result<Reply>> {
        let reply = |question: &Question| {
            self.interrupt.check()?;
            let answer = self.model.answer(question.instruction, &question.text, self.choice, question.seed)?;
            Ok(if answer.is_cut { Reply::Cut } else { Reply::Whole(answer.text) })
        };
        questions.iter().map(reply).collect()
    }
}

/// How often what happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Questions that went to the model.
    pub asked: usize,
    /// Asks answered from the store.
    pub kept: usize,
    /// Answers that were refusals.
    pub refused: usize,
    /// Answers that were cut off.
    pub cut: usize,
    /// Answers that are not what was asked for.
    pub malformed: usize,
    /// Questions without an answer.
    pub failed: usize,
    /// Asks given up.
    pub given_up: usize,
}

/// Asks a model for prompts.
pub struct ChatPrompter {
    chat: Box<dyn Chat>,
    store: Store,
    /// Questions for an ask at most.
    tries: usize,
    tally: Tally,
}

impl ChatPrompter {
    /// An ask is given up after so many `tries`.
    pub fn new(chat: Box<dyn Chat>, store: Store, tries: usize) -> Self {
        Self { chat, store, tries: tries.max(1), tally: Tally::default() }
    }

    /// What happened so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    fn keep(&mut self, key: &str, ask: &PromptAsk, kept: Kept) -> Result<Prompts> {
        self.store.put(key, ask, &kept)?;
        kept.into_result()
    }
}

impl Prompter for ChatPrompter {
    /// What comes for an ask depends on it alone, as far as the model does.
    fn prompts(&mut self, asks: &[PromptAsk]) -> Answers<Prompts> {
        let identity = self.chat.identity();
        let keys: Vec<String> = asks.iter().map(|ask| key(&identity, ask)).collect();
        let mut found: BTreeMap<usize, Result<Prompts>> = BTreeMap::new();
        for (index, key) in keys.iter().enumerate() {
            if let Some(kept) = self.store.get(key) {
                self.tally.kept += 1;
                found.insert(index, kept.clone().into_result());
            }
        }
        for attempt in 0..self.tries {
            let open: Vec<usize> = (0..asks.len()).filter(|index| !found.contains_key(index)).collect();
            if open.is_empty() {
                break;
            }
            let questions: Vec<Question> = open.iter().map(|&index| question(&asks[index], attempt)).collect();
            self.tally.asked += questions.len();
            for (index, reply) in open.into_iter().zip(self.chat.replies(&questions)) {
                let ask = &asks[index];
                let fault = match reply {
                    // Waiting did not help, so asking once more will not.
                    Err(error) => {
                        self.tally.failed += 1;
                        found.insert(index, Err(error));
                        continue;
                    }
                    Ok(Reply::Whole(text)) => match read(&text, ask) {
                        Ok(prompts) => {
                            found.insert(index, self.keep(&keys[index], ask, Kept::Prompts(prompts)));
                            continue;
                        }
                        Err(error) => {
                            self.tally.malformed += 1;
                            format!("not what was asked for ({error:#})")
                        }
                    },
                    Ok(Reply::Cut) => {
                        self.tally.cut += 1;
                        "cut off; allow more tokens".to_owned()
                    }
                    Ok(Reply::Refused(words)) => {
                        self.tally.refused += 1;
                        format!("refused ({words})")
                    }
                };
                if attempt + 1 == self.tries {
                    self.tally.given_up += 1;
                    let fault = format!("{}: {} answers, the last was {fault}", ask.object, self.tries);
                    found.insert(index, self.keep(&keys[index], ask, Kept::GivenUp(fault)));
                }
            }
        }
        found.into_values().collect()
    }
}

/// Goes up when the same ask is worded, or its answer read, in another way.
pub const VERSION: u32 = 1;

fn key(identity: &str, ask: &PromptAsk) -> String {
    let all = format!("{VERSION}\n{identity}\n{}\n{}\n{}", ask.object, ask.n_scenes, ask.seed);
    sha256_hex(all.as_bytes())[..32].to_owned()
}

/// Runs `work` on all items, at most `n_workers` at a time; answers in the order of the items.
fn side_by_side<A: Sync, T: Send>(items: &[A], n_workers: usize, work: impl Fn(&A) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let done: Mutex<BTreeMap<usize, T>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..n_workers.clamp(1, items.len().max(1)) {
            scope.spawn(|| {
                while let Some((index, item)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    items.get(index).map(|item| (index, item))
                } {
                    let outcome = work(item);
                    done.lock().expect("no panic while held").insert(index, outcome);
                }
            });
        }
    });
    done.into_inner().expect("no panic while held").into_values().collect()
}

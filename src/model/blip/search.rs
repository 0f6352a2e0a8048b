//! Greedy and beam search, as transformers' `generate` does them (4.57, `GenerationMixin._beam_search`, `early_stopping=False`).

use std::cmp::Ordering;

use anyhow::{Result, ensure};
use candle_core::{DType, Result as CandleResult, Tensor};

/// How a text is searched for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Search {
    /// Texts followed side by side; 1: greedy.
    pub beams: usize,
    /// Tokens of the longest text.
    pub max_new_tokens: usize,
    /// A text's score is its log-probability over its length to this power: above 0 long texts gain, below they lose.
    pub length_exponent: f64,
}

impl Default for Search {
    /// Greedy.
    fn default() -> Self {
        Self { beams: 1, max_new_tokens: 30, length_exponent: 1.0 }
    }
}

/// What a language model is told to go on with. Every picture has as many rows, and they are adjacent.
#[derive(Clone, Copy, Debug)]
pub struct Next<'a> {
    /// Which of the last call's pictures go on.
    pub pictures: &'a [u32],
    /// Which of the last call's rows each row goes on from.
    pub rows: &'a [u32],
    /// What each row appends.
    pub tokens: &'a [u32],
}

/// A language model that has a beginning for every picture.
pub trait Writer {
    /// Scores of the first new token, `[pictures, vocabulary]`.
    fn start(&mut self) -> CandleResult<Tensor>;
    /// Scores of the token behind each row's, `[rows, vocabulary]`.
    fn step(&mut self, next: Next) -> CandleResult<Tensor>;
}

/// The new tokens of every picture, the one that ends a text included.
pub fn search(writer: &mut dyn Writer, ends: &[u32], settings: Search) -> Result<Vec<Vec<u32>>> {
    ensure!(settings.beams > 0 && settings.max_new_tokens > 0, "a search needs at least one beam and one token");
    let mut scores = rows_of(&writer.start()?)?;
    let mut texts: Vec<Beams> = scores.iter().map(|_| Beams::default()).collect();
    let mut open: Vec<usize> = (0..texts.len()).collect();
    for n_tokens in 1..=settings.max_new_tokens {
        let per_picture = scores.len() / open.len();
        let (mut pictures, mut rows, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        for (index, scores) in scores.chunks(per_picture).enumerate() {
            let beams = &mut texts[open[index]];
            let taken = beams.advance(scores, ends, n_tokens, settings)?;
            if beams.is_closed {
                continue;
            }
            pictures.push(index as u32);
            rows.extend(taken.iter().map(|(row, _)| (index * per_picture + row) as u32));
            tokens.extend(taken.iter().map(|(_, token)| token));
        }
        if pictures.is_empty() {
            break;
        }
        open = pictures.iter().map(|&index| open[index as usize]).collect();
        scores = rows_of(&writer.step(Next { pictures: &pictures, rows: &rows, tokens: &tokens })?)?;
    }
    Ok(texts
        .into_iter()
        .map(|beams| beams.finished.into_iter().next().map(|text| text.tokens).unwrap_or_default())
        .collect())
}

/// Scores on the host.
fn rows_of(scores: &Tensor) -> Result<Vec<Vec<f32>>> {
    let rows: Vec<Vec<f32>> = scores.to_dtype(DType::F32)?.to_vec2()?;
    ensure!(
        rows.iter().flatten().all(|score| !score.is_nan()),
        "the language model's scores are not numbers; its weights may be damaged, or overflow in half precision"
    );
    Ok(rows)
}

/// The texts of one picture.
#[derive(Debug, Default)]
struct Beams {
    /// Those that go on, best first; empty before the first token.
    running: Vec<Text>,
    /// Those that ended, best first, no more than there are beams.
    finished: Vec<Text>,
    /// Nothing that goes on can become better than what ended.
    is_closed: bool,
}

#[derive(Clone, Debug)]
struct Text {
    tokens: Vec<u32>,
    /// Log-probability; of a finished text over its length.
    score: f64,
}

/// One more token for one of the rows.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    row: usize,
    token: u32,
    score: f64,
}

impl Beams {
    /// Takes one token more: which rows go on, with which tokens.
    fn advance(
        &mut self,
        scores: &[Vec<f32>],
        ends: &[u32],
        n_tokens: usize,
        settings: Search,
    ) -> Result<Vec<(usize, u32)>> {
        if self.running.is_empty() {
            self.running.push(Text { tokens: Vec::new(), score: 0.0 });
        }
        let n_beams = settings.beams;
        // Enough that as many go on even if every beam ends in every way.
        let n_kept = if n_beams == 1 { 1 } else { (1 + ends.len()).max(2) * n_beams };
        let best = self.best(scores, n_kept);
        ensure!(
            best.len() == n_kept,
            "{n_beams} beams are more than a vocabulary of {} tokens can tell apart; take fewer",
            scores.first().map_or(0, Vec::len)
        );
        let is_last = n_tokens == settings.max_new_tokens;
        let has_ended = |candidate: &Candidate| is_last || ends.contains(&candidate.token);
        let length = (n_tokens as f64).powf(settings.length_exponent);
        let text_of = |candidate: &Candidate, score: f64| {
            let mut tokens = self.running[candidate.row].tokens.clone();
            tokens.push(candidate.token);
            Text { tokens, score }
        };
        // Only the first few can end a text, the others are there to go on.
        let ended = best.iter().take(n_beams).filter(|candidate| has_ended(candidate));
        self.finished.extend(ended.map(|candidate| text_of(candidate, candidate.score / length)).collect::<Vec<_>>());
        self.finished.sort_by(|a, b| descending(a.score, b.score));
        self.finished.truncate(n_beams);
        let taken: Vec<Candidate> =
            best.iter().filter(|candidate| !has_ended(candidate)).take(n_beams).copied().collect();
        self.running = taken.iter().map(|candidate| text_of(candidate, candidate.score)).collect();
        let is_full = self.finished.len() == n_beams;
        let worst = self.finished.last().map_or(f64::NEG_INFINITY, |text| text.score);
        self.is_closed = self.running.first().is_none_or(|text| is_full && text.score / length <= worst);
        Ok(taken.iter().map(|candidate| (candidate.row, candidate.token)).collect())
    }

    /// The `n` best tokens behind any row, best first.
    fn best(&self, scores: &[Vec<f32>], n: usize) -> Vec<Candidate> {
        let order = |a: &Candidate, b: &Candidate| {
            descending(a.score, b.score).then(a.row.cmp(&b.row)).then(a.token.cmp(&b.token))
        };
        let mut all = Vec::new();
        for (row, (scores, text)) in scores.iter().zip(&self.running).enumerate() {
            let total = log_of_sum(scores);
            let candidate = |(token, &score): (usize, &f32)| Candidate {
                row,
                token: token as u32,
                score: text.score + f64::from(score) - total,
            };
            let mut of_row: Vec<Candidate> = scores.iter().enumerate().map(candidate).collect();
            if n < of_row.len() {
                of_row.select_nth_unstable_by(n, order);
                of_row.truncate(n);
            }
            all.extend(of_row);
        }
        all.sort_by(order);
        all.truncate(n);
        all
    }
}

/// The logarithm of Σ exp.
fn log_of_sum(scores: &[f32]) -> f64 {
    let highest = f64::from(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    highest + scores.iter().map(|&score| (f64::from(score) - highest).exp()).sum::<f64>().ln()
}

fn descending(a: f64, b: f64) -> Ordering {
    b.total_cmp(&a)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// Probabilities by the last token; 0 starts, 3 ends. The likeliest first token leads to unlikely texts.
    const LIKELY: [[f32; 4]; 4] =
        [[0.0, 0.6, 0.4, 0.0], [0.1, 0.4, 0.25, 0.25], [0.05, 0.03, 0.02, 0.9], [0.25, 0.25, 0.25, 0.25]];

    #[derive(Default)]
    struct Table {
        n_pictures: usize,
        asked: Vec<usize>,
    }

    impl Table {
        fn scores(&mut self, tokens: &[u32]) -> CandleResult<Tensor> {
            self.asked.push(tokens.len());
            let rows: Vec<f32> = tokens.iter().flat_map(|&token| LIKELY[token as usize].map(f32::ln)).collect();
            Tensor::from_vec(rows, (tokens.len(), 4), &Device::Cpu)
        }
    }

    impl Writer for Table {
        fn start(&mut self) -> CandleResult<Tensor> {
            self.scores(&vec![0; self.n_pictures])
        }

        fn step(&mut self, next: Next) -> CandleResult<Tensor> {
            self.scores(next.tokens)
        }
    }

    fn found(beams: usize, max_new_tokens: usize) -> Vec<u32> {
        let mut table = Table { n_pictures: 1, ..Table::default() };
        let settings = Search { beams, max_new_tokens, ..Search::default() };
        search(&mut table, &[3], settings).unwrap().remove(0)
    }

    #[test]
    fn beams_find_the_likelier_text_that_greed_misses() {
        assert_eq!(found(1, 4), [1, 1, 1, 1]);
        // 0.4 · 0.9.
        assert_eq!(found(2, 4), [2, 3]);
    }

    #[test]
    fn a_text_is_no_longer_than_asked_for_and_ends_when_nothing_better_can_come() {
        assert_eq!(found(1, 1), [1]);
        let mut table = Table { n_pictures: 3, ..Table::default() };
        search(&mut table, &[1], Search { max_new_tokens: 9, ..Search::default() }).unwrap();
        assert_eq!(table.asked, [3], "all end with their first token");
    }

    #[test]
    fn scores_that_are_no_numbers_are_refused() {
        struct Broken;
        impl Writer for Broken {
            fn start(&mut self) -> CandleResult<Tensor> {
                Tensor::new(&[[0f32, f32::NAN]], &Device::Cpu)
            }
            fn step(&mut self, _: Next) -> CandleResult<Tensor> {
                self.start()
            }
        }
        assert!(search(&mut Broken, &[1], Search::default()).unwrap_err().to_string().contains("not numbers"));
        let mut table = Table { n_pictures: 1, ..Table::default() };
        let error = search(&mut table, &[3], Search { beams: 5, ..Search::default() }).unwrap_err().to_string();
        assert!(error.contains("vocabulary of 4 tokens"), "{error}");
    }
}

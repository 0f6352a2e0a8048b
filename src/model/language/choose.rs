//! Which token comes next, by its score and by chance.

use anyhow::{Result, ensure};

use crate::rng::Rng;

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Scores are divided by it; 0 takes the best token always.
    pub temperature: f64,
    /// Only the likeliest tokens that together have this probability are drawn from; 1: all.
    pub top_p: f64,
    /// Tokens of the longest answer.
    pub max_tokens: usize,
}

impl Choice {
    /// One token.
    pub(super) fn token(&self, scores: &[f32], rng: &mut Rng) -> Result<u32> {
        ensure!(
            !scores.is_empty() && scores.iter().all(|score| !score.is_nan()),
            "the language model's scores are not numbers; its file may be damaged"
        );
        let mut order: Vec<usize> = (0..scores.len()).collect();
        // Ties go to the first.
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        if self.temperature <= 0.0 {
            return Ok(order[0] as u32);
        }
        let best = f64::from(scores[order[0]]);
        let weight = |&token: &usize| ((f64::from(scores[token]) - best) / self.temperature).exp();
        let weights: Vec<f64> = order.iter().map(weight).collect();
        let wanted = self.top_p * weights.iter().sum::<f64>();
        let mut kept = 0.0;
        let n_kept = weights.iter().take_while(|weight| {
            let is_kept = kept < wanted;
            kept += if is_kept { **weight } else { 0.0 };
            is_kept
        });
        let n_kept = n_kept.count().max(1);
        let mut drawn = rng.uniform() * weights[..n_kept].iter().sum::<f64>();
        let index = weights[..n_kept].iter().position(|weight| {
            drawn -= weight;
            drawn < 0.0
        });
        // Rounding may leave a little more than there is.
        Ok(order[index.unwrap_or(n_kept - 1)] as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(choice: Choice, scores: &[f32]) -> Vec<usize> {
        let mut counts = vec![0; scores.len()];
        let mut rng = Rng::new(1, "choose test", 0);
        (0..4000).for_each(|_| counts[choice.token(scores, &mut rng).unwrap() as usize] += 1);
        counts
    }

    #[test]
    fn tokens_are_drawn_by_their_probability_and_the_unlikely_ones_not_at_all() {
        let scores = [0.1f32, 0.6, 0.3].map(f32::ln);
        let choice = |temperature, top_p| Choice { temperature, top_p, max_tokens: 1 };
        assert_eq!(counts(choice(0.0, 1.0), &scores), [0, 4000, 0]);
        let all = counts(choice(1.0, 1.0), &scores);
        assert!(all[0].abs_diff(400) < 100 && all[1].abs_diff(2400) < 150 && all[2].abs_diff(1200) < 150, "{all:?}");
        let likely = counts(choice(1.0, 0.85), &scores);
        assert!(likely[0] == 0 && likely[1].abs_diff(2667) < 150, "{likely:?}");
        assert_eq!(counts(choice(1.0, 0.5), &scores), [0, 4000, 0]);
        let hot = counts(choice(100.0, 1.0), &scores);
        assert!(hot.iter().all(|count| count.abs_diff(1333) < 150), "{hot:?}");
        assert!(choice(1.0, 1.0).token(&[f32::NAN], &mut Rng::new(1, "x", 0)).is_err());
    }
}

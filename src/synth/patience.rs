//! Asking models again: an ask that failed is repeated a few times, then given up; one that cannot succeed ends the run.

use anyhow::{Result, anyhow, bail};

use super::draft::Draft;
use super::settings::Common;
use super::stage::Answers;
use crate::interrupt::is_interrupted;
use crate::invalid::is_invalid;

/// From so many asks on that all failed, the model is taken to be broken rather than the asks.
const ALL_FAILED_FROM: usize = 3;

/// How failures are borne.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How often what failed is asked again.
    pub retries: usize,
    /// All asks together may fail. In later attempts they may: only what failed before is asked there, and a model that
    /// refuses a few objects for good is not broken.
    pub all_may_fail: bool,
}

impl Patience {
    /// With these drafts, which are of one attempt.
    pub fn with(common: &Common, drafts: &[Draft]) -> Self {
        Self { retries: common.retries, all_may_fail: drafts.first().is_some_and(|draft| draft.record.attempt > 0) }
    }
}

/// One answer an ask; those that failed have been asked a few times more. The `Err` of the whole means that going on has no
/// sense: a setting is wrong, nothing at all succeeds, or somebody asked to stop.
pub fn answers<A: Copy, T>(
    model: &str,
    patience: Patience,
    asks: &[A],
    ask: &mut dyn FnMut(&[A]) -> Answers<T>,
) -> Result<Answers<T>> {
    let mut answers = call(model, asks, ask)?;
    for _ in 0..patience.retries {
        let failed: Vec<usize> = (0..asks.len()).filter(|&idx| answers[idx].is_err()).collect();
        if failed.is_empty() {
            break;
        }
        let again: Vec<A> = failed.iter().map(|&idx| asks[idx]).collect();
        for (idx, answer) in failed.into_iter().zip(call(model, &again, ask)?) {
            answers[idx] = answer;
        }
    }
    if !patience.all_may_fail && asks.len() >= ALL_FAILED_FROM && answers.iter().all(Result::is_err) {
        let first = answers.into_iter().find_map(Result::err).unwrap_or_else(|| anyhow!("no answer"));
        return Err(first.context(format!("{model}: failed {} times of {}", asks.len(), asks.len())));
    }
    Ok(answers)
}

fn call<A, T>(model: &str, asks: &[A], ask: &mut dyn FnMut(&[A]) -> Answers<T>) -> Result<Answers<T>> {
    if asks.is_empty() {
        return Ok(vec![]);
    }
    let answers = ask(asks);
    if answers.len() != asks.len() {
        bail!("{model}: {} answers to {} asks", answers.len(), asks.len());
    }
    let ends_the_run = |error: &anyhow::Error| is_invalid(error) || is_interrupted(error);
    match answers.iter().position(|answer| answer.as_ref().is_err_and(ends_the_run)) {
        Some(at) => answers.into_iter().nth(at).unwrap_or_else(|| unreachable!("just found")).map(|_| vec![]),
        None => Ok(answers),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::interrupt::Interrupt;
    use crate::invalid::invalid;

    fn patience(retries: usize) -> Patience {
        Patience { retries, all_may_fail: false }
    }

    /// Fails each ask as often as it says.
    fn stubborn(calls: &mut Vec<Vec<usize>>) -> impl FnMut(&[usize]) -> Answers<usize> {
        let mut failed = [0; 10];
        move |asks: &[usize]| {
            calls.push(asks.to_vec());
            let mut answer = |&ask: &usize| {
                failed[ask] += 1;
                if failed[ask] > ask { Ok(ask) } else { Err(anyhow!("busy")) }
            };
            asks.iter().map(&mut answer).collect()
        }
    }

    #[test]
    fn only_what_failed_is_asked_again() {
        let mut calls = vec![];
        let found = answers("m", patience(2), &[0, 1, 2, 5], &mut stubborn(&mut calls)).unwrap();
        assert_eq!(
            found.iter().map(|f| f.as_ref().ok().copied()).collect::<Vec<_>>(),
            [Some(0), Some(1), Some(2), None]
        );
        assert_eq!(calls, [vec![0, 1, 2, 5], vec![1, 2, 5], vec![2, 5]]);
    }

    #[test]
    fn a_model_that_always_fails_ends_the_run_but_one_bad_ask_does_not() {
        let mut calls = vec![];
        let error = answers("m", patience(1), &[7, 8, 9], &mut stubborn(&mut calls)).unwrap_err();
        assert_eq!(format!("{error:#}"), "m: failed 3 times of 3: busy");
        assert!(answers("m", patience(1), &[9], &mut stubborn(&mut calls)).unwrap()[0].is_err());
        // What is left over in a later attempt may all be refused.
        let later = Patience { all_may_fail: true, ..patience(1) };
        let found = answers("m", later, &[7, 8, 9], &mut stubborn(&mut calls)).unwrap();
        assert!(found.len() == 3 && found.iter().all(Result::is_err));
    }

    #[test]
    fn a_wrong_setting_ends_the_run_at_once() {
        let mut n_calls = 0;
        let outcome = answers("m", patience(5), &[1, 2], &mut |asks: &[i32]| {
            n_calls += 1;
            asks.iter().map(|&ask| if ask == 1 { Ok(1) } else { Err(invalid("no such object")) }).collect()
        });
        assert!(is_invalid(&outcome.unwrap_err()));
        assert_eq!(n_calls, 1);
    }

    #[test]
    fn asks_that_were_broken_off_have_not_failed() {
        let interrupt = Interrupt::default();
        interrupt.request();
        let outcome = answers("m", patience(5), &[1, 2], &mut |asks: &[i32]| {
            asks.iter().map(|&ask| if ask == 1 { Ok(1) } else { interrupt.check().map(|()| ask) }).collect()
        });
        assert!(is_interrupted(&outcome.unwrap_err()));
    }
}

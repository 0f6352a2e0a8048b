//! Prompts from an endpoint on the loopback: what goes wrong is waited for, asked again, or given up and counted, and no key is
//! ever shown.

#[path = "../harness/mod.rs"]
mod harness;
#[path = "../harness/http.rs"]
mod http;
mod pipeline;
mod server;
mod verbs;

use std::time::{Duration, Instant};

use anyhow::Result;
use jedi::interrupt::Interrupt;
use jedi::invalid::is_invalid;
use jedi::synth::chat::{ChatPrompter, Endpoint, EndpointSettings, Store, Tally};
use jedi::synth::stage::{PromptAsk, Prompter as _, Prompts};
use server::{Act, Server};

const KEY: &str = "sk-very-secret";
const MUG: PromptAsk = PromptAsk { object: "coffee mug", n_scenes: 2, seed: 7 };

fn settings(url: String) -> EndpointSettings {
    EndpointSettings {
        url,
        model: "small".into(),
        timeout_secs: 1,
        tries: 3,
        first_wait_secs: 0.01,
        longest_wait_secs: 5,
        ..EndpointSettings::default()
    }
}

fn prompter_of(settings: EndpointSettings, store: Store, interrupt: Interrupt) -> ChatPrompter {
    let key = |name: &str| (name == "OPENAI_API_KEY").then(|| KEY.to_owned());
    ChatPrompter::new(Box::new(Endpoint::new(settings, key, interrupt).expect("settings")), store, 3)
}

fn prompter(server: &Server) -> ChatPrompter {
    prompter_of(settings(server.url()), Store::in_memory(), Interrupt::default())
}

fn mug() -> Prompts {
    Prompts {
        object: "A blue coffee mug.".into(),
        scenes: vec!["A coffee mug in place 0.".into(), "A coffee mug in place 1.".into()],
    }
}

/// One ask's outcome after these acts, and what happened.
fn after(acts: &[Act]) -> (Result<Prompts>, Tally, Server) {
    let server = Server::new(acts);
    let mut prompter = prompter(&server);
    let outcome = prompter.prompts(&[MUG]).remove(0);
    if let Err(error) = &outcome {
        assert!(!format!("{error:#}").contains(KEY) && format!("{error:#}").lines().count() == 1, "{error:#}");
    }
    (outcome, prompter.tally(), server)
}

#[test]
fn the_question_is_openais_and_carries_model_key_and_seed() {
    let (outcome, tally, server) = after(&[]);
    assert_eq!(outcome.unwrap(), mug());
    assert_eq!(tally, Tally { asked: 1, ..Tally::default() });
    let asked = server.log().remove(0);
    assert_eq!(asked.line, "POST /v1/chat/completions");
    assert_eq!(asked.key.as_deref(), Some("Bearer sk-very-secret"));
    assert_eq!((asked.body["model"].as_str(), asked.body["max_tokens"].as_u64()), (Some("small"), Some(800)));
    assert_eq!(asked.body["messages"][0]["role"], "system");
    assert!(asked.body["seed"].as_u64().is_some_and(|seed| seed < 1 << 31));
}

#[test]
fn a_busy_endpoint_is_asked_again_when_it_says() {
    let started = Instant::now();
    let (outcome, tally, server) =
        after(&[Act::Status(429, vec![("retry-after", "1")], r#"{"error": {"message": "slow"}}"#)]);
    assert_eq!(outcome.unwrap(), mug());
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert_eq!((tally.asked, server.log().len()), (1, 2));
    // Longer than the settings allow.
    let (outcome, tally, server) = after(&[Act::Status(429, vec![("retry-after", "3600")], "")]);
    assert!(format!("{:#}", outcome.unwrap_err()).ends_with("answers: too many requests, 1 times"));
    assert_eq!((tally.failed, tally.given_up, server.log().len()), (1, 0, 1));
}

#[test]
fn what_passes_is_tried_again_and_what_stays_is_given_up() {
    let silence = Act::Late(Duration::from_millis(1500));
    let nothing = Act::Status(200, vec![], "<html>welcome</html>");
    let no_choice = Act::Status(200, vec![], r#"{"choices": []}"#);
    for (act, words) in [
        (Act::Status(503, vec![], "overloaded"), "answers: error 503"),
        (silence, "gives no answer within 1 s"),
        (nothing, "answers what is no chat completion"),
        (no_choice, "no chat completion (no choices)"),
        (Act::Breaks, "its answer broke off"),
    ] {
        let (outcome, _, server) = after(&[act.clone(), act.clone()]);
        assert_eq!(outcome.unwrap(), mug(), "{act:?}");
        assert_eq!(server.log().len(), 3);
        let (outcome, tally, server) = after(&[act.clone(), act.clone(), act.clone()]);
        let error = outcome.unwrap_err();
        let message = format!("{error:#}");
        assert!(message.contains(words) && message.ends_with("3 times") && !is_invalid(&error), "{act:?}: {message}");
        assert_eq!((tally.failed, server.log().len()), (1, 3));
    }
}

#[test]
fn an_endpoint_that_is_away_is_given_up() {
    // Nobody listens on the port of a server that is gone.
    let gone = Server::new(&[]).url();
    let mut prompter = prompter_of(settings(gone), Store::in_memory(), Interrupt::default());
    let error = format!("{:#}", prompter.prompts(&[MUG]).remove(0).unwrap_err());
    assert!(error.contains("cannot be reached") && error.ends_with("3 times"), "{error}");
}

#[test]
fn answers_that_are_not_what_was_asked_for_are_asked_again_with_other_words_and_seeds() {
    let (outcome, tally, server) = after(&[
        Act::Says("Sure! Here are your prompts: a mug."),
        Act::Says(r#"{"object": "a coffee mug", "scenes": ["only one mug here"]}"#),
    ]);
    assert_eq!(outcome.unwrap(), mug());
    assert_eq!(tally, Tally { asked: 3, malformed: 2, ..Tally::default() });
    let bodies: Vec<_> = server.log().into_iter().map(|asked| asked.body).collect();
    assert!(bodies[0]["seed"] != bodies[1]["seed"] && bodies[1]["seed"] != bodies[2]["seed"]);
    assert_ne!(bodies[0]["messages"][1], bodies[1]["messages"][1]);
}

#[test]
fn refusals_and_answers_that_are_cut_off_are_counted_and_at_last_given_up() {
    let refusal = Act::Refuses("I cannot help with mugs");
    let (outcome, tally, _) = after(&[refusal.clone(), Act::Ends("length")]);
    assert_eq!(outcome.unwrap(), mug());
    assert_eq!(tally, Tally { asked: 3, refused: 1, cut: 1, ..Tally::default() });
    let (outcome, tally, server) = after(&[Act::Ends("length"), Act::Ends("content_filter"), refusal]);
    let error = outcome.unwrap_err();
    assert_eq!(error.to_string(), "coffee mug: 3 answers, the last was refused (I cannot help with mugs)");
    assert!(!is_invalid(&error));
    assert_eq!(tally, Tally { asked: 3, refused: 2, cut: 1, given_up: 1, ..Tally::default() });
    assert_eq!(server.log().len(), 3);
}

#[test]
fn what_asking_again_cannot_mend_ends_the_run_at_once_with_the_way_out() {
    for (status, body, words) in [
        (
            401,
            r#"{"error": {"message": "bad key sk-very-secret"}}"#,
            "does not accept the key of OPENAI_API_KEY (401: bad key ***)",
        ),
        (
            404,
            r#"{"error": {"message": "no model small"}}"#,
            "has no model small, or is no such endpoint (404: no model small)",
        ),
        (429, r#"{"error": {"message": "pay", "code": "insufficient_quota"}}"#, "its account has nothing left: pay"),
        (307, "", "sends elsewhere (307)"),
    ] {
        let (outcome, _, server) = after(&[Act::Status(status, vec![("location", "http://127.0.0.1:9/")], body)]);
        let error = outcome.unwrap_err();
        assert!(is_invalid(&error) && error.to_string().contains(words), "{error:#}");
        assert_eq!(server.log().len(), 1);
    }
    // About this question alone.
    let (outcome, _, _) = after(&[Act::Status(400, vec![], r#"{"error": {"message": "too long"}}"#)]);
    let error = outcome.unwrap_err();
    assert!(!is_invalid(&error) && error.to_string().ends_with("answers 400: too long"), "{error:#}");
}

#[test]
fn without_a_key_none_is_sent_and_an_endpoint_that_wants_one_is_told_of() {
    let server = Server::new(&[Act::Status(401, vec![], "")]);
    let endpoint = Endpoint::new(settings(server.url()), |_| None, Interrupt::default()).unwrap();
    let mut prompter = ChatPrompter::new(Box::new(endpoint), Store::in_memory(), 3);
    let error = prompter.prompts(&[MUG]).remove(0).unwrap_err();
    assert!(is_invalid(&error) && error.to_string().ends_with("wants a key (401); set OPENAI_API_KEY"), "{error:#}");
    assert_eq!(server.log()[0].key, None);
}

#[test]
fn questions_go_side_by_side_but_not_too_many_and_answers_keep_their_order() {
    let late = vec![Act::Late(Duration::from_millis(50)); 12];
    let server = Server::new(&late);
    let settings = EndpointSettings { concurrency: 3, ..settings(server.url()) };
    let mut prompter = prompter_of(settings, Store::in_memory(), Interrupt::default());
    let objects: Vec<String> = (0..12).map(|index| format!("toy{index}")).collect();
    let asks: Vec<PromptAsk> = objects.iter().map(|object| PromptAsk { object, n_scenes: 1, seed: 1 }).collect();
    for (object, found) in objects.iter().zip(prompter.prompts(&asks)) {
        assert_eq!(found.unwrap().object, format!("A blue {object}."));
    }
    assert!((2..=3).contains(&server.most_at_once()), "{}", server.most_at_once());
}

#[test]
fn a_second_run_asks_only_what_the_first_did_not() {
    let folder = tempfile::tempdir().unwrap();
    let hammer = PromptAsk { object: "hammer", ..MUG };
    let refusal = Act::Refuses("no");
    let server = Server::new(&[refusal.clone(), refusal.clone(), refusal, Act::Status(400, vec![], "")]);
    let run = |model: &str, asks: &[PromptAsk]| {
        let settings = EndpointSettings { model: model.into(), concurrency: 1, ..settings(server.url()) };
        let store = Store::open(folder.path(), "0-of-1").unwrap();
        let mut prompter = prompter_of(settings, store, Interrupt::default());
        let found: Vec<bool> = prompter.prompts(asks).iter().map(Result::is_ok).collect();
        (found, prompter.tally(), server.log().len())
    };
    // The mug is refused thrice; the hammer's question fails, which says nothing of the next time.
    assert_eq!(run("small", &[MUG]).0, [false]);
    assert_eq!(run("small", &[hammer]).0, [false]);
    let (found, tally, n_asked) = run("small", &[MUG, hammer]);
    assert_eq!((found, n_asked), (vec![false, true], 1));
    assert_eq!(tally, Tally { asked: 1, kept: 1, ..Tally::default() });
    assert_eq!(run("small", &[MUG, hammer]).2, 0);
    // Another model, seed or number of scenes is another question.
    assert_eq!(run("large", &[MUG]).2, 1);
    assert_eq!(run("small", &[PromptAsk { seed: 8, ..MUG }, PromptAsk { n_scenes: 3, ..MUG }]).2, 2);
    let kept = std::fs::read_to_string(folder.path().join("0-of-1.jsonl")).unwrap();
    assert!(!kept.contains(KEY) && kept.lines().count() == 5, "{kept}");
}

#[test]
fn an_interrupt_ends_the_waiting() {
    let interrupt = Interrupt::default();
    let server = Server::new(&vec![Act::Status(503, vec![("retry-after", "4")], ""); 9]);
    let mut prompter = prompter_of(settings(server.url()), Store::in_memory(), interrupt.clone());
    let started = Instant::now();
    let waker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        interrupt.request();
    });
    let error = prompter.prompts(&[MUG]).remove(0).unwrap_err();
    assert!(error.to_string().starts_with("interrupted") && started.elapsed() < Duration::from_secs(3), "{error:#}");
    waker.join().unwrap();
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    for (settings, words) in [
        (EndpointSettings { model: "m".into(), ..EndpointSettings::default() }, "is no URL"),
        (EndpointSettings { model: String::new(), ..settings("http://x/v1".into()) }, "which model?"),
        (EndpointSettings { concurrency: 0, ..settings("http://x/v1".into()) }, "at least 1"),
    ] {
        let error = Endpoint::new(settings, |_| None, Interrupt::default()).err().expect("a refusal");
        assert!(is_invalid(&error) && error.to_string().contains(words), "{error:#}");
    }
}

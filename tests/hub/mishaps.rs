//! What goes wrong between us and the hub: it ends in the model, or in one sentence with nothing half-written in use.

use std::fs;
use std::time::Instant;

use jedi::invalid::is_invalid;
use jedi::model::Part;

use crate::server::{self, Mishap};
use crate::{UNET, UNET_BYTES, World, fetch, model, refusal};

fn status(status: u16) -> Mishap {
    Mishap::Status(status, vec![])
}

#[test]
fn a_busy_hub_is_asked_again_when_it_says() {
    let world = World::new();
    world.server.plan("/api/models", 1, Mishap::Status(429, vec![("retry-after", "1".into())]));
    world.server.plan("HEAD /someone/toybox", 2, status(503));
    world.server.plan("/large/unet", 2, status(502));
    let started = Instant::now();
    let (folder, said) = fetch(world.settings(), server::REPOSITORY, Part::ALL).unwrap();
    assert!(started.elapsed().as_secs_f64() >= 1.0, "the hub asked for a second");
    assert_eq!(fs::read(folder.join(UNET)).unwrap(), model()[UNET]);
    assert_eq!(said.len(), 5, "{said:?}");
    assert!(said[0].contains("too many requests; trying again in 1s"), "{said:?}");
}

#[test]
fn a_hub_that_stays_busy_or_asks_for_too_long_is_given_up() {
    let world = World::new();
    world.server.plan("/api/models", 99, status(503));
    let message = refusal(world.fetch());
    assert!(message.contains("error 503") && message.contains("does not hold it"), "{message}");
    assert_eq!(world.server.log().len(), 3);
    let world = World::new();
    world.server.plan("HEAD", 99, Mishap::Status(429, vec![("retry-after", "3600".into())]));
    let message = refusal(world.fetch());
    assert!(message.starts_with("someone/toybox: ") && message.contains("too many requests"), "{message}");
    world.assert_nothing_half();
}

#[test]
fn a_connection_that_is_cut_is_taken_up_where_it_broke() {
    let world = World::new();
    world.server.plan("/large/unet", 2, Mishap::CutAfter(300_000));
    let folder = world.fetch().unwrap();
    assert_eq!(fs::read(folder.join(UNET)).unwrap(), model()[UNET]);
    let ranges: Vec<_> = world
        .server
        .log()
        .into_iter()
        .filter(|asked| asked.line.contains("/large/unet"))
        .map(|asked| asked.range)
        .collect();
    assert_eq!(ranges, [None, Some("bytes=300000-".to_owned()), Some("bytes=600000-".to_owned())]);
    assert!(!world.unfinished_blob(UNET).exists());
}

#[test]
fn a_server_without_ranges_sends_all_again() {
    let world = World::new();
    world.server.plan("/large/unet", 1, Mishap::CutAfter(300_000));
    world.server.plan("/large/unet", 1, Mishap::WholeCutAfter(UNET_BYTES));
    let folder = world.fetch().unwrap();
    assert_eq!(fs::read(folder.join(UNET)).unwrap(), model()[UNET]);
}

#[test]
fn a_body_that_is_always_cut_leaves_its_part_for_the_next_run() {
    let world = World::new();
    world.server.plan("/large/unet", 1, Mishap::CutAfter(300_000));
    // It brings nothing more.
    world.server.plan("/large/unet", 2, Mishap::CutAfter(0));
    let message = refusal(world.fetch());
    assert!(message.contains("300000 of 1000003 bytes are kept, run the same command again"), "{message}");
    assert!(!world.blob(UNET).exists() && world.unfinished_blob(UNET).exists());
    world.assert_nothing_half();
    world.server.log();
    let folder = world.fetch().unwrap();
    assert_eq!(fs::read(folder.join(UNET)).unwrap(), model()[UNET]);
    let asked = world.server.log();
    assert!(asked.iter().any(|asked| asked.range.as_deref() == Some("bytes=300000-")), "{asked:?}");
    assert!(!asked.iter().any(|asked| asked.line.contains("config.json")), "what is there is not asked for again");
}

#[test]
fn an_unfinished_file_that_is_wrong_is_fetched_anew() {
    // Another part than the hub's; all of its bytes, but others; more than there are.
    for leftover in [vec![7; 1000], vec![7; UNET_BYTES], vec![7; UNET_BYTES + 5]] {
        let world = World::new();
        fs::create_dir_all(world.at("blobs")).unwrap();
        fs::write(world.unfinished_blob(UNET), &leftover).unwrap();
        let folder = world.fetch().unwrap();
        assert!(fs::read(folder.join(UNET)).unwrap() == model()[UNET], "{} bytes", leftover.len());
    }
}

#[test]
fn a_file_of_another_size_is_refused() {
    for on in ["/large/unet", "GET /someone/toybox/resolve/0123456789abcdef0123456789abcdef01234567/unet/config.json"] {
        let world = World::new();
        world.server.plan(on, 9, Mishap::Shorter);
        let message = refusal(world.fetch());
        assert!(message.contains("bytes, but") && message.contains("are sent; nothing of it is kept"), "{message}");
        world.assert_nothing_half();
        world.fetch().unwrap_err();
    }
}

#[test]
fn a_file_with_another_checksum_is_refused() {
    for (on, name) in [
        ("/large/unet", UNET),
        ("GET /someone/toybox/resolve/0123456789abcdef0123456789abcdef01234567/unet/config.json", "unet/config.json"),
    ] {
        let world = World::new();
        world.server.plan(on, 1, Mishap::Damaged);
        let message = refusal(world.fetch());
        assert!(message.contains(name) && message.contains("was damaged on its way"), "{message}");
        assert!(!world.blob(name).exists() && !world.unfinished_blob(name).exists());
        world.assert_nothing_half();
        assert_eq!(fs::read(world.fetch().unwrap().join(name)).unwrap(), model()[name]);
    }
}

#[test]
fn a_file_that_is_listed_but_not_there_is_named() {
    let world = World::new();
    world.server.plan(
        "HEAD /someone/toybox/resolve/0123456789abcdef0123456789abcdef01234567/vae/config.json",
        1,
        status(404),
    );
    let message = refusal(world.fetch());
    assert!(message.contains("lists vae/config.json but does not have it"), "{message}");
    world.assert_nothing_half();
}

#[test]
fn models_and_revisions_that_are_not_there_are_the_users_to_mend() {
    let world = World::new();
    let asked = |name: &str| fetch(world.settings(), name, Part::ALL).map(|(folder, _)| folder);
    for (name, message) in [
        (
            "someone/else",
            "someone/else: the hub answers 401: there is no such model, or it is private; check the name, or set HF_TOKEN",
        ),
        ("someone/toybox@v9", "someone/toybox@v9: has no revision v9"),
    ] {
        let error = asked(name).unwrap_err();
        assert!(is_invalid(&error) && error.to_string().starts_with(message), "{error:#}");
    }
    world.server.plan("/api/models", 1, Mishap::Status(403, vec![("x-error-code", "GatedRepo".into())]));
    let message = refusal(world.fetch());
    assert!(message.contains("is a gated model; accept its terms at http://127.0.0.1"), "{message}");
    assert!(!world.at("").exists(), "nothing is left of what is not there");
}

#[test]
fn a_repository_that_is_no_model_says_what_it_lacks() {
    let world = World::new();
    let with = |change: &dyn Fn(&mut server::Model)| {
        let mut changed = model();
        change(&mut changed);
        world.server.push(server::COMMIT, changed);
        refusal(world.fetch())
    };
    let pickle = with(&|model| {
        model.retain(|name, _| !name.starts_with("unet/diff"));
        model.insert("unet/diffusion_pytorch_model.bin".into(), vec![1]);
    });
    assert!(pickle.contains("only the pickle unet/diffusion_pytorch_model.bin"), "{pickle}");
    let single = with(&|model| {
        model.retain(|name, _| !name.contains('/'));
        model.insert("v1-5.safetensors".into(), vec![1]);
    });
    assert!(single.contains("download its single file, such as v1-5.safetensors"), "{single}");
}

#[test]
fn what_is_no_hub_is_told_from_one() {
    let world = World::new();
    world.server.plan("/api/models", 1, Mishap::Status(200, vec![]));
    let message = refusal(world.fetch());
    assert!(message.contains("answers no list of files") && message.contains("is HF_ENDPOINT a hub?"), "{message}");
}

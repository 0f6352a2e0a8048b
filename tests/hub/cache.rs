//! What is kept, and what it is good for without the hub.

use std::fs;

use jedi::invalid::is_invalid;
use jedi::model::Part;

use crate::server::{self, COMMIT};
use crate::{UNET, World, fetch, model, names, refusal};

#[test]
fn the_cache_is_laid_out_as_pythons() {
    let world = World::new();
    let folder = world.fetch().unwrap();
    assert_eq!(folder, world.at("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(world.at("refs/main")).unwrap(), COMMIT);
    let link = fs::read_link(folder.join(UNET)).unwrap();
    assert_eq!(link.to_str(), Some(&*format!("../../../blobs/{}", server::etag(UNET, &model()[UNET]))));
    let link = fs::read_link(folder.join("model_index.json")).unwrap();
    let etag = server::etag("model_index.json", b"{}");
    assert_eq!(link.to_str(), Some(&*format!("../../blobs/{etag}")));
    for name in names(&folder) {
        assert_eq!(fs::read(world.blob(&name)).unwrap(), model()[&name], "{name}");
    }
}

#[test]
fn only_what_is_needed_comes_and_only_once() {
    let world = World::new();
    let asked_for = |parts: &[Part]| {
        let (folder, _) = fetch(world.settings(), server::REPOSITORY, parts).unwrap();
        let got: Vec<_> =
            world.server.log().into_iter().filter(|asked| asked.line.starts_with("GET /large/")).collect();
        (names(&folder), got.into_iter().map(|asked| asked.line).collect::<Vec<_>>())
    };
    let (files, large) = asked_for(&[Part::Vae]);
    assert_eq!(files, ["jedi.json", "model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]);
    assert_eq!(large, ["GET /large/vae/diffusion_pytorch_model.safetensors"]);
    let (files, large) = asked_for(Part::ALL);
    assert_eq!(large, [format!("GET /large/{UNET}"), "GET /large/text_encoder/model.safetensors".to_owned()]);
    let unneeded = ["README.md", "safety_checker", "fp16"];
    assert!(files.iter().all(|file| unneeded.iter().all(|word| !file.contains(word))), "{files:?}");
    assert!(asked_for(Part::ALL).1.is_empty());
}

#[test]
fn offline_the_cache_has_to_do() {
    let world = World::new();
    let offline = |parts: &[Part]| {
        let settings = jedi::model::hub::Settings { is_offline: true, ..world.settings() };
        fetch(settings, server::REPOSITORY, parts).map(|(folder, _)| folder)
    };
    let error = offline(Part::ALL).unwrap_err();
    assert!(is_invalid(&error) && error.to_string().contains("does not hold it, and HF_HUB_OFFLINE"), "{error:#}");
    fetch(world.settings(), server::REPOSITORY, &[Part::Vae]).unwrap();
    world.server.log();
    assert!(offline(&[Part::Vae]).is_ok());
    let message = refusal(offline(Part::ALL));
    assert!(message.contains("holds only some of it (no unet/config.json, no unet/diffusion"), "{message}");
    assert!(world.server.log().is_empty(), "nothing is asked");
}

#[test]
fn a_hub_that_is_away_is_done_without() {
    let mut world = World::new();
    let (settings, folder) = (world.settings(), world.fetch().unwrap());
    // Its port is closed now.
    let elsewhere = server::Server::new(model());
    drop(std::mem::replace(&mut world.server, elsewhere));
    let (again, said) = fetch(settings.clone(), server::REPOSITORY, Part::ALL).unwrap();
    assert_eq!(again, folder);
    assert!(
        said[0].contains("cannot be reached") && said[0].contains("what the cache holds of it is used"),
        "{said:?}"
    );
    let error = fetch(settings, "someone/else", Part::ALL).unwrap_err();
    let message = format!("{error:#}");
    assert!(
        message.contains("cannot be reached") && message.contains("does not hold it; check the network"),
        "{message}"
    );
    assert!(!is_invalid(&error));
}

#[test]
fn a_new_commit_brings_what_has_changed_and_leaves_the_old_one() {
    const NEXT: &str = "ffffffffffffffffffffffffffffffffffffffff";
    let world = World::new();
    let old = world.fetch().unwrap();
    world.server.log();
    let mut changed = model();
    changed.insert("vae/diffusion_pytorch_model.safetensors".into(), vec![5; 3000]);
    world.server.push(NEXT, changed);
    let new = world.fetch().unwrap();
    assert_eq!(new, world.at("snapshots").join(NEXT));
    assert_eq!(fs::read(new.join("vae/diffusion_pytorch_model.safetensors")).unwrap(), [5; 3000]);
    let large: Vec<_> = world.server.log().into_iter().filter(|asked| asked.line.contains("/large/")).collect();
    assert_eq!(large.len(), 1, "{large:?}");
    // The old one by its name, of which nobody need be asked.
    let (pinned, _) = fetch(world.settings(), &format!("{}@{COMMIT}", server::REPOSITORY), Part::ALL).unwrap();
    assert_eq!(pinned, old);
    assert!(world.server.log().is_empty());
}

#[test]
fn an_update_that_breaks_off_leaves_the_old_commit_in_use() {
    let mut world = World::new();
    let old = world.fetch().unwrap();
    let mut changed = model();
    changed.insert(UNET.into(), vec![5; 3000]);
    world.server.push("ffffffffffffffffffffffffffffffffffffffff", changed);
    world.server.plan("/large/unet", 9, server::Mishap::CutAfter(0));
    world.fetch().unwrap_err();
    world.server = server::Server::new(model());
    let settings = jedi::model::hub::Settings { is_offline: true, ..world.settings() };
    assert_eq!(fetch(settings, server::REPOSITORY, Part::ALL).unwrap().0, old);
}

#[test]
fn a_blob_that_was_cut_behind_our_back_is_replaced() {
    let world = World::new();
    let folder = world.fetch().unwrap();
    fs::remove_file(folder.join(UNET)).unwrap();
    fs::write(world.blob(UNET), "half").unwrap();
    let folder = world.fetch().unwrap();
    assert!(fs::read(folder.join(UNET)).unwrap() == model()[UNET]);
}

//! Single files of Stable Diffusion XL: their pictures, their second tokenizer, and what is refused.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use jedi::model::files::read_safetensors;
use jedi::model::write::write_tensors;

use crate::model::{XL, tokenizer};
use crate::room::Room;
use crate::{context, convert, describe, done, jedi, networks};

/// The model as a folder, as a file of jedi's, and as a file from elsewhere.
fn all(room: &Room) -> [String; 3] {
    let [own, file, bare] = ["own", "file.safetensors", "bare.safetensors"].map(|name| room.path(name));
    XL.write(Path::new(&own));
    done(&convert(&own, &file, &[]));
    XL.without_metadata(&file, &bare);
    [own, file, bare]
}

#[test]
fn a_single_file_of_xl_gives_the_pictures_of_its_folder() {
    let room = Room::new();
    let [own, file, bare] = all(&room);
    let picture = |model: &str, name: &str, flags: &[&str]| {
        let out = room.path(name);
        let args = ["sample", "--model", model, "--prompt", "a dog", "--steps", "2", "--size", "16", "--out", &out];
        done(&jedi(args.iter().chain(flags)));
        image::open(out).expect("a picture").into_rgb8()
    };
    let expected = picture(&own, "own.png", &[]);
    assert_eq!(picture(&file, "file.png", &[]), expected);
    assert_eq!(picture(&bare, "bare.png", &["--tokenizer", &tokenizer()]), expected);
    let half = room.path("half.safetensors");
    done(&convert(&bare, &half, &["--tokenizer", &tokenizer(), "--dtype", "f16"]));
    assert!(describe(&half).contains("text_encoder_2: ") && describe(&half).contains("tokenizer: there"));
    let (whole, shards) = (room.path("whole"), room.path("shards"));
    done(&convert(&half, &whole, &[]));
    done(&convert(&half, &shards, &["--max-shard-size", "300KB"]));
    let shards = networks(&crate::folder(&shards));
    assert!(shards.contains_key("text_encoder_2/text_projection.weight"));
    assert_eq!(networks(&crate::folder(&whole)), shards);
}

/// Both text encoders read the same words; the second's texts are filled up with `!`, which the file itself tells.
#[test]
fn a_tokenizer_that_is_named_reaches_both_text_encoders() {
    let room = Room::new();
    let [own, _, bare] = all(&room);
    let expected = context(&room, &own, &[]);
    assert_eq!(context(&room, &bare, &["--tokenizer", &tokenizer()]), expected);
    // A folder that has lost its second tokenizer, and with it what it is filled up with.
    std::fs::remove_dir_all(Path::new(&own).join("tokenizer_2")).expect("the second tokenizer");
    assert_eq!(context(&room, &own, &["--tokenizer", &tokenizer()]), expected);
    let back = room.path("back");
    done(&convert(&own, &back, &["--tokenizer", &tokenizer()]));
    assert_eq!(context(&room, &back, &[]), expected);
}

#[test]
fn files_of_xl_that_cannot_be_sampled_are_refused_with_the_reason() {
    let room = Room::new();
    let [_, _, bare] = all(&room);
    let refused = room.path("refused.safetensors");
    let refusal = |change: &dyn Fn(&mut std::collections::BTreeMap<String, Tensor>)| {
        let mut tensors = read_safetensors(Path::new(&bare)).expect("a file");
        change(&mut tensors);
        write_tensors(Path::new(&refused), &tensors, &[]).expect("a writable folder");
        let out = room.path("out");
        let outcome =
            jedi(["sample", "--model", &refused, "--tokenizer", &tokenizer(), "--prompt", "a", "--out", &out]);
        assert_eq!((outcome.code, outcome.stderr.lines().count()), (Some(2), 1), "{}", outcome.stderr);
        outcome.stderr
    };
    let one = || Tensor::zeros(1, DType::F32, &Device::Cpu).expect("a tensor");
    let refiner = refusal(&|tensors| drop(tensors.insert("conditioner.embedders.0.model.ln_final.bias".into(), one())));
    assert!(refiner.contains("is Stable Diffusion XL's refiner"), "{refiner}");
    let edm = refusal(&|tensors| drop(tensors.insert("edm_mean".into(), one())));
    assert!(edm.contains("noise levels of its own kind (EDM, tensor edm_mean)"), "{edm}");
    let half = refusal(&|tensors| {
        tensors.retain(|name, _| !name.starts_with("conditioner.embedders.1."));
        // Without it the sizes' width is known of the public models alone.
        let label = Tensor::zeros((256, 2816), DType::F32, &Device::Cpu).expect("a tensor");
        tensors.insert("model.diffusion_model.label_emb.0.0.weight".into(), label);
    });
    assert!(half.ends_with("it lacks the second text encoder (conditioner.embedders.1.model.…)\n"), "{half}");
}

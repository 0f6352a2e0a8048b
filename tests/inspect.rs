//! `jedi inspect eps|text|vae|checkpoint` from outside, on a model of random weights.

mod harness;
mod tiny_model;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use harness::{Outcome, jedi};
use jedi::model::files::read_safetensors;
use jedi::model::write::write_tensors;
use jedi::rng::Rng;
use tempfile::TempDir;
use tiny_model::Family;

/// Two sets of three images.
const TOTAL: usize = 6;

struct Room {
    folder: TempDir,
    model: String,
}

impl Room {
    fn new(family: Family) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let model = folder.path().join("model");
        tiny_model::write(&model, family);
        Self { model: model.display().to_string(), folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `inspect eps` on these tensors; the outputs if it went well.
    fn eps(&self, inputs: &BTreeMap<String, Tensor>, set_size: Option<&str>, flags: &[&str]) -> Outcome {
        let (file, outputs) = (self.path("in.safetensors"), self.path("out.safetensors"));
        let metadata: Vec<_> = set_size.map(|size| ("set_size", size.to_owned())).into_iter().collect();
        write_tensors(&file, inputs, &metadata).expect("a writable folder");
        let (file, outputs) = (file.display().to_string(), outputs.display().to_string());
        let args = ["inspect", "eps", "--model", &self.model, "--inputs", &file, "--outputs", &outputs];
        jedi(args.iter().chain(flags))
    }

    fn outputs(&self, outcome: &Outcome) -> BTreeMap<String, Tensor> {
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        let path = self.path("out.safetensors");
        assert_eq!(outcome.stdout.trim(), path.display().to_string());
        read_safetensors(&path).expect("the outputs")
    }
}

fn normal(purpose: &str, shape: &[usize]) -> Tensor {
    Rng::new(2, purpose, 0).normal_tensor(shape).expect("a tensor")
}

fn inputs() -> BTreeMap<String, Tensor> {
    let latents = [TOTAL, 4, 8, 8];
    [
        ("noisy", normal("noisy", &latents)),
        ("mask", Tensor::ones((TOTAL, 1, 8, 8), DType::F32, &Device::Cpu).expect("a tensor")),
        ("reference", normal("reference", &latents)),
        ("timesteps", Tensor::new(&[3i64, 900], &Device::Cpu).expect("a tensor")),
        ("context", normal("context", &[TOTAL, 20, 16])),
        ("noise", normal("noise", &latents)),
    ]
    .map(|(name, tensor)| (name.to_owned(), tensor))
    .into()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|flat| flat.to_vec1()).expect("f32 values")
}

#[test]
fn eps_gives_prediction_loss_and_the_gradient_of_every_parameter() {
    let room = Room::new(Family::Joint);
    let inputs = inputs();
    let outputs = room.outputs(&room.eps(&inputs, Some("3"), &["--grads"]));
    assert_eq!((outputs["eps"].dims(), outputs["loss"].dims()), (&[TOTAL, 4, 8, 8][..], &[1][..]));
    let pairs = values(&outputs["eps"]).into_iter().zip(values(&inputs["noise"]));
    let squares: Vec<f64> = pairs.map(|(eps, noise)| f64::from(eps - noise).powi(2)).collect();
    let loss = squares.iter().sum::<f64>() / squares.len() as f64;
    assert!((f64::from(values(&outputs["loss"])[0]) - loss).abs() < 1e-5 * loss);

    let unet = Path::new(&room.model).join("unet/diffusion_pytorch_model.safetensors");
    let parameters = read_safetensors(&unet).expect("the weights");
    for (name, parameter) in &parameters {
        let gradient = outputs.get(&format!("grad.{name}")).unwrap_or_else(|| panic!("{name} has no gradient"));
        assert_eq!(gradient.dims(), parameter.dims(), "{name}");
        let gradient = values(gradient);
        assert!(gradient.iter().all(|value| value.is_finite()), "{name}");
        assert!(gradient.iter().any(|&value| value != 0.0), "{name}: nothing but zeros");
    }
    assert_eq!(outputs.len(), 2 + parameters.len());
}

/// The gradient must predict how the loss moves when a weight does.
#[test]
fn a_gradient_agrees_with_a_finite_difference() {
    let room = Room::new(Family::Joint);
    let file = Path::new(&room.model).join("unet/diffusion_pytorch_model.safetensors");
    let mut weights: BTreeMap<String, Tensor> = read_safetensors(&file)
        .expect("the weights")
        .into_iter()
        .map(|(name, tensor)| (name, tensor.copy().expect("a copy")))
        .collect();
    let name = "conv_out.bias";
    let gradient = values(&room.outputs(&room.eps(&inputs(), Some("3"), &["--grads"]))[&format!("grad.{name}")])[0];
    let bias = weights[name].clone();
    let mut loss_at = |shift: f32| {
        let shift = Tensor::new(&[shift, 0.0, 0.0, 0.0], &Device::Cpu).expect("a tensor");
        weights.insert(name.to_owned(), (&bias + shift).expect("one shape"));
        write_tensors(&file, &weights, &[]).expect("a writable folder");
        values(&room.outputs(&room.eps(&inputs(), Some("3"), &[]))["loss"])[0]
    };
    let slope = (loss_at(0.1) - loss_at(-0.1)) / 0.2;
    assert!((slope - gradient).abs() < 1e-3 * gradient.abs().max(0.1), "{slope} and {gradient}");
}

#[test]
fn set_size_decides_who_sees_whom() {
    let room = Room::new(Family::Joint);
    let eps = |set_size: &str, timesteps: &[i64]| {
        let mut inputs = inputs();
        inputs.remove("noise");
        inputs.insert("timesteps".into(), Tensor::new(timesteps, &Device::Cpu).expect("a tensor"));
        let outputs = room.outputs(&room.eps(&inputs, Some(set_size), &[]));
        assert_eq!(outputs.len(), 1, "without noise there is no loss");
        values(&outputs["eps"])
    };
    assert_ne!(eps("1", &[7; 6]), eps("3", &[7; 2]));
    assert_ne!(eps("2", &[7; 3]), eps("3", &[7; 2]));
}

#[test]
fn a_plain_model_takes_noisy_alone() {
    let room = Room::new(Family::Plain);
    let mut inputs = inputs();
    inputs.retain(|name, _| !["mask", "reference"].contains(&name.as_str()));
    assert!(room.outputs(&room.eps(&inputs, Some("3"), &[])).contains_key("loss"));
}

#[test]
fn wrong_inputs_are_refused_with_file_and_tensor() {
    let room = Room::new(Family::Joint);
    for name in ["noisy", "mask", "reference", "timesteps", "context"] {
        let mut without = inputs();
        without.remove(name);
        let mut misshapen = inputs();
        misshapen.insert(name.to_owned(), normal("wrong", &[5, 3, 2]));
        for (inputs, message) in [(without, "is missing"), (misshapen, "has shape [5, 3, 2]")] {
            let outcome = room.eps(&inputs, Some("3"), &[]);
            assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""), "{name}");
            let expected = format!("in.safetensors: tensor {name} {message}");
            assert!(outcome.stderr.contains(&expected), "{}", outcome.stderr);
        }
    }
    for (set_size, message) in [
        (None, "metadata set_size is missing"),
        (Some("three"), "metadata set_size is \"three\""),
        (Some("0"), "metadata set_size is \"0\""),
        (Some("4"), "6 images do not divide into sets of 4"),
    ] {
        let outcome = room.eps(&inputs(), set_size, &[]);
        assert_eq!(outcome.code, Some(1));
        assert!(outcome.stderr.contains("in.safetensors: ") && outcome.stderr.contains(message), "{}", outcome.stderr);
    }
    let mut odd = inputs();
    odd.insert("noisy".into(), normal("noisy", &[TOTAL, 4, 7, 8]));
    assert!(room.eps(&odd, Some("3"), &[]).stderr.contains("takes multiples of 2"));
    let mut no_noise = inputs();
    no_noise.remove("noise");
    let outcome = room.eps(&no_noise, Some("3"), &["--grads"]);
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.stderr.contains("tensor noise is missing"), "{}", outcome.stderr);
    let file = room.path("text.safetensors");
    fs::write(&file, "hello").expect("a writable folder");
    let (file, out) = (file.display().to_string(), room.path("out").display().to_string());
    let outcome = jedi(["inspect", "eps", "--model", &room.model, "--inputs", &file, "--outputs", &out]);
    assert!(outcome.stderr.contains("text.safetensors: not a readable safetensors file"), "{}", outcome.stderr);
}

#[test]
fn text_gives_tokens_and_context() {
    let room = Room::new(Family::Joint);
    let out = room.path("out.safetensors").display().to_string();
    let encode = |prompt: &str| {
        let outcome = jedi(["inspect", "text", "--model", &room.model, "--prompt", prompt, "--outputs", &out]);
        let outputs = room.outputs(&outcome);
        assert_eq!((outputs["tokens"].dims(), outputs["context"].dims()), (&[1, 20][..], &[1, 20, 16][..]));
        (
            outputs["tokens"].flatten_all().and_then(|t| t.to_vec1::<i64>()).expect("i64"),
            values(&outputs["context"]),
            outcome.stderr,
        )
    };
    let (tokens, context, stderr) = encode("a robot");
    let (empty, empty_context, _) = encode("");
    assert_eq!(tokens[0], empty[0], "the start token");
    assert!(tokens[3] == empty[1] && !tokens[1..3].contains(&empty[1]), "two words, then the end: {tokens:?}");
    assert!(context != empty_context && stderr.is_empty(), "{stderr}");
    assert!(encode(&"a robot ".repeat(20)).2.contains("too long"));
}

/// Two tokenizers that fill up texts in their own ways, contexts side by side, and the pooled text.
#[test]
fn text_of_xl_is_told_by_both_encoders() {
    let room = Room::new(Family::Joint);
    let out = room.path("out.safetensors").display().to_string();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-xl").display().to_string();
    let outputs = room.outputs(&jedi(["inspect", "text", "--model", &model, "--prompt", "a dog", "--outputs", &out]));
    let shapes: Vec<_> = outputs.iter().map(|(name, tensor)| (name.as_str(), tensor.dims())).collect();
    let expected: [(&str, &[usize]); 4] =
        [("context", &[1, 77, 40]), ("text_embeds", &[1, 12]), ("tokens", &[1, 77]), ("tokens_2", &[1, 77])];
    assert_eq!(shapes, expected);
    let tokens = |name: &str| values(&outputs[name].to_dtype(DType::F32).expect("numbers"));
    let (first, second) = (tokens("tokens"), tokens("tokens_2"));
    let end = first.iter().position(|token| *token == first[76]).expect("it is filled up with the end token");
    assert!((3..10).contains(&end) && first[..=end] == second[..=end], "{first:?}, {second:?}");
    assert!(second[end + 1..].iter().all(|token| *token == 0.0), "{second:?}");
    assert!(values(&outputs["text_embeds"]).iter().all(|value| value.is_finite() && *value != 0.0));
}

#[test]
fn vae_gives_latents_and_the_decoded_picture() {
    let room = Room::new(Family::Joint);
    let image = |width: u32, height: u32| {
        let path = room.path("picture.png");
        image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, 9])).save(&path).expect("a file");
        let (path, out) = (path.display().to_string(), room.path("out.safetensors").display().to_string());
        jedi(["inspect", "vae", "--model", &room.model, "--image", &path, "--outputs", &out])
    };
    let outputs = room.outputs(&image(48, 32));
    assert_eq!((outputs["latents"].dims(), outputs["decoded"].dims()), (&[1, 4, 8, 12][..], &[1, 3, 32, 48][..]));
    assert!(outputs.values().all(|tensor| values(tensor).iter().all(|value| value.is_finite())));
    let odd = image(30, 32);
    assert_eq!(odd.code, Some(2));
    assert!(odd.stderr.contains("picture.png: 30×32, but this model takes multiples of 4"), "{}", odd.stderr);
}

#[test]
fn checkpoint_tells_what_kind_of_model_a_folder_holds() {
    for (family, says) in [(Family::Joint, "joint (9 channels:"), (Family::Plain, "plain (4 channels")] {
        let room = Room::new(family);
        let listing = |room: &Room| {
            let outcome = jedi(["inspect", "checkpoint", &room.model]);
            assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
            outcome.stdout
        };
        let bare = listing(&room);
        assert!(bare.contains(says), "{bare}");
        assert!(bare.contains("trained steps: not told") && bare.contains("optimizer state: none"), "{bare}");
        let unet = read_safetensors(&Path::new(&room.model).join("unet/diffusion_pytorch_model.safetensors"));
        let count: usize = unet.expect("the weights").values().map(Tensor::elem_count).sum();
        assert!(bare.contains(&format!("unet: {count} parameters, F32")), "{bare}");
        fs::write(Path::new(&room.model).join("jedi.json"), r#"{"trained_steps": 123}"#).expect("a writable folder");
        let state = [("exp_avg.x".to_owned(), normal("state", &[2]))];
        write_tensors(&Path::new(&room.model).join("state/optimizer.safetensors"), &state.into(), &[]).expect("a file");
        let trained = listing(&room);
        assert!(trained.contains("trained steps: 123") && trained.contains("optimizer state: there"), "{trained}");
    }
}

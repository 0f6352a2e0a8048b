//! The layouts that diffusers and transformers write (shards, half precision, the VAE's old spelling), and the tiny pipelines
//! as single files under Stable Diffusion's own names.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use jedi::device::Runtime;
use jedi::model::convert::{Model, NETWORKS};
use jedi::model::weight_file::read_safetensors;
use jedi::model::{Files, JointUnet, SingleFile, TextConfig, TextEncoder, UnetConfig, Vae, VaeConfig};
use jedi::sha256::sha256_hex;
use jedi::shape::SetShape;

use crate::compare::Comparison;
use crate::golden::{Golden, path};

/// The small networks' folder and what they give, with the tolerance.
fn layout(name: &str) -> (Files, Golden, f64) {
    let cases = Golden::open("layouts/cases");
    let tolerance = cases.fact("tolerance");
    (Files::Folder(path("layouts").join(name)), cases, tolerance)
}

fn eps(files: &Files, cases: &Golden) -> Tensor {
    let config: UnetConfig = files.json("unet/config.json").unwrap();
    let (unet, _) = JointUnet::new(&config, files.params("unet", &Runtime::cpu(), false).unwrap()).unwrap();
    // One timestep, two images: two sets of one.
    let timesteps = Tensor::cat(&[cases.tensor("timesteps"), cases.tensor("timesteps")], 0).unwrap();
    let shape = SetShape { sets: 2, images: 1 };
    unet.forward(cases.tensor("noisy"), &timesteps, cases.tensor("context"), shape).unwrap()
}

#[test]
fn shards_and_half_precision_are_read() {
    let mut comparison = Comparison::default();
    for (name, expected) in [("sharded", "eps"), ("fp16", "eps_fp16"), ("fp16-sharded", "eps_fp16")] {
        let (files, cases, tolerance) = layout(name);
        comparison.tensor(name, &eps(&files, &cases), cases.tensor(expected), tolerance);
    }
    for name in ["fp16", "fp16-sharded"] {
        let (files, cases, tolerance) = layout(name);
        let config: TextConfig = files.json("text_encoder/config.json").unwrap();
        let params = files.params("text_encoder", &Runtime::cpu(), false).unwrap();
        let (text, _) = TextEncoder::new(&config, params).unwrap();
        let context = text.forward(&cases.tensor("tokens").to_dtype(DType::U32).unwrap()).unwrap();
        comparison.tensor(&format!("{name} text"), &context, cases.tensor("context_fp16"), tolerance);
    }
    comparison.finish();
}

#[test]
fn the_old_spelling_of_the_vae_is_read() {
    let (files, cases, tolerance) = layout("old-vae");
    let config: VaeConfig = files.json("vae/config.json").unwrap();
    let (vae, _) = Vae::new(&config, files.params("vae", &Runtime::cpu(), false).unwrap()).unwrap();
    let latents = vae.latents_from_images(cases.tensor("picture")).unwrap();
    let mut comparison = Comparison::default();
    comparison.tensor("latents", &latents, cases.tensor("latents"), tolerance);
    comparison.tensor("decoded", &vae.decode(cases.tensor("latents")).unwrap(), cases.tensor("decoded"), tolerance);
    comparison.finish();
}

/// Writes the model as a single file; its tensors must be bit by bit those that the script made, under its names.
fn check_single_file(files: &Files, digests: &str, n_expected: usize) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    Model::read(files).unwrap().write_single_file(&file, None).unwrap();
    let digests = std::fs::read_to_string(path(digests)).unwrap();
    let digests: BTreeMap<String, (Vec<usize>, String)> = serde_json::from_str(&digests).unwrap();
    let written = read_safetensors(&file).unwrap();
    for (name, tensor) in &written {
        let (shape, sha256) = digests.get(name).unwrap_or_else(|| panic!("{name}: not in the script's file"));
        assert_eq!(tensor.dims(), shape.as_slice(), "{name}");
        let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(sha256_hex(&bytes)[..16], sha256[..], "{name}");
    }
    assert_eq!(written.len(), n_expected);

    let single = SingleFile::open(&file).unwrap();
    for part in NETWORKS.iter().filter(|part| files.contains(&format!("{part}/config.json"))) {
        let (own, expected) = (single.weights(part).unwrap(), files.weights(part).unwrap());
        assert!(own.tensors().keys().eq(expected.tensors().keys()), "{part}");
        for (name, tensor) in expected.load_all().unwrap() {
            let found = own.load(&name).unwrap();
            assert_eq!(found.dims(), tensor.dims(), "{name}");
            let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(flat(&found), flat(&tensor), "{name}");
        }
    }
}

const TINY: &str = "ldm-tiny-pipeline.json";
const TINY_XL: &str = "ldm-tiny-xl.json";

/// Tensors of the script's file below this prefix.
fn n_below(digests: &str, prefix: &str) -> usize {
    let digests = std::fs::read_to_string(path(digests)).unwrap();
    let digests: BTreeMap<String, serde_json::Value> = serde_json::from_str(&digests).unwrap();
    digests.keys().filter(|name| name.starts_with(prefix)).count()
}

#[test]
fn the_tiny_pipeline_becomes_a_single_file_and_comes_back() {
    let n_below = |prefix| n_below(TINY, prefix);
    let networks = n_below("model.diffusion_model.") + n_below("first_stage_model.");
    let pipeline = path("tiny-pipeline");
    let clip = n_below("cond_stage_model.transformer.");
    check_single_file(&Files::Folder(pipeline.clone()), TINY, networks + clip);

    // The same weights with OpenCLIP's activation are written under OpenCLIP's names.
    let folder = tempfile::tempdir().unwrap();
    let sd2 = folder.path().join("sd2");
    Model::read(&Files::Folder(pipeline)).unwrap().write_folder(&sd2, None, None).unwrap();
    let config = sd2.join("text_encoder/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    assert!(text.contains("quick_gelu"));
    std::fs::write(&config, text.replace("quick_gelu", "gelu")).unwrap();
    check_single_file(&Files::Folder(sd2), TINY, networks + n_below("cond_stage_model.model."));
}

/// Its second text encoder is OpenCLIP's with all layers and the projection, which lies the other way round.
#[test]
fn the_tiny_xl_becomes_a_single_file_and_comes_back() {
    let n_all = n_below(TINY_XL, "");
    assert!(
        n_below(TINY_XL, "conditioner.embedders.1.model.") > 30 && n_below(TINY_XL, "conditioner.embedders.0.") > 30
    );
    check_single_file(&Files::Folder(path("tiny-xl")), TINY_XL, n_all);
}

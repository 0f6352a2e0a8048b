//! AutoencoderKL against diffusers: latents, pictures, gradients, and both spellings of the attention layers.

use std::collections::BTreeMap;

use candle_core::Tensor;
use jedi::diffusion::mse;
use jedi::model::{Vae, VaeConfig};
use jedi::ops::backward;

use crate::compare::{Comparison, values};
use crate::golden::{Golden, compare_gradients, gradients, params, pipeline_part};

/// SD1.4's names of the attention layers.
fn old_spelling(tensors: BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let names = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")];
    let rename = |name: String| {
        names.iter().fold(name, |name, (new, old)| {
            name.replace(&format!("attentions.0.{new}."), &format!("attentions.0.{old}."))
        })
    };
    tensors.into_iter().map(|(name, tensor)| (rename(name), tensor)).collect()
}

fn check(spelling: impl Fn(BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor>) {
    let (config, weights) = pipeline_part::<VaeConfig>("vae", "diffusion_pytorch_model");
    let (vae, vars) = Vae::new(&config, params(spelling(weights.tensors), "vae")).unwrap();
    let (cases, expected) = (Golden::open("vae-cases"), Golden::open("vae-gradients"));
    let (tolerance, gradient_tolerance): (f64, f64) = (cases.fact("tolerance"), cases.fact("gradient_tolerance"));
    let mut comparison = Comparison::default();

    let picture = cases.tensor("picture");
    comparison.tensor("encoded", &vae.latents_from_images(picture).unwrap(), cases.tensor("encoded"), tolerance);
    let decoded = vae.decode(cases.tensor("latents")).unwrap();
    comparison.tensor("decoded", &decoded, cases.tensor("decoded"), tolerance);

    let reconstruction = vae.decode_unscaled(&vae.encode(picture).unwrap().mean).unwrap();
    let loss = mse(&reconstruction, picture).unwrap();
    comparison.tensor("loss", &loss.reshape(1).unwrap(), cases.tensor("loss"), tolerance);
    let found = gradients(&vars, &backward(loss).unwrap(), &mut comparison);
    compare_gradients(&mut comparison, &found, &spelling(expected.tensors), gradient_tolerance);
    comparison.finish();
}

#[test]
fn vae_is_diffusers() {
    check(|tensors| tensors);
}

#[test]
fn vae_with_sd14_names_is_the_same() {
    assert!(old_spelling(Golden::open("vae-gradients").tensors).keys().any(|name| name.contains("proj_attn")));
    check(old_spelling);
}

#[test]
fn vae_in_tiles_is_diffusers() {
    let (config, weights) = pipeline_part::<VaeConfig>("vae", "diffusion_pytorch_model");
    let vae = Vae::new(&config, params(weights.tensors, "vae")).unwrap().0;
    let case = Golden::open("vae-tiles");
    let (tile, tolerance) = (case.fact("tile"), case.fact("tolerance"));
    assert_eq!(vae.native_tile(), tile);
    let mut comparison = Comparison::default();
    let encoded = vae.latents_in_tiles(case.tensor("picture"), tile).unwrap();
    comparison.tensor("encoded", &encoded, case.tensor("encoded"), tolerance);
    let decoded = vae.decode_in_tiles(case.tensor("latents"), tile).unwrap();
    comparison.tensor("decoded", &decoded, case.tensor("decoded"), tolerance);
    comparison.finish();
    // A picture that fits in one tile is decoded whole.
    let small = case.tensor("latents").narrow(2, 0, 6).and_then(|x| x.narrow(3, 0, 6)).unwrap().contiguous().unwrap();
    let whole = values(&vae.decode(&small).unwrap());
    assert_eq!(values(&vae.decode_in_tiles(&small, tile).unwrap()), whole);
    assert!(vae.decode_in_tiles(&small, tile + 2).unwrap_err().to_string().contains("multiples of 8"));
}

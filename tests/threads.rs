//! The number of threads may change rounding and nothing else; one number always gives the same bits.

#[allow(dead_code)] // Outcomes; here the tensors are looked at.
mod harness;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use harness::command;
use jedi::model::files::read_safetensors;
use jedi::model::write::write_tensors;
use jedi::rng::Rng;

/// Two sets of two images.
const TOTAL: usize = 4;

/// Prediction, loss and all gradients of the embedded U-Net, computed by so many threads.
fn computed_by(threads: usize, folder: &Path) -> BTreeMap<String, Vec<f32>> {
    let normal = |purpose: &str, shape: &[usize]| Rng::new(6, purpose, 0).normal_tensor(shape).expect("a tensor");
    let shape = [TOTAL, 16, 8, 8];
    let inputs = [
        ("noisy", normal("noisy", &shape)),
        ("mask", Tensor::ones((TOTAL, 1, 8, 8), DType::F32, &Device::Cpu).expect("a tensor")),
        ("reference", normal("reference", &shape)),
        ("timesteps", Tensor::new(&[40i64, 700], &Device::Cpu).expect("a tensor")),
        ("context", normal("context", &[TOTAL, 20, 96])),
        ("noise", normal("noise", &shape)),
    ];
    let (from, to) = (folder.join("in.safetensors"), folder.join("out.safetensors"));
    let inputs = inputs.map(|(name, tensor)| (name.to_owned(), tensor)).into();
    write_tensors(&from, &inputs, &[("set_size", "2".to_owned())]).expect("a writable folder");
    let (from, to) = (from.display().to_string(), to.display().to_string());
    let mut command = command(["inspect", "eps", "--model", "toybox", "--inputs", &from, "--outputs", &to, "--grads"]);
    let threads = threads.to_string();
    let status = command.env("CANDLE_NUM_THREADS", &threads).env("RAYON_NUM_THREADS", &threads).output();
    let output = status.expect("the binary starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let flat = |tensor: Tensor| tensor.flatten_all().and_then(|flat| flat.to_vec1()).expect("f32 values");
    read_safetensors(Path::new(&to)).expect("the outputs").into_iter().map(|(name, t)| (name, flat(t))).collect()
}

#[test]
fn threads_change_rounding_alone_and_one_number_of_them_gives_the_same_bits() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let alone = computed_by(1, folder.path());
    assert!(alone.len() > 150, "prediction, loss and a gradient of every parameter");
    for threads in [2, 4, 16] {
        let several = computed_by(threads, folder.path());
        for (name, expected) in &alone {
            let largest = expected.iter().fold(0f32, |max, v| max.max(v.abs()));
            let error = several[name].iter().zip(expected).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
            // The biases of attention keys have no gradient but rounding; there are none in a U-Net.
            assert!(error <= 2e-5 * largest, "{name} on {threads} threads: {:e}", error / largest);
        }
        let again = computed_by(threads, folder.path());
        assert!(again == several, "{threads} threads: another run, other bits");
    }
}

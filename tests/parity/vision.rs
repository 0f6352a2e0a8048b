//! CLIP's and DINO's picture encoders and SAM against transformers, and how pictures are prepared for them.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, IndexOp as _, Tensor};
use jedi::device::Runtime;
use jedi::model::Files;
use jedi::model::clip_image::ClipImageEncoder;
use jedi::model::dino::DinoEncoder;
use jedi::model::sam::{Sam, SamConfig};
use jedi::model::weights::Weights;
use jedi::model::write::write_tensors;
use jedi::vision::prepare::{CONFIG, Family, Preparation};
use jedi::vision::segmenter::{Logits, enlarged};
use jedi::vision::{ImageEmbedder, ObjectSegmenter, similarity};
use serde_json::Value;

use crate::compare::{Comparison, values};
use crate::drawn;
use crate::golden::Golden;

/// The golden's network as a transformers folder: config, drawn weights, how pictures are prepared.
fn write_folder(case: &Golden, folder: &Path, processing: Option<&Value>) -> Files {
    let shapes: BTreeMap<String, Vec<usize>> = case.fact("shapes");
    write_tensors(&folder.join("model.safetensors"), &drawn::tensors(&shapes), &[]).unwrap();
    std::fs::write(folder.join("config.json"), case.fact::<Value>("config").to_string()).unwrap();
    if let Some(processing) = processing {
        std::fs::write(folder.join(CONFIG), processing.to_string()).unwrap();
    }
    Files::Folder(folder.to_owned())
}

#[test]
fn clip_picture_encoders_are_transformers() {
    let mut comparison = Comparison::default();
    // Of a whole CLIP model, whose other half is not read, and the picture's half saved alone.
    for name in ["whole", "alone"] {
        let (case, folder) = (Golden::open(&format!("clip-{name}")), tempfile::tempdir().unwrap());
        let network = ClipImageEncoder::load(&write_folder(&case, folder.path(), None), &Runtime::cpu()).unwrap();
        let found = network.forward(case.tensor("pixels")).unwrap();
        comparison.tensor(name, &found, case.tensor("vectors"), case.fact("tolerance"));
    }
    comparison.finish();
}

#[test]
fn dino_picture_encoders_are_transformers() {
    let mut comparison = Comparison::default();
    for name in ["first", "second", "gated"] {
        let (case, folder) = (Golden::open(&format!("dino-{name}")), tempfile::tempdir().unwrap());
        let network = DinoEncoder::load(&write_folder(&case, folder.path(), None), &Runtime::cpu()).unwrap();
        for size in ["own", "other"] {
            let found = network.forward(case.tensor(&format!("{size}.pixels"))).unwrap();
            let expected = case.tensor(&format!("{size}.vectors"));
            comparison.tensor(&format!("{name}.{size}"), &found, expected, case.fact("tolerance"));
        }
    }
    comparison.finish();
}

#[test]
fn sam_is_transformers() {
    let case = Golden::open("sam");
    let (config, shapes): (SamConfig, BTreeMap<String, Vec<usize>>) = (case.fact("config"), case.fact("shapes"));
    let network = Sam::new(&config, Weights::in_memory("drawn", drawn::tensors(&shapes)), &Runtime::cpu()).unwrap();
    let [width, height]: [u32; 2] = case.fact("size");
    let folder = tempfile::tempdir().unwrap();
    let files = write_folder(&case, folder.path(), Some(&case.fact("processing")));
    let preparation = Preparation::read(&files, Family::Sam).unwrap();
    let pixels = preparation.tensor(&drawn::picture(width, height), &Device::Cpu).unwrap();
    let (mut comparison, tolerance) = (Comparison::default(), case.fact("tolerance"));
    let encoded = network.encode(&pixels).unwrap();
    comparison.tensor("encoded", &encoded, case.tensor("encoded"), tolerance);
    let boxes: Vec<[f32; 4]> = rows_of_four(case.tensor("scaled"));
    let (masks, quality) = network.masks(&encoded, &boxes).unwrap();
    comparison.tensor("masks", &masks, case.tensor("masks"), tolerance);
    comparison.tensor("quality", &quality, case.tensor("quality"), tolerance);
    comparison.finish();
}

fn rows_of_four(tensor: &Tensor) -> Vec<[f32; 4]> {
    let rows: Vec<Vec<f32>> = tensor.to_vec2().unwrap();
    rows.into_iter().map(|row| row.try_into().unwrap()).collect()
}

/// From picture and boxes to pixels: the mask that the network thinks best, in the picture's size.
#[test]
fn masks_of_things_are_transformers() {
    let (case, folder) = (Golden::open("sam"), tempfile::tempdir().unwrap());
    let files = write_folder(&case, folder.path(), Some(&case.fact("processing")));
    let [width, height]: [u32; 2] = case.fact("size");
    let segmenter = ObjectSegmenter::load(&files, &Runtime::cpu()).unwrap();
    let found = segmenter.masks(&drawn::picture(width, height), &rows_of_four(case.tensor("boxes"))).unwrap();
    let quality: Vec<Vec<f32>> = case.tensor("quality").to_vec2().unwrap();
    let best: Vec<i64> = case.tensor("best").to_vec1().unwrap();
    let n_pixels = (width * height) as usize;
    assert_eq!(found.len(), 3);
    for (i, found) in found.iter().enumerate() {
        assert!((found.score - quality[i][best[i] as usize].clamp(0.0, 1.0)).abs() < 1e-4);
        let expected = values(&case.tensor("chosen").i(i).unwrap());
        let differ =
            found.mask.pixels().zip(&expected).filter(|(found, expected)| f64::from(found.0[0]) / 255.0 != **expected);
        // Where a value is 0 but for rounding, either side is right.
        let n_differ = differ.count();
        assert!(n_differ * 500 <= n_pixels, "mask {i}: {n_differ} of {n_pixels} pixels differ");
        // And from transformers' own values none differs.
        let logits = case.tensor("masks").i((i, best[i] as usize)).unwrap();
        let same = enlarged(&Logits::new(&logits).unwrap(), 64, (64, 40), (width, height));
        let differ = same.pixels().zip(&expected).filter(|(same, expected)| f64::from(same.0[0]) / 255.0 != **expected);
        assert!(differ.count() * 1000 <= n_pixels, "mask {i}, enlarged");
    }
}

#[test]
fn pictures_are_prepared_as_each_processor_does() {
    let case = Golden::open("vision-pictures");
    let settings: BTreeMap<String, Value> = case.fact("settings");
    let mut comparison = Comparison::default();
    let families = [("clip", Family::Clip), ("vit", Family::Vit), ("dinov2", Family::Dinov2), ("sam", Family::Sam)];
    for (name, family) in families {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(CONFIG), settings[name].to_string()).unwrap();
        let preparation = Preparation::read(&Files::Folder(folder.path().to_owned()), family).unwrap();
        for (size, expected) in case.below(&format!("{name}.")) {
            let (width, height) = size.split_once('x').unwrap();
            let picture = drawn::picture(width.parse().unwrap(), height.parse().unwrap());
            let found = preparation.tensor(&picture, &Device::Cpu).unwrap().get(0).unwrap();
            // One level of 255 that is off would be 1.5e-3.
            comparison.tensor(&format!("{name}.{size}"), &found, &expected, 1e-6);
        }
    }
    comparison.finish();
}

/// Whole folders: which network it is, preparation, and vectors whose products are cosines.
#[test]
fn embeddings_are_of_unit_length_and_tell_pictures_apart() {
    let settings: BTreeMap<String, Value> = Golden::open("vision-pictures").fact("settings");
    let pictures = [drawn::picture(61, 40), drawn::picture(61, 40), drawn::picture(40, 61)];
    for (golden, processing) in
        [("clip-whole", Some("clip")), ("dino-first", Some("vit")), ("dino-second", Some("dinov2"))]
    {
        let (case, folder) = (Golden::open(golden), tempfile::tempdir().unwrap());
        let mut processing = processing.map(|name| settings[name].clone()).unwrap();
        processing["crop_size"] = 24.into();
        let files = write_folder(&case, folder.path(), Some(&processing));
        let vectors = ImageEmbedder::load(&files, &Runtime::cpu()).unwrap().vectors(&pictures).unwrap();
        assert!((similarity(&vectors[0], &vectors[1]) - 1.0).abs() < 1e-6);
        assert!(similarity(&vectors[0], &vectors[2]) < 0.999, "{golden}");
        let length = vectors[2].iter().map(|v| v * v).sum::<f32>();
        assert!((length - 1.0).abs() < 1e-5);
    }
}

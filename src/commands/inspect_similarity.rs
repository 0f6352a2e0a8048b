//! `jedi inspect similarity`: how alike pictures are to a network that was trained to tell.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{Device, Tensor};

use super::inspect::read_picture;
use super::models;
use crate::cli::InspectSimilarityArgs;
use crate::device::Runtime;
use crate::invalid::invalid;
use crate::model::write::write_tensors;
use crate::report;
use crate::vision::{ImageEmbedder, similarity};

pub fn run(args: &InspectSimilarityArgs) -> Result<()> {
    if args.images.len() < 2 {
        return Err(invalid("--image: one picture is like nothing; name two or more"));
    }
    let pictures = args.images.iter().map(|path| read_picture(path)).collect::<Result<Vec<_>>>()?;
    let files = models::open_network("--model", &args.model)?;
    let embedder = ImageEmbedder::load(&files, &Runtime::open(args.device.name())?)?;
    let vectors = embedder.vectors(&pictures)?;
    if let Some(outputs) = &args.outputs {
        let stored = Tensor::from_vec(vectors.concat(), (vectors.len(), vectors[0].len()), &Device::Cpu)?;
        let mut named = BTreeMap::from([("vectors".to_owned(), stored)]);
        for (number, picture) in pictures.iter().enumerate() {
            named.insert(format!("pixels.{number}"), embedder.pixels(picture)?);
        }
        write_tensors(outputs, &named, &[])?;
    }
    for (i, a) in vectors.iter().enumerate() {
        for (j, b) in vectors.iter().enumerate().skip(i + 1) {
            let [first, second] = [i, j].map(|number| args.images[number].display());
            report::result(format!("{:.4}  {first}  {second}", similarity(a, b)))?;
        }
    }
    Ok(())
}

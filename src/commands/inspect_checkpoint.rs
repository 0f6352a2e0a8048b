//! `jedi inspect checkpoint`: what a model folder or file is, the tensors of safetensors files by their headers, and the
//! files' hashes.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use safetensors::tensor::Metadata;

use crate::{
    cli::InspectCheckpointArgs,
    invalid::invalid,
    model::{
        Family, Files, SingleFile, UnetConfig,
        convert::NETWORKS,
        family::generation,
        weights::{Stored, Weights},
    },
    report,
    sha256::sha256_of_file,
};

pub fn run(args: InspectCheckpointArgs) -> Result<()> {
    let files = checkpoint_files(&args.path)?;
    let headers = files
        .iter()
        .map(|file| header_of_file(file).with_context(|| file.display().to_string()))
        .collect::<Result<Vec<_>>>()?;
    if let Some((kind, model)) = model_at(&args.path)? {
        report::result(format!("{}: {kind}", args.path.display()))?;
        for line in describe_model(&model)? {
            report::result(format!("  {line}"))?;
        }
    }
    for (file, header) in files.iter().zip(&headers) {
        report::result(format!("{}", file.display()))?;
        for line in describe(header) {
            report::result(format!("  {line}"))?;
        }
        report::result(format!("  {} bytes, sha256 {}", file.metadata()?.len(), sha256_of_file(file)?))?;
    }
    Ok(())
}

/// The model in a folder or in a single file, with what it is; None for other weights.
fn model_at(path: &Path) -> Result<Option<(&'static str, Files)>> {
    if path.is_dir() {
        let model = Files::Folder(path.to_owned());
        let is_model = NETWORKS.iter().any(|part| model.contains(&format!("{part}/config.json")));
        return Ok(is_model.then_some(("model folder", model)));
    }
    // A file that holds no network as Stable Diffusion names them is listed all the same.
    let file = SingleFile::open(path).ok();
    Ok(file.map(|file| ("single file, Stable Diffusion's own layout", Files::Single(file.into()))))
}

/// The file itself, or all safetensors below the folder, by name.
fn checkpoint_files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    if !path.is_dir() {
        return Err(invalid(format!("{}: no such file or folder", path.display())));
    }
    let mut files = Vec::new();
    collect(path, &mut files)?;
    if files.is_empty() {
        return Err(invalid(format!("{}: holds no .safetensors file", path.display())));
    }
    files.sort();
    Ok(files)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("{}", folder.display()))? {
        let entry = entry?;
        let path = entry.path();
        // Links to folders are not followed (a checkpoint's `latest` would list everything twice, a loop would not end);
        // links to files are, since that is how the hub's cache keeps them.
        if entry.file_type()?.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|suffix| suffix == "safetensors") && path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

/// The header, which must account for the whole file; the tensors' values are not read.
fn header_of_file(path: &Path) -> Result<Metadata> {
    /// The format's own limit.
    const MAX_HEADER_BYTES: u64 = 100_000_000;
    let mut file = File::open(path)?;
    let n_file_bytes = file.metadata()?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).context("not a safetensors file: too short")?;
    let n_header_bytes = u64::from_le_bytes(length);
    ensure!(n_header_bytes <= MAX_HEADER_BYTES, "not a safetensors file: no header of {n_header_bytes} bytes");
    let mut json = Vec::new();
    file.take(n_header_bytes).read_to_end(&mut json)?;
    let header: Metadata = serde_json::from_slice(&json).context("not a safetensors file, or its header is damaged")?;
    let n_bytes = 8 + n_header_bytes + header.data_len() as u64;
    ensure!(n_bytes == n_file_bytes, "cut short or overlong: {n_file_bytes} bytes where its header tells of {n_bytes}");
    Ok(header)
}

/// Family, what is predicted, parameters, dtypes and sizes of each part, training so far.
fn describe_model(model: &Files) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    if model.contains("unet/config.json") {
        let config: UnetConfig = model.json("unet/config.json")?;
        let family = Family::of(model, &config)?.describe(&config);
        let generation = generation(&config).map_or(String::new(), |name| format!(", {name}"));
        lines.push(format!("family: {family}{generation}"));
    }
    if model.contains("scheduler/scheduler_config.json") {
        let scheduler: serde_json::Value = model.json("scheduler/scheduler_config.json")?;
        lines.push(format!("prediction: {}", scheduler["prediction_type"].as_str().unwrap_or("epsilon")));
    }
    for part in NETWORKS.iter().filter(|part| model.contains(&format!("{part}/config.json"))) {
        lines.push(match model.weights(part) {
            Ok(weights) => format!("{part}: {}", describe_weights(&weights)),
            Err(error) => format!("{part}: no weights ({error:#})"),
        });
    }
    let has_tokenizer =
        ["vocab.json", "tokenizer.json"].iter().any(|name| model.contains(&format!("tokenizer/{name}")));
    lines.push(format!("tokenizer: {}", if has_tokenizer { "there" } else { "none, needs --tokenizer" }));
    let info = match model.contains("jedi.json") {
        true => model.json("jedi.json")?,
        false => serde_json::Value::Null,
    };
    let steps = info["trained_steps"].as_u64();
    lines.push(format!("trained steps: {}", steps.map_or("not told".to_owned(), |steps| steps.to_string())));
    if let Some(hash) = info["config_hash"].as_str() {
        lines.push(format!("trained by config: {hash}"));
    }
    let state = if model.contains("state/optimizer.safetensors") { "there, training can go on" } else { "none" };
    lines.push(format!("optimizer state: {state}"));
    Ok(lines)
}

fn describe_weights(weights: &Weights) -> String {
    let tensors = || weights.tensors().values();
    let n_values: usize = tensors().map(Stored::n_values).sum();
    let n_bytes: usize = tensors().map(|tensor| tensor.n_values() * tensor.dtype().bitsize() / 8).sum();
    let dtypes: BTreeSet<String> = tensors().map(|tensor| format!("{:?}", tensor.dtype())).collect();
    format!("{n_values} parameters, {}, {:.1} MB", Vec::from_iter(dtypes).join(" and "), n_bytes as f64 / 1e6)
}

/// One line a tensor by name, then the file's metadata and the sum.
fn describe(header: &Metadata) -> Vec<String> {
    let mut tensors: Vec<_> = header.tensors().into_iter().collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let n_values: usize = tensors.iter().map(|(_, info)| info.shape.iter().product::<usize>()).sum();
    let mut lines: Vec<_> =
        tensors.iter().map(|(name, info)| format!("{name} {:?} {:?}", info.dtype, info.shape)).collect();
    let mut metadata: Vec<_> = header.metadata().iter().flatten().collect();
    metadata.sort();
    lines.extend(metadata.iter().map(|(key, value)| format!("metadata {key} = {}", shortened(value))));
    lines.push(format!("{} tensors, {n_values} values", tensors.len()));
    lines
}

/// Metadata on one line; whole files may be in there.
fn shortened(value: &str) -> String {
    const N_SHOWN: usize = 200;
    let line = value.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(N_SHOWN) {
        Some((end, _)) => format!("{}… ({} bytes)", &line[..end], value.len()),
        None => line,
    }
}

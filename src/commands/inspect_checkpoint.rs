//! `jedi inspect checkpoint`: what a model folder holds, and the tensors of safetensors files, read from their headers
//! alone.

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
    model::{Files, UnetConfig},
    report,
};

/// Parts of a model folder that have weights.
const PARTS: [&str; 3] = ["unet", "vae", "text_encoder"];

pub fn run(args: InspectCheckpointArgs) -> Result<()> {
    let files = checkpoint_files(&args.path)?;
    let headers = files
        .iter()
        .map(|file| header_of_file(file).with_context(|| file.display().to_string()))
        .collect::<Result<Vec<_>>>()?;
    if PARTS.iter().any(|part| args.path.join(part).join("config.json").is_file()) {
        for line in describe_model(&args.path, &files, &headers)? {
            report::result(line)?;
        }
    }
    for (file, header) in files.iter().zip(&headers) {
        report::result(format!("{}", file.display()))?;
        for line in describe(header) {
            report::result(format!("  {line}"))?;
        }
    }
    Ok(())
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

/// Family, parameters and dtypes of each part, training so far.
fn describe_model(folder: &Path, files: &[PathBuf], headers: &[Metadata]) -> Result<Vec<String>> {
    let model = Files::Folder(folder.to_owned());
    let mut lines = vec![format!("{}: model folder", folder.display())];
    if model.contains("unet/config.json") {
        let config: UnetConfig = model.json("unet/config.json")?;
        let (inputs, c) = (config.in_channels, config.latent_channels());
        lines.push(if config.is_joint() {
            format!("  family: joint ({inputs} channels: noisy {c}, mask 1, reference {c})")
        } else if inputs == c {
            format!("  family: plain ({inputs} channels, as Stable Diffusion)")
        } else {
            format!("  family: unknown ({inputs} channels in, {c} out)")
        });
    }
    for part in PARTS {
        let own: Vec<&Metadata> =
            files.iter().zip(headers).filter(|(file, _)| file.starts_with(folder.join(part))).map(|(_, h)| h).collect();
        let tensors = || own.iter().flat_map(|header| header.tensors().into_values());
        let n_values: usize = tensors().map(|info| info.shape.iter().product::<usize>()).sum();
        let dtypes: BTreeSet<String> = tensors().map(|info| format!("{:?}", info.dtype)).collect();
        lines.push(match own.is_empty() {
            true => format!("  {part}: no weights"),
            false => format!("  {part}: {n_values} parameters, {}", Vec::from_iter(dtypes).join(" and ")),
        });
    }
    let steps = match model.contains("jedi.json") {
        true => model.json::<serde_json::Value>("jedi.json")?["trained_steps"].as_u64(),
        false => None,
    };
    lines.push(format!("  trained steps: {}", steps.map_or("not told".to_owned(), |steps| steps.to_string())));
    let state = if model.contains("state/optimizer.safetensors") { "there, training can go on" } else { "none" };
    lines.push(format!("  optimizer state: {state}"));
    Ok(lines)
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
    lines.extend(metadata.iter().map(|(key, value)| format!("metadata {key} = {value}")));
    lines.push(format!("{} tensors, {n_values} values", tensors.len()));
    lines
}

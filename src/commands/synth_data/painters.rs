//! The Stable Diffusion models that a config names: who paints collages and scenes, who changes styles.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use candle_core::DType;

use crate::commands::{downloads, models};
use crate::device::Runtime;
use crate::diffusion::Guidance;
use crate::interrupt::Interrupt;
use crate::invalid::invalid;
use crate::model::hub::{commit_of_snapshot, needed};
use crate::model::{Family, Files, HubName, Part, UnetConfig};
use crate::sample::{Editor, Pipeline, Rounds, Sides};
use crate::sha256::{sha256_hex, sha256_of_file};
use crate::synth::painting::{
    COLLAGES_VERSION, CollageModel, Manner, PipelinePainter, SCENES_VERSION, STYLES, STYLES_VERSION, StyleModel,
};
use crate::synth::settings::{NumberFormat, SynthConfig};
use crate::synth::stage::{CollagePainter, Inpainter, Styler};
use crate::synth::tool::{Model, Tool};

/// Memory that a picture on its way takes besides the weights, in bytes a pixel: seen with a network of SD1.4's size in f32.
const ON_ITS_WAY: u64 = 8_000;
/// Room for a batch of the embedded model's small pictures.
const EMBEDDED_WORK: u64 = 500_000_000;

/// What models that paint are opened with.
#[derive(Clone)]
pub struct Painting {
    runtime: Runtime,
    interrupt: Interrupt,
    is_planned: bool,
}

impl Painting {
    /// In the number format of the config. Downloads nothing where the work is only `is_planned`.
    pub fn new(config: &SynthConfig, runtime: &Runtime, interrupt: &Interrupt, is_planned: bool) -> Result<Self> {
        let dtype = match config.sets.dtype {
            NumberFormat::F32 => DType::F32,
            _ if runtime.device.is_cpu() => {
                return Err(invalid("sets.dtype: bf16 and f16 are for GPUs; on the CPU give f32"));
            }
            NumberFormat::Bf16 => DType::BF16,
            NumberFormat::F16 => DType::F16,
        };
        Ok(Self { runtime: Runtime { dtype, ..runtime.clone() }, interrupt: interrupt.clone(), is_planned })
    }
}

/// The text-to-image model of `collage.model`.
pub fn collages(config: &SynthConfig, painting: &Painting) -> Result<Tool<dyn CollagePainter>> {
    let asked = config.collage.clone();
    let kinds = Kinds {
        taken: &[Family::Plain, Family::Joint],
        in_words: "Stable Diffusion 1, 2 or XL (4 channels) or a jedi model",
    };
    let found = Found::new(("collage.model", &asked.model), COLLAGES_VERSION, kinds, asked.size, painting)?;
    let size = found.size("collage.size", asked.size)?;
    let guidance = Guidance::Joint { scale: asked.guidance };
    let manner = Manner { sampler: asked.sampler, steps: asked.steps, guidance };
    let (model, painting) = (found.model.clone(), painting.clone());
    Ok(Tool::<dyn CollagePainter>::new(model, move || {
        let pipeline = found.load(|files| Pipeline::load(files, &painting.runtime, true))?;
        let size = size.unwrap_or(pipeline.native_size());
        Ok(Box::new(CollageModel::new(pipeline, manner, size, painting.interrupt.clone())))
    }))
}

/// The model of `compose.model`, and the side of its pictures where it is known already.
pub fn scenes(config: &SynthConfig, painting: &Painting) -> Result<(Tool<dyn Inpainter>, Option<usize>)> {
    let asked = config.compose.clone();
    let kinds = Kinds {
        taken: &[Family::Inpainting, Family::Plain, Family::Joint],
        in_words: "one for inpainting (9 channels), Stable Diffusion as it is (4) or a jedi model",
    };
    let found = Found::new(("compose.model", &asked.model), SCENES_VERSION, kinds, asked.size, painting)?;
    let size = found.size("compose.size", asked.size)?;
    let guidance = Guidance::Joint { scale: asked.guidance };
    let manner = Manner { sampler: asked.sampler, steps: asked.steps, guidance };
    let rounds = Rounds { count: asked.rounds, from: asked.rounds_from };
    let (model, painting) = (found.model.clone(), painting.clone());
    let tool = Tool::<dyn Inpainter>::new(model, move || {
        let pipeline = found.load(|files| Pipeline::load(files, &painting.runtime, true))?;
        let size = size.unwrap_or(pipeline.native_size());
        Ok(Box::new(PipelinePainter::new(pipeline, manner, rounds, size, painting.interrupt.clone())))
    });
    Ok((tool, size))
}

/// The InstructPix2Pix model of `stylise.model`, for pictures of `side` pixels where that is known already.
pub fn styles(config: &SynthConfig, side: Option<usize>, painting: &Painting) -> Result<Tool<dyn Styler>> {
    let asked = config.stylise.clone();
    let kinds = Kinds { taken: &[Family::InstructPix2Pix], in_words: "InstructPix2Pix (8 channels)" };
    let at = if asked.size == 0 { side.unwrap_or(0) } else { asked.size };
    let found = Found::new(("stylise.model", &asked.model), STYLES_VERSION, kinds, at, painting)?;
    if asked.size > 0 {
        found.size("stylise.size", asked.size)?;
    } else if let (Some(side), Some(sides)) = (side, found.sides)
        && !sides.fits(side)
    {
        return Err(invalid(format!(
            "stylise.size = 0: compose paints {side} pixels a side, and this model takes multiples of {}; give one, such as {}",
            sides.multiple, sides.native
        )));
    }
    let guidance = Guidance::ImageFirst { text_scale: asked.text_guidance, image_scale: asked.image_guidance };
    let manner = Manner { sampler: asked.sampler, steps: asked.steps, guidance };
    let styles = match asked.styles.is_empty() {
        true => STYLES.map(str::to_owned).to_vec(),
        false => asked.styles.clone(),
    };
    let (model, painting) = (found.model.clone(), painting.clone());
    Ok(Tool::<dyn Styler>::new(model, move || {
        let editor = found.load(|files| Editor::load(files, &painting.runtime))?;
        let words = (asked.instruction.clone(), styles.clone());
        Ok(Box::new(StyleModel::new(editor, manner, asked.size, words, painting.interrupt.clone())))
    }))
}

/// Which networks a stage has a use for.
#[derive(Clone, Copy)]
struct Kinds {
    taken: &'static [Family],
    in_words: &'static str,
}

/// A model that was looked up and not loaded.
struct Found {
    option: &'static str,
    model: Model,
    /// None: on the hub, and the work is only planned.
    files: Option<Files>,
    sides: Option<Sides>,
}

impl Found {
    /// The model that `option` names, which is to paint pictures of `size` pixels (0: its own).
    fn new(
        (option, name): (&'static str, &str),
        version: u32,
        kinds: Kinds,
        size: usize,
        painting: &Painting,
    ) -> Result<Self> {
        let mut model = Model { name: name.to_owned(), version, ..Model::default() };
        if let (true, false, Some(on_hub)) = (painting.is_planned, Path::new(name).exists(), HubName::parse(name)) {
            let plan = downloads::plan(&on_hub, Part::ALL).with_context(|| option)?;
            (model.hash, model.disk_bytes, model.missing_bytes) = (plan.commit, plan.n_bytes, plan.n_missing);
            // Of a size that is not known yet: that of the usual model.
            let side = if size == 0 { 512 } else { size as u64 };
            model.memory_bytes = plan.n_bytes + ON_ITS_WAY * side * side;
            return Ok(Self { option, model, files: None, sides: None });
        }
        let files = models::open_for(option, name, None, Part::ALL)?;
        let config: UnetConfig = files.json("unet/config.json").with_context(|| option)?;
        let family = Family::of(&files, &config).with_context(|| option)?;
        if !kinds.taken.contains(&family) {
            let (is, takes) = (family.describe(&config), kinds.in_words);
            return Err(invalid(format!("{option} {name}: its U-Net is {is}; this stage takes {takes}")));
        }
        let sides = Sides::read(&files).with_context(|| option)?;
        (model.hash, model.disk_bytes) = hashed(&files).with_context(|| option)?;
        let mut n_values = 0;
        for component in ["unet", "vae", "text_encoder", "text_encoder_2"] {
            if files.contains(&format!("{component}/config.json")) {
                let weights = files.weights(component).with_context(|| option)?;
                n_values += weights.tensors().values().map(|tensor| tensor.n_values()).sum::<usize>();
            }
        }
        let side = if size == 0 { sides.native } else { size } as u64;
        let working = if matches!(files, Files::Embedded(_)) { EMBEDDED_WORK } else { ON_ITS_WAY * side * side };
        model.memory_bytes = (n_values * painting.runtime.dtype.size_in_bytes()) as u64 + working;
        Ok(Self { option, model, files: Some(files), sides: Some(sides) })
    }

    /// The side of the pictures that `option` asks for, 0: the model's own; None where that is not known yet.
    fn size(&self, option: &str, asked: usize) -> Result<Option<usize>> {
        match (self.sides, asked) {
            (Some(sides), 0) => Ok(Some(sides.native)),
            (Some(sides), asked) => sides.check(option, asked).map(|()| Some(asked)),
            (None, asked) => Ok(Some(asked).filter(|&asked| asked > 0)),
        }
    }

    fn load<T>(&self, load: impl Fn(&Files) -> Result<T>) -> Result<T> {
        let (option, name) = (self.option, &self.model.name);
        let files = self.files.as_ref().with_context(|| format!("{option} {name}: is not downloaded"))?;
        load(files).with_context(|| option)
    }
}

/// What tells these files from others, and their bytes on disk.
fn hashed(files: &Files) -> Result<(String, u64)> {
    let (mut hashes, mut disk_bytes) = (String::new(), 0);
    let mut add = |name: &str, path: &Path| -> Result<()> {
        disk_bytes += path.metadata().with_context(|| path.display().to_string())?.len();
        hashes += &format!("{name} {}\n", sha256_of_file(path)?);
        Ok(())
    };
    match files {
        Files::Embedded(files) => {
            let hashes: String = files.iter().map(|(name, bytes)| format!("{name} {}\n", sha256_hex(bytes))).collect();
            return Ok((sha256_hex(hashes.as_bytes()), 0));
        }
        Files::Folder(folder) => {
            let listed = files_of(folder)?;
            let read = &mut |file: &str| std::fs::read(folder.join(file)).with_context(|| file.to_owned());
            let needed = needed(&listed, Part::ALL, read)?.files;
            if let Some(commit) = commit_of_snapshot(folder) {
                let sizes = needed.iter().map(|file| Ok(folder.join(file).metadata()?.len()));
                return Ok((commit.to_owned(), sizes.sum::<Result<u64>>()?));
            }
            for file in &needed {
                add(file, &folder.join(file))?;
            }
        }
        Files::Single(file) => add("model", file.path())?,
        Files::WithTokenizer(model, tokenizer) => {
            let (own, n_bytes) = hashed(model)?;
            for file in files_of(tokenizer)?.iter().filter(|file| file.ends_with(".json") || file.ends_with(".txt")) {
                add(file, &tokenizer.join(file))?;
            }
            hashes += &own;
            disk_bytes += n_bytes;
        }
        Files::WithLoras(..) => bail!("a model with adapters has no hash"),
    }
    Ok((sha256_hex(hashes.as_bytes()), disk_bytes))
}

/// The files of a folder and of the folders in it, by their names inside it, sorted.
fn files_of(folder: &Path) -> Result<Vec<String>> {
    let mut files = vec![];
    let mut add = |below: &str| -> Result<Vec<String>> {
        let mut folders = vec![];
        for entry in std::fs::read_dir(folder.join(below)).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            let name = format!("{below}{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() { folders.push(name + "/") } else { files.push(name) }
        }
        Ok(folders)
    };
    for below in add("")? {
        add(&below)?;
    }
    files.sort();
    Ok(files)
}

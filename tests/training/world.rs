//! A world small enough to train in: architecture, autoencoder and configs in a temporary folder, 16×16 pictures.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::Result;
use candle_core::{Device, Tensor};
use jedi::config;
use jedi::data::SetSource;
use jedi::device::Runtime;
use jedi::model::files::read_safetensors;
use jedi::synth::toybox::ToyboxSource;
use jedi::train::objective::Weights;
use jedi::train::trainer;
use jedi::train::{AutoencoderObjective, Hooks, JointObjective, Objective, ObjectiveKind, TrainConfig, train};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::harness::{Outcome, jedi};

/// Pictures like the training pictures, of other toys.
const HELD_OUT: ToyboxSource = ToyboxSource { seed: 99, sets: 2, images: 4, size: 16 };

/// What every world begins with, by the names of the files in it. Made once, for nearly every test has a world of its own.
static FILES: OnceLock<Vec<(PathBuf, Vec<u8>)>> = OnceLock::new();

pub struct World {
    folder: TempDir,
    /// What the runs said of how they go on.
    pub notices: RefCell<Vec<String>>,
}

impl World {
    /// With an architecture and, for the joint objective, an autoencoder that was never trained.
    pub fn new() -> Self {
        let world = Self::empty();
        for (name, content) in FILES.get_or_init(|| files_in(Self::made().folder.path(), Path::new(""))) {
            let path = world.path("").join(name);
            let written = fs::create_dir_all(path.parent().expect("a folder")).and_then(|()| fs::write(path, content));
            written.expect("a file");
        }
        world
    }

    fn empty() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder"), notices: RefCell::default() }
    }

    fn made() -> Self {
        let world = Self::empty();
        world.write_architecture().expect("an architecture");
        let config = world.config(ObjectiveKind::Autoencoder, &[]);
        let objective = world.objective(&config).expect("an autoencoder");
        objective.write(&world.path("autoencoder"), &weights(objective.as_ref())).expect("a model folder");
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The text of a config file.
    pub fn config_text(&self, objective: ObjectiveKind) -> String {
        let root = self.folder.path().display();
        let (name, vae) = match objective {
            ObjectiveKind::Autoencoder => ("autoencoder", String::new()),
            ObjectiveKind::Joint => ("joint", format!("vae = \"{root}/autoencoder\"")),
        };
        format!(
            "objective = \"{name}\"\nseed = 5\n\
             [model]\narchitecture = \"{root}/architecture\"\n{vae}\n\
             [data]\nsource = \"toybox\"\nsets = 6\nsize = 16\n\
             [optimizer]\nlr = 1e-3\nwarmup_steps = 2\nema_decay = 0.9\n\
             [run]\nsteps = 6\nimages_per_step = 12\nvalidate_every = 2\ncheckpoint_every = 0\n"
        )
    }

    pub fn config(&self, objective: ObjectiveKind, overrides: &[&str]) -> TrainConfig {
        let overrides: Vec<String> = overrides.iter().map(|o| o.to_string()).collect();
        config::from_text("tiny.toml", &self.config_text(objective), &overrides).expect("a config")
    }

    /// The config file itself, for the binary.
    pub fn config_file(&self, objective: ObjectiveKind) -> PathBuf {
        let path = self.path("tiny.toml");
        fs::write(&path, self.config_text(objective)).expect("a file");
        path
    }

    pub fn objective(&self, config: &TrainConfig) -> Result<Box<dyn Objective>> {
        let data = &config.data;
        let source = ToyboxSource { seed: data.seed, sets: data.sets, images: data.images, size: data.size };
        let (runtime, source) = (Runtime::cpu(), Arc::new(source));
        Ok(match config.objective {
            ObjectiveKind::Autoencoder => Box::new(AutoencoderObjective::new(config, &runtime, source, &HELD_OUT)?),
            ObjectiveKind::Joint => {
                let held_out: Arc<dyn SetSource> = Arc::new(HELD_OUT);
                Box::new(JointObjective::new(config, &runtime, source, vec![("toys".to_owned(), held_out)])?)
            }
        })
    }

    /// One start of `jedi train`, stopped as Ctrl-C does once `stop_at` steps are made.
    pub fn train(&self, config: &TrainConfig, out: &str, stop_at: Option<u64>) -> Result<trainer::Outcome> {
        let made = std::cell::Cell::new(0);
        let mut objective = self.objective(config)?;
        let hooks = Hooks {
            on_step: &mut |report| made.set(report.step + 1),
            on_notice: &mut |notice| self.notices.borrow_mut().push(notice.to_owned()),
            on_checkpoint: &mut |_, _| Ok(None),
            is_interrupted: &|| stop_at == Some(made.get()),
        };
        train(config, objective.as_mut(), &self.path(out), hooks)
    }

    /// `jedi train`, whose first step breaks the weights: it has said all that it says at the start, and makes no preview,
    /// which would take most of the time.
    pub fn diverge(&self, settings: &[&str]) -> Outcome {
        let [config, out] =
            [self.config_file(ObjectiveKind::Joint), self.path("diverged")].map(|path| path.display().to_string());
        let mut arguments = vec!["train", "--device", "cpu", "--config", &config, "--out", &out];
        let own = ["run.steps=1", "optimizer.lr=1e30", "optimizer.warmup_steps=0"];
        arguments.extend(own.iter().chain(settings).flat_map(|setting| ["--set", setting]));
        let ended = jedi(arguments);
        assert!(ended.code == Some(1) && ended.stderr.contains("the held-out loss after 1 steps"), "{}", ended.stderr);
        ended
    }

    fn write_architecture(&self) -> Result<()> {
        let unet = json!({
            "sample_size": 8, "in_channels": 9, "out_channels": 4, "block_out_channels": [16, 32],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 16, "norm_num_groups": 8
        });
        let text = json!({
            "vocab_size": 636, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 20, "hidden_act": "quick_gelu"
        });
        let vae = json!({
            "sample_size": 16, "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"], "block_out_channels": [16, 16],
            "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8
        });
        for (component, config) in [("unet", unet), ("text_encoder", text), ("vae", vae)] {
            let folder = self.path("architecture").join(component);
            fs::create_dir_all(&folder)?;
            fs::write(folder.join("config.json"), config.to_string())?;
        }
        for component in ["tokenizer", "scheduler"] {
            fs::create_dir_all(self.path("architecture").join(component))?;
            for file in fs::read_dir(shipped(component))? {
                let file = file?;
                fs::copy(file.path(), self.path("architecture").join(component).join(file.file_name()))?;
            }
        }
        Ok(())
    }
}

/// All files below a folder of `root`, by their names in `root`, and what they hold.
fn files_in(root: &Path, folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let names = fs::read_dir(root.join(folder)).expect("a folder").map(|entry| entry.expect("an entry").file_name());
    let below = |path: PathBuf| match root.join(&path).is_dir() {
        true => files_in(root, &path),
        false => vec![(path.clone(), fs::read(root.join(path)).expect("a file"))],
    };
    names.flat_map(|name| below(folder.join(name))).collect()
}

/// A file or folder of the embedded model's architecture.
pub fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/toybox/architecture").join(name)
}

/// The parameters as they are now.
pub fn weights(objective: &dyn Objective) -> Weights {
    let copy = |tensor: &Tensor| tensor.copy().expect("memory").detach();
    objective.parameters().iter().map(|(name, var)| (name.clone(), copy(var))).collect()
}

/// Values of every tensor of a safetensors file, as bits: NaN equals itself.
pub fn bits(path: &Path) -> Vec<(String, Vec<u32>)> {
    let tensors = read_safetensors(path).expect("a checkpoint");
    let values = |tensor: Tensor| -> Result<Vec<f32>> { Ok(tensor.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?) };
    let bits = |tensor| values(tensor).expect("f32").into_iter().map(f32::to_bits).collect();
    tensors.into_iter().map(|(name, tensor)| (name, bits(tensor))).collect()
}

/// Makes the checkpoint one from before there were hashes, so that a test may change its files.
pub fn forget_hashes(checkpoint: &Path) {
    let info = checkpoint.join("jedi.json");
    let mut value: Value = serde_json::from_str(&fs::read_to_string(&info).expect("a checkpoint")).expect("JSON");
    value.as_object_mut().expect("an object").remove("hashes").expect("hashes");
    fs::write(info, value.to_string()).expect("a file");
}

/// The lines of `metrics.jsonl` without the time that the steps took.
pub fn metrics(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("metrics.jsonl")).expect("a record");
    let parse = |line: &str| {
        let mut line: Value = serde_json::from_str(line).expect("a whole line");
        line.as_object_mut().expect("an object").remove("seconds").expect("a duration");
        line
    };
    text.lines().map(parse).collect()
}

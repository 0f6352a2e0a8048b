//! The flags of `jedi convert`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::values;

#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Model folder (diffusers layout), single .safetensors file, OWNER/NAME(@REVISION) on the hub, or `toybox`: the small
    /// model inside this program
    #[arg(long, value_name = "M")]
    pub model: String,
    /// Folder of CLIP's tokenizer (vocab.json, merges.txt), which single files lack [default: `tokenizer/` beside the file]
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// A folder, new or empty, to write in diffusers' layout, or a new .safetensors file, to write in Stable Diffusion's own
    /// (as A1111 and ComfyUI read it)
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// Number format of the weights [default: as they are]
    #[arg(long, value_enum)]
    pub dtype: Option<WeightDtype>,
    /// Split weights of a folder into files of at most this size, such as 5GB [default: no splitting]
    #[arg(long, value_name = "SIZE", value_parser = values::n_bytes)]
    pub max_shard_size: Option<u64>,
    /// Make a joint model of a plain one, to train from: its first layer gets zeros for mask and reference
    #[arg(long)]
    pub joint: bool,
    /// Say what the U-Net predicts, where the model says it wrongly
    #[arg(long, value_enum)]
    pub prediction: Option<Prediction>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WeightDtype {
    F32,
    F16,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Prediction {
    /// The noise: Stable Diffusion 1, and Stable Diffusion 2 base
    Epsilon,
    /// Noise and picture mixed: Stable Diffusion 2 and 2.1 at 768 pixels
    V,
}

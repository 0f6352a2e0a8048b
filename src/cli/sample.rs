//! The flags of `jedi sample`. What may be told by a prompts file or by an earlier picture too has no default here: whoever
//! puts the three together fills it in.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum, builder::RangedU64ValueParser};
use serde::{Deserialize, Serialize};

use super::{Device, Lora, Reference, SteeringArgs, pixels, values};

#[derive(Debug, Args)]
pub struct SampleArgs {
    /// A picture of the subject, with its caption after `=` if it has one; repeat for more pictures.
    /// Without any, the set is made from text alone
    #[arg(long = "ref", value_name = "IMG[=CAPTION]")]
    pub references: Vec<Reference>,
    /// Caption of a reference: the first belongs to the first --ref, and so on; for files with `=` in their name
    #[arg(long = "ref-caption", value_name = "TEXT")]
    pub captions: Vec<String>,
    /// How strongly the other pictures attend to a reference, 1 = as the network would, 0 = not at all: the first belongs to
    /// the first --ref, and so on
    #[arg(long = "ref-weight", value_name = "W", value_parser = values::scale)]
    pub weights: Vec<f64>,
    /// Where the subject is in a reference, a picture that is white there and black elsewhere, of the reference's shape: the
    /// others attend to the white alone. The first belongs to the first --ref; `none` for a reference without one
    #[arg(long = "ref-mask", value_name = "IMG")]
    pub masks: Vec<PathBuf>,
    /// What the new picture shows; repeat for more pictures, each its own set with the references
    #[arg(long = "prompt", value_name = "TEXT", required_unless_present_any = ["prompts_file", "from"])]
    pub prompts: Vec<String>,
    /// What the new pictures are pushed away from, in place of the empty text
    #[arg(long, value_name = "TEXT")]
    pub negative_prompt: Option<String>,
    /// Many pictures, one JSON object a line: `prompt`, and optionally `refs` (`["a.png", {"image": "b.png", "caption":
    /// "a cat", "weight": 0.5, "mask": "c.png"}]`), `seed` and any of `negative_prompt`, `num_images`, `steps`, `sampler`, `karras`, `guidance`, `scale`,
    /// `text_scale`, `image_scale`, `normalise_guidance`, `guidance_rescale`, `size`; what a line leaves out is as the
    /// flags say. The same command again makes what is missing
    #[arg(long, value_name = "F.jsonl", conflicts_with_all = ["prompts", "from", "joint", "grid", "noise", "save_latents"])]
    pub prompts_file: Option<PathBuf>,
    /// Repeat a picture that jedi made, by the settings in it or in the .json beside it; flags given here win
    #[arg(long, value_name = "PICTURE")]
    pub from: Option<PathBuf>,
    /// Model folder (diffusers layout), single .safetensors file, OWNER/NAME(@REVISION) on the hub, or `toybox`: the small
    /// model inside this program [default: toybox]
    #[arg(long, value_name = "M")]
    pub model: Option<String>,
    /// Low-rank adapters (LoRA, a .safetensors file in kohya's or diffusers' naming) to merge into the model, WEIGHT times
    /// [default: 1]; repeat for more files
    #[arg(long = "lora", value_name = "FILE[:WEIGHT]")]
    pub loras: Vec<Lora>,
    /// Folder of CLIP's tokenizer (vocab.json, merges.txt), which single files lack [default: `tokenizer/` beside the file]
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Folder for the pictures, or the path of a .png, .jpg or .webp file when exactly one picture is made
    #[arg(long, value_name = "PATH", default_value = "out")]
    pub out: PathBuf,
    /// Pictures per prompt [default: 1]
    #[arg(long, value_name = "K", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub num_images: Option<usize>,
    /// Make all pictures as one set with the references, instead of one set per picture
    #[arg(long)]
    pub joint: bool,
    #[command(flatten)]
    pub steering: SteeringArgs,
    /// Seed of all random numbers: the same seed gives the same pictures [default: 0]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Side of the pictures in pixels [default: the model's own]
    #[arg(long, value_name = "PX", value_parser = pixels())]
    pub size: Option<usize>,
    /// Also write grid.png: the references beside the results
    #[arg(long)]
    pub grid: bool,
    /// Show the running pictures every N steps, roughly, in preview.png in the folder (X.preview.png beside a single
    /// picture X.png); 0 = not at all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preview_every: usize,
    /// How a reference that is not square becomes square [default: crop]
    #[arg(long, value_enum)]
    pub fit: Option<Fit>,
    /// Keep self-attention inside each picture: the ablation, in which the references cannot be seen
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub uncoupled: Option<bool>,
    /// Where to compute: `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
    /// Number format of the networks [default: f32]
    #[arg(long, value_enum)]
    pub dtype: Option<Dtype>,
    /// Need less memory and more time: branches and pictures one after the other, large pictures through the autoencoder
    /// in tiles
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub low_memory: Option<bool>,
    /// Side of the overlapping tiles in which larger pictures go through the autoencoder, in pixels; 0 = whole pictures
    /// [default: 0; with --low-memory the size that the autoencoder was made for]
    #[arg(long, value_name = "PX")]
    pub vae_tile: Option<usize>,
    /// Print the results to stdout as JSON, one object a line
    #[arg(long)]
    pub json: bool,
    /// Safetensors file to take the noise from instead of --seed: `target [k,c,h,w]`, `reference [steps,n,c,h,w]`,
    /// optional `ancestral [steps,k,c,h,w]`
    #[arg(long, value_name = "FILE")]
    pub noise: Option<PathBuf>,
    /// Safetensors file to write the final latents to: `latents [k,c,h,w]`
    #[arg(long, value_name = "FILE")]
    pub save_latents: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fit {
    /// Keep the centre square
    #[default]
    Crop,
    /// Keep all of it and fill up to a square
    Pad,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dtype {
    #[default]
    F32,
    /// On a GPU: weights and all between the layers in bf16, softmax, norms and sampling in f32. On the CPU: matrix products
    /// of bf16 factors, summed in f32, faster where there is AMX and the same as f32 elsewhere
    Bf16,
    /// On a GPU only: as bf16, more exact but of a smaller range
    F16,
}

//! The flags of `jedi inspect`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, builder::RangedU64ValueParser};

use super::{Device, Point, Reference, pixels, steps, values};

#[derive(Debug, Subcommand)]
pub enum InspectCommand {
    /// Run the U-Net once on given tensors
    Eps(InspectEpsArgs),
    /// Encode a prompt
    Text(InspectTextArgs),
    /// Encode a picture to latents and decode it again
    Vae(InspectVaeArgs),
    /// Describe pictures with BLIP or BLIP-2, as `synth-data` does
    Caption(InspectCaptionArgs),
    /// Have a language model write the prompts of an object, as `synth-data` does
    Prompts(InspectPromptsArgs),
    /// Draw what a place of one picture attends to in the others, and which places correspond (the paper's Figure 5)
    Attention(Box<InspectAttentionArgs>),
    /// Find what a phrase names in a picture (Grounding DINO), cut it out (SAM), and draw both
    Objects(InspectObjectsArgs),
    /// Tell how alike pictures are to CLIP, DINO or DINOv2
    Similarity(InspectSimilarityArgs),
    /// Tell what a model folder or a safetensors file is, and list its tensors
    Checkpoint(InspectCheckpointArgs),
    /// Count what a data set holds, and name what is broken
    Dataset(InspectDatasetArgs),
}

#[derive(Debug, Args)]
pub struct InspectEpsArgs {
    /// Model folder (diffusers layout), single .safetensors file, OWNER/NAME(@REVISION) on the hub, or `toybox`
    #[arg(long, value_name = "M")]
    pub model: String,
    /// Safetensors with `noisy [b·n,c,h,w]`, `mask [b·n,1,h,w]`, `reference [b·n,c,h,w]`, `timesteps [b]` (i64),
    /// `context [b·n,l,d]`, for Stable Diffusion XL also `text_embeds [b·n,p]` and `time_ids [b·n,6]`, optional
    /// `noise [b·n,c,h,w]`, and n in the metadata as `set_size`; a 4-channel U-Net takes neither mask nor reference, an
    /// 8-channel one (InstructPix2Pix) no mask
    #[arg(long, value_name = "FILE")]
    pub inputs: PathBuf,
    /// Safetensors to write: `eps`, with `noise` also `loss [1]`, with --grads also `grad.<parameter>`
    #[arg(long, value_name = "FILE")]
    pub outputs: PathBuf,
    /// Also write the gradient of the loss for every U-Net parameter; needs `noise` in the inputs
    #[arg(long)]
    pub grads: bool,
}

#[derive(Debug, Args)]
pub struct InspectTextArgs {
    /// Model folder (diffusers layout), single .safetensors file, OWNER/NAME(@REVISION) on the hub, or `toybox`
    #[arg(long, value_name = "M")]
    pub model: String,
    /// Folder of CLIP's tokenizer (vocab.json, merges.txt), which single files lack [default: `tokenizer/` beside the file]
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// The text to encode
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// Safetensors to write: `tokens [1,l]`, `context [1,l,d]`, for Stable Diffusion XL also `tokens_2 [1,l]` and the pooled
    /// `text_embeds [1,p]`
    #[arg(long, value_name = "FILE")]
    pub outputs: PathBuf,
}

#[derive(Debug, Args)]
pub struct InspectVaeArgs {
    /// Model folder (diffusers layout), single .safetensors file, OWNER/NAME(@REVISION) on the hub, or `toybox`
    #[arg(long, value_name = "M")]
    pub model: String,
    /// The picture to encode
    #[arg(long, value_name = "IMG")]
    pub image: PathBuf,
    /// Safetensors to write: `latents` (the mean times the scaling factor), `decoded` in [−1, 1]
    #[arg(long, value_name = "FILE")]
    pub outputs: PathBuf,
}

#[derive(Debug, Args)]
pub struct InspectObjectsArgs {
    /// Grounding DINO in transformers' layout: a folder, or OWNER/NAME(@REVISION) on the hub, such as
    /// IDEA-Research/grounding-dino-tiny
    #[arg(long, value_name = "M")]
    pub model: String,
    /// SAM in the same layout, such as facebook/sam-vit-base: what is found is cut out too [default: boxes alone]
    #[arg(long, value_name = "M")]
    pub segmenter: Option<String>,
    /// The picture to look through
    #[arg(long, value_name = "IMG")]
    pub image: PathBuf,
    /// What to look for, such as "a toy"; repeat for more kinds of things
    #[arg(long = "phrase", value_name = "TEXT", required = true)]
    pub phrases: Vec<String>,
    /// Scores below this are not shown, 0 to 1
    #[arg(long, value_name = "S", default_value_t = 0.25, value_parser = values::share)]
    pub threshold: f64,
    /// A word of the phrase belongs to what was found if its own score is above this, 0 to 1
    #[arg(long, value_name = "S", default_value_t = 0.25, value_parser = values::share)]
    pub word_threshold: f64,
    /// The picture with boxes and masks drawn in, a PNG
    #[arg(long, value_name = "FILE", default_value = "objects.png")]
    pub out: PathBuf,
    /// Safetensors to write: `pixels [1,3,h,w]`, `tokens [1,t]`, and what the network went through: `map.N`, `text`, `enhanced_picture`,
    /// `enhanced_text`, `chosen [1,q]`, `chosen_boxes`, `queries`, `logits [1,q,t]`, `boxes [1,q,4]`; what is
    /// printed as `edges [n,4]`, with --segmenter also `masks [n,h,w]` of 0 and 1 and `mask_scores [n]`
    #[arg(long, value_name = "FILE")]
    pub outputs: Option<PathBuf>,
    /// Where to compute: `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
    /// Print one JSON object a thing to stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct InspectCaptionArgs {
    /// Folder of a BLIP or BLIP-2 (with OPT) as transformers writes it, or OWNER/NAME(@REVISION) on the hub, such as
    /// Salesforce/blip-image-captioning-base or Salesforce/blip2-opt-2.7b
    #[arg(long, value_name = "M")]
    pub model: String,
    /// A picture to describe; repeat for more
    #[arg(long = "image", value_name = "IMG", required = true)]
    pub images: Vec<PathBuf>,
    /// Words that each description begins with
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub prompt: String,
    /// Descriptions followed side by side, 1 = greedy
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<usize>::new().range(1..=64))]
    pub beams: usize,
    /// Tokens of the longest description
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub max_tokens: usize,
    /// With beams: above 0 long descriptions gain, below they lose
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    pub length_exponent: f64,
    /// Safetensors to write, for picture N from 0: `pixels.N [1,3,h,w]` as the network sees it, `features.N [1,l,v]`,
    /// `logits.N [1,t,vocabulary]` behind the prompt (of BLIP-2 behind the picture's vectors too), `ids.N [t]` as described
    #[arg(long, value_name = "FILE")]
    pub outputs: Option<PathBuf>,
    /// Where to compute: `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
    /// Print one JSON object a picture to stdout, with its file
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct InspectSimilarityArgs {
    /// CLIP, DINO or DINOv2 in transformers' layout: a folder, or OWNER/NAME(@REVISION) on the hub, such as
    /// openai/clip-vit-large-patch14 or facebook/dinov2-base
    #[arg(long, value_name = "M")]
    pub model: String,
    /// A picture; two or more
    #[arg(long = "image", value_name = "IMG", required = true)]
    pub images: Vec<PathBuf>,
    /// Safetensors to write: `vectors [n,d]`, of unit length, and `pixels.N [1,3,h,w]`, the pictures as the network sees them
    #[arg(long, value_name = "FILE")]
    pub outputs: Option<PathBuf>,
    /// Where to compute: `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
}

#[derive(Debug, Args)]
pub struct InspectPromptsArgs {
    /// A .gguf file of a chat model (Qwen3 or Llama 3), a folder with one, or OWNER/NAME(@REVISION) on the hub, such as
    /// Qwen/Qwen3-4B-GGUF; with --endpoint what that calls its model
    #[arg(long, value_name = "M")]
    pub model: String,
    /// Ask an endpoint that speaks OpenAI's chat completions, such as http://localhost:8000/v1, instead of a file
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Environment variable with the endpoint's key
    #[arg(long, value_name = "NAME", default_value = "OPENAI_API_KEY", requires = "endpoint")]
    pub key_variable: String,
    /// A common noun; repeat for more
    #[arg(long = "object", value_name = "NAME", required = true)]
    pub objects: Vec<String>,
    /// Scenes an object
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = RangedU64ValueParser::<usize>::new().range(1..=20))]
    pub scenes: usize,
    /// How freely words are drawn, 0 to 2
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    pub temperature: f64,
    /// Tokens of the longest answer
    #[arg(long, value_name = "N", default_value_t = 800, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub max_tokens: usize,
    /// Questions an object, until an answer is what was asked for
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = RangedU64ValueParser::<usize>::new().range(1..=20))]
    pub tries: usize,
    /// Seed of all random numbers
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Keep the answers in this folder, and ask only what is not there
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Where to compute: `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
}

#[derive(Debug, Args)]
pub struct InspectCheckpointArgs {
    /// A .safetensors file, or a folder that holds such files at any depth
    pub path: PathBuf,
}

/// Every picture is decoded, as training would; broken samples are named and do not change the exit code.
#[derive(Debug, Args)]
pub struct InspectDatasetArgs {
    /// Folder of samples, .tar, or tars by a pattern such as `data/{00000..00099}.tar`; or a training config (.toml), of
    /// which all sources are looked at by their own rules
    pub place: String,
    /// What a sample is [default: sets]
    #[arg(long, value_enum)]
    pub layout: Option<DatasetLayout>,
    /// Read headers, captions and JSON alone: much faster, but what is broken behind its header goes unseen
    #[arg(long)]
    pub quick: bool,
    /// Write a contact sheet with pictures, captions and all that is broken
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Sets of each source on the contact sheet
    #[arg(long, value_name = "N", default_value_t = 60)]
    pub shown: usize,
    /// Print one JSON object a source to stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DatasetLayout {
    /// Strips of square pictures, or loose numbered pictures
    Sets,
    /// One picture a sample (img2dataset)
    Single,
    /// Folders of frames, or videos
    Clips,
    /// Folders of renders, one an object
    Views,
}

/// A new picture is painted as `jedi sample` would, and the coupled self-attention is heard at one step.
#[derive(Debug, Args)]
pub struct InspectAttentionArgs {
    /// Model folder (diffusers layout), single .safetensors file, OWNER/NAME(@REVISION) on the hub, or `toybox`: the small
    /// model inside this program
    #[arg(long, value_name = "M", default_value = "toybox")]
    pub model: String,
    /// Folder of CLIP's tokenizer (vocab.json, merges.txt), which single files lack [default: `tokenizer/` beside the file]
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// A picture of the subject, with its caption after `=` if it has one; repeat for more pictures
    #[arg(long = "ref", value_name = "IMG[=CAPTION]", required = true)]
    pub references: Vec<Reference>,
    /// What the new picture shows
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// Folder for heat-LAYER.png (the pictures of the set, lit where the point attends) and matches-LAYER.png (the strongest
    /// correspondences between the first reference and the new picture)
    #[arg(long, value_name = "DIR", default_value = "attention")]
    pub out: PathBuf,
    /// The place that attends, in pixels of the picture as it is sampled [default: the middle]
    #[arg(long, value_name = "X,Y")]
    pub point: Option<Point>,
    /// The picture that the point is in, counted from 1 in the order of the set: references first, then the new picture
    /// [default: the new picture]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub image: Option<usize>,
    /// Only layers whose names contain this, such as `up_blocks.1` or `mid_block`; repeat for more [default: all]
    #[arg(long = "layer", value_name = "NAME")]
    pub layers: Vec<String>,
    /// The step that is heard, counted from 1 [default: the middle one]
    #[arg(long, value_name = "K", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub at_step: Option<usize>,
    /// Correspondences drawn
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub matches: usize,
    /// Denoising steps
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = steps())]
    pub steps: usize,
    /// Guidance scale, 1 = no guidance [default: the model's own, else 3]
    #[arg(long, value_name = "λ", value_parser = values::scale)]
    pub scale: Option<f64>,
    /// Seed of all random numbers
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Side of the pictures in pixels [default: the model's own]
    #[arg(long, value_name = "PX", value_parser = pixels())]
    pub size: Option<usize>,
    /// Where to compute: `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
    /// Print one JSON object a layer to stdout: its files, and the share of attention that goes to each picture
    #[arg(long)]
    pub json: bool,
}

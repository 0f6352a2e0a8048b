//! What is written beside a picture: all that makes it again.

use std::path::Path;

use serde_json::{Value, json};

use super::references::Shown;
use crate::cli::{self, SampleArgs};
use crate::diffusion::Guidance;
use crate::sample::SampleSettings;

/// How the pictures of a run came about.
pub struct Story<'a> {
    pub args: &'a SampleArgs,
    pub shown: &'a [Shown],
    pub settings: &'a SampleSettings,
    pub device: String,
}

impl Story<'_> {
    /// All that makes one picture again.
    pub fn of_picture(&self, prompt: &str, seed: u64) -> Value {
        let SampleSettings { steps, guidance, size, .. } = self.settings;
        let reference = |shown: &Shown| json!({"path": shown.path, "sha256": shown.sha256, "caption": shown.caption});
        let guidance = match guidance {
            Guidance::Joint { scale } => json!({"kind": "joint", "scale": scale}),
            Guidance::TextOnly { scale } => json!({"kind": "text-only", "scale": scale}),
            Guidance::TextFirst { text_scale, image_scale } => {
                json!({"kind": "text-first", "text_scale": text_scale, "image_scale": image_scale})
            }
            Guidance::ImageFirst { text_scale, image_scale } => {
                json!({"kind": "image-first", "text_scale": text_scale, "image_scale": image_scale})
            }
        };
        let fit = match self.args.fit {
            cli::Fit::Crop => "crop",
            cli::Fit::Pad => "pad",
        };
        let mut record = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": self.args.model,
            "prompt": prompt,
            "references": self.shown.iter().map(reference).collect::<Vec<_>>(),
            "fit": fit,
            "seed": seed,
            "steps": steps,
            "sampler": "ddim",
            "guidance": guidance,
            "size": size,
            "coupled": !self.args.uncoupled,
            "device": self.device,
            "dtype": match self.args.dtype {
                cli::Dtype::F32 => "f32",
                cli::Dtype::Bf16 => "bf16",
            },
        });
        if self.args.joint {
            record["set"] = json!({"prompts": self.args.prompts, "num_images": self.args.num_images,
                "seed": self.args.seed});
        }
        if let Some(noise) = &self.args.noise {
            record["noise"] = json!(noise);
        }
        record
    }
}

/// A picture on stdout: its path, or all about it.
pub fn line(path: &Path, record: &Value, is_json: bool) -> String {
    let path = path.display().to_string();
    let mut all = json!({ "path": path });
    match (all.as_object_mut(), record.as_object()) {
        (Some(all), Some(record)) if is_json => all.extend(record.clone()),
        _ => return path,
    }
    all.to_string()
}

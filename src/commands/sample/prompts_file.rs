//! A prompts file: one JSON object a line, each a picture or a few.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::asked::Asked;
use super::plan::Wish;
use crate::invalid::invalid;

/// The wishes of all lines; what a line leaves unsaid comes from the flags. Empty lines count nothing.
pub fn read(path: &Path, flags: &Asked) -> Result<Vec<Wish>> {
    let name = path.display();
    if !path.is_file() {
        return Err(invalid(format!("--prompts-file {name}: no such file; check the path")));
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("--prompts-file {name}: cannot be read"))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let wishes = lines.map(|(number, line)| {
        let origin = format!("{name}, line {}", number + 1);
        let asked = checked(line).map_err(|cause| invalid(format!("{origin}: {cause}")))?;
        Ok(Wish { asked: asked.or(flags.clone()), origin: Some(origin) })
    });
    let wishes = wishes.collect::<Result<Vec<_>>>()?;
    if wishes.is_empty() {
        return Err(invalid(format!("--prompts-file {name}: has no line; write one JSON object a line")));
    }
    Ok(wishes)
}

/// A line whose numbers are in the ranges that the flags have.
fn checked(line: &str) -> Result<Asked, String> {
    let asked: Asked = serde_json::from_str(line).map_err(|error| error.to_string())?;
    if asked.prompt.is_none() {
        return Err("has no prompt; give \"prompt\": \"…\" (it may be empty)".into());
    }
    let whole = [("num_images", asked.num_images, 1, usize::MAX), ("steps", asked.steps, 1, 1000)];
    for (field, value, low, high) in whole.into_iter().chain([("size", asked.size, 8, 4096)]) {
        if let Some(value) = value.filter(|value| !(low..=high).contains(value)) {
            let most = if high == usize::MAX { String::new() } else { format!(" and at most {high}") };
            return Err(format!("{field} {value}: must be at least {low}{most}"));
        }
    }
    for (field, value) in [("scale", asked.scale), ("text_scale", asked.text_scale), ("image_scale", asked.image_scale)]
    {
        if let Some(value) = value.filter(|value| *value < 0.0) {
            return Err(format!("{field} {value}: must be 0 or more"));
        }
    }
    match asked.guidance_rescale {
        Some(share) if !(0.0..=1.0).contains(&share) => Err(format!("guidance_rescale {share}: must lie in 0 to 1")),
        _ => Ok(asked),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::invalid::is_invalid;

    fn wishes(text: &str) -> Result<Vec<Wish>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f.jsonl");
        std::fs::write(&path, text).unwrap();
        read(&path, &Asked { steps: Some(9), scale: Some(2.0), ..Asked::default() })
    }

    #[test]
    fn a_line_wins_over_the_flags() {
        let found = wishes("{\"prompt\": \"a\", \"steps\": 3}\n\n{\"prompt\": \"\"}\n").unwrap();
        let asked: Vec<_> = found.iter().map(|wish| (wish.asked.steps, wish.asked.scale)).collect();
        assert_eq!(asked, [(Some(3), Some(2.0)), (Some(9), Some(2.0))]);
        assert!(found[1].origin.as_ref().unwrap().ends_with("f.jsonl, line 3"));
    }

    #[test]
    fn a_wrong_line_is_refused_with_its_number_and_cause() {
        for (line, cause) in [
            ("prompt", "expected"),
            (r#"{"seed": 1}"#, "has no prompt"),
            (r#"{"prompt": "a", "promt": "b"}"#, "promt"),
            (r#"{"prompt": "a", "steps": 0}"#, "steps 0: must be at least 1 and at most 1000"),
            (r#"{"prompt": "a", "num_images": 0}"#, "num_images 0: must be at least 1"),
            (r#"{"prompt": "a", "size": 9999}"#, "size 9999"),
            (r#"{"prompt": "a", "image_scale": -1.0}"#, "image_scale -1: must be 0 or more"),
            (r#"{"prompt": "a", "guidance_rescale": 1.5}"#, "guidance_rescale 1.5"),
            (r#"{"prompt": "a", "sampler": "dpm"}"#, "dpm++"),
        ] {
            let error = wishes(&format!("{{\"prompt\": \"fine\"}}\n{line}\n")).unwrap_err();
            let message = error.to_string();
            assert!(is_invalid(&error) && message.contains("line 2: ") && message.contains(cause), "{message}");
        }
        assert!(wishes(" \n").unwrap_err().to_string().contains("has no line"));
    }
}

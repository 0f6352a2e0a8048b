//! Painting around known parts and changing pictures by instructions, against diffusers' pipelines for it.

use candle_core::Tensor;
use image::{GrayImage, Luma};
use jedi::device::Runtime;
use jedi::diffusion::{Guidance, Sampler};
use jedi::invalid::is_invalid;
use jedi::model::{Family, Files};
use jedi::sample::noise::GivenNoise;
use jedi::sample::{Edit, Editor, Kept, Pipeline, Rounds, SampleSettings, SetRequest};

use crate::compare::{Comparison, values};
use crate::families::copy_folder;
use crate::golden::{Golden, path};
use crate::sampling::pictures;

/// The tiny pipeline without what makes it JeDi's.
fn plain_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&path("tiny-pipeline"), folder.path());
    std::fs::remove_file(folder.path().join("jedi.json")).unwrap();
    folder
}

fn noise(case: &Golden) -> GivenNoise {
    GivenNoise { target: case.tensor("target").clone(), reference: None, ancestral: None }
}

/// What is known of the golden's pictures: its levels are 255 where nothing is.
fn kept(case: &Golden) -> Vec<Kept> {
    let levels = case.tensor("levels");
    let masks = (0..levels.dim(0).unwrap()).map(|idx| {
        let levels = values(&levels.get(idx).unwrap());
        GrayImage::from_fn(16, 16, |x, y| Luma([255 - levels[(y * 16 + x) as usize] as u8]))
    });
    pictures(case.tensor("kept")).into_iter().zip(masks).map(|(image, mask)| Kept { image, mask }).collect()
}

#[test]
fn painting_around_known_parts_is_the_inpainting_pipeline_of_diffusers() {
    let folder = plain_folder();
    let pipeline = Pipeline::load(&Files::Folder(folder.path().to_owned()), &Runtime::cpu(), true).unwrap();
    assert_eq!(pipeline.family(), Family::Inpainting);
    let case = Golden::open("sampling-inpainting");
    let texts: Vec<String> = case.fact("texts");
    let request = |prompt: &String| SetRequest {
        references: vec![],
        prompts: vec![prompt.clone()],
        negative_prompt: String::new(),
        seeds: vec![0],
    };
    let requests: Vec<SetRequest> = texts[1..].iter().map(request).collect();
    let settings = SampleSettings::new(Guidance::Joint { scale: case.fact("scale") }, case.fact("steps"), 16);
    let mut n_steps = 0;
    let mut on_step = || {
        n_steps += 1;
        Ok(())
    };
    let kept = kept(&case);
    let painted =
        pipeline.inpaint(&requests, &kept, &settings, Rounds::ONE, Some(&noise(&case)), &mut on_step).unwrap();
    let mut comparison = Comparison::default();
    comparison.tensor("masked", &painted.latents, case.tensor("masked"), case.fact("tolerance"));
    comparison.finish();
    assert_eq!(n_steps, settings.steps);

    // Each as if it were alone, and an error at a step ends the work.
    let second = noise(&case).of_targets(1, 1).unwrap();
    let alone =
        pipeline.inpaint(&requests[1..], &kept[1..], &settings, Rounds::ONE, Some(&second), &mut || Ok(())).unwrap();
    assert_eq!(values(&alone.latents), values(&painted.latents.narrow(0, 1, 1).unwrap()));
    let stopped = pipeline.inpaint(&requests, &kept, &settings, Rounds::ONE, None, &mut || anyhow::bail!("enough"));
    assert_eq!(stopped.err().unwrap().to_string(), "enough");
}

#[test]
fn edits_are_the_instruct_pix2pix_pipeline_of_diffusers() {
    let folder = plain_folder();
    let files = Files::Folder(folder.path().to_owned());
    let error = Editor::load(&files, &Runtime::cpu()).err().unwrap();
    assert!(is_invalid(&error) && error.to_string().contains("inpainting (9 channels"), "{error}");
    let unet = folder.path().join("unet");
    std::fs::copy(path("unet-edit.safetensors"), unet.join("diffusion_pytorch_model.safetensors")).unwrap();
    let config: serde_json::Value = Golden::open("unet-edit").fact("config");
    std::fs::write(unet.join("config.json"), config.to_string()).unwrap();
    let editor = Editor::load(&files, &Runtime::cpu()).unwrap();
    assert!(Pipeline::load(&files, &Runtime::cpu(), true).is_err(), "it paints nothing without a picture");

    let case = Golden::open("sampling-edit");
    let texts: Vec<String> = case.fact("texts");
    let pictures = pictures(case.tensor("pictures"));
    let edit = |(image, instruction): (_, &String)| Edit { image, instruction: instruction.clone(), seed: 0 };
    let edits: Vec<Edit> = pictures.into_iter().zip(&texts).map(edit).collect();
    let guidance = Guidance::ImageFirst { text_scale: case.fact("text_scale"), image_scale: case.fact("image_scale") };
    let mut comparison = Comparison::default();
    let run = |sampler, edits: &[Edit], noise: &GivenNoise| -> Tensor {
        let settings = SampleSettings { sampler, ..SampleSettings::new(guidance, case.fact("steps"), 16) };
        editor.edit(edits, &settings, Some(noise), &mut || Ok(())).unwrap().latents
    };
    let all = noise(&case);
    for (name, sampler) in [("ddim", Sampler::Ddim), ("euler", Sampler::Euler { is_karras: false })] {
        comparison.tensor(name, &run(sampler, &edits, &all), case.tensor(name), case.fact("tolerance"));
    }
    comparison.finish();
    let (both, second) = (run(Sampler::Ddim, &edits, &all), all.of_targets(1, 1).unwrap());
    let alone = run(Sampler::Ddim, &edits[1..], &second);
    assert_eq!(values(&alone), values(&both.narrow(0, 1, 1).unwrap()));
}

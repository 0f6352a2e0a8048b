//! Names and architectures at the full size of Stable Diffusion 1, 2 and XL, as diffusers' own conversion has them
//! (`scripts/golden/layouts.py`).

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::*;

/// A line of the golden files: part and diffusers' name, LDM's name, LDM's shape.
type Lines = BTreeMap<String, (String, Vec<usize>)>;

fn lines(name: &str) -> Lines {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .flat_map(unfolded)
        .map(|line| {
            let [diffusers, ldm, shape] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
            (diffusers.to_owned(), (ldm.to_owned(), shape.split('x').map(|n| n.parse().unwrap()).collect()))
        })
        .collect()
}

/// `layers.*12.` stands for the layers 0 to 11.
fn unfolded(line: &str) -> Vec<String> {
    let Some((_, rest)) = line.split_once(".*") else { return vec![line.to_owned()] };
    let count = rest.split('.').next().unwrap();
    (0..count.parse::<usize>().unwrap()).map(|i| line.replace(&format!(".*{count}."), &format!(".{i}."))).collect()
}

fn sd1() -> Lines {
    lines("ldm-names-sd1.txt")
}

fn sd2() -> Lines {
    let mut all = sd1();
    all.extend(lines("ldm-names-sd2.txt"));
    all
}

/// The VAE is Stable Diffusion 1's.
fn xl() -> Lines {
    let mut all: Lines = sd1().into_iter().filter(|(name, _)| name.starts_with("vae/")).collect();
    all.extend(lines("ldm-names-xl.txt"));
    all
}

/// Tensors of these shapes that take no memory.
fn file(lines: &Lines) -> Tensors {
    let zero = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
    let tensor = |shape: &[usize]| Stored::from(zero.broadcast_as(shape).unwrap());
    lines.values().map(|(name, shape)| (name.clone(), tensor(shape))).collect()
}

fn shapes(file: &Tensors) -> Shapes {
    file.iter().map(|(name, tensor)| (name.clone(), tensor.shape().to_vec())).collect()
}

/// diffusers' names below `part/`, each with the LDM tensor that it comes from.
fn expected<'a>(lines: &'a Lines, part: &str) -> BTreeMap<&'a str, &'a (String, Vec<usize>)> {
    let prefix = format!("{part}/");
    lines.iter().filter_map(|(name, ldm)| Some((name.strip_prefix(&prefix)?, ldm))).collect()
}

/// Every tensor must have diffusers' name and as many values as LDM's has (a third, where three are in one).
fn check_read(found: &Tensors, lines: &Lines, part: &str) {
    let expected = expected(lines, part);
    assert!(found.keys().eq(expected.keys()), "{part}: names differ");
    for (name, tensor) in found {
        let (ldm, shape) = expected[name.as_str()];
        let parts = if ldm.contains(".in_proj_") { 3 } else { 1 };
        assert_eq!(tensor.n_values() * parts, shape.iter().product::<usize>(), "{name}");
    }
}

fn check_written(written: &Tensors, lines: &Lines, part: &str) {
    let mut rest = written.clone();
    for (name, (ldm, shape)) in expected(lines, part) {
        let tensor = written.get(ldm).unwrap_or_else(|| panic!("{name}: no {ldm}"));
        assert_eq!(tensor.shape(), shape.as_slice(), "{ldm}");
        rest.remove(ldm);
    }
    let extra: Vec<&String> = rest.keys().collect();
    assert!(extra.iter().all(|name| name.starts_with("cond_stage_model.model.transformer.resblocks.23.")), "{extra:?}");
}

fn check_all(lines: &Lines, kinds: &[TextKind]) -> (UnetConfig, VaeConfig, Vec<TextConfig>) {
    let mut file = file(lines);
    // What real files hold besides.
    let leftovers = kinds.iter().flat_map(|kind| match kind {
        TextKind::Clip | TextKind::XlClip => vec![kind.prefix().to_owned() + "text_model.embeddings.position_ids"],
        TextKind::OpenClip => ["logit_scale", "text_projection"].map(|name| kind.prefix().to_owned() + name).into(),
        TextKind::XlOpenClip => vec![kind.prefix().to_owned() + "logit_scale"],
    });
    let others = ["betas", "model_ema.num_updates", "first_stage_model.loss.logvar"].map(str::to_owned);
    for name in leftovers.chain(others) {
        file.insert(name, Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap().into());
    }
    assert_eq!(TextKind::all_in(file.keys()), kinds);
    let shapes = shapes(&file);
    let (unet, vae) = (shapes.unet().unwrap(), shapes.vae().unwrap());
    let (own_unet, own_vae) = (unet_from_ldm(&file, &unet).unwrap(), vae_from_ldm(&file, &vae).unwrap());
    check_read(&own_unet, lines, "unet");
    check_read(&own_vae, lines, "vae");
    check_written(&unet_to_ldm(&own_unet, &unet).unwrap(), lines, "unet");
    check_written(&vae_to_ldm(&own_vae, &vae).unwrap(), lines, "vae");
    let check_text = |kind: &TextKind| {
        let config = shapes.text(*kind).unwrap();
        let own = text_from_ldm(&file, *kind, &config).unwrap();
        check_read(&own, lines, kind.component());
        check_written(&text_to_ldm(&own, *kind, &config).unwrap(), lines, kind.component());
        config
    };
    (unet, vae, kinds.iter().map(check_text).collect())
}

/// The fields of the public models' `config.json` that say anything about the network.
fn assert_has(config: &impl serde::Serialize, expected: &Value) {
    let config = serde_json::to_value(config).unwrap();
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&config[name], value, "{name}");
    }
}

fn unet_of_both() -> Value {
    json!({
        "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
        "down_block_types":
            ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "transformer_layers_per_block": 1, "norm_num_groups": 32, "norm_eps": 1e-5, "flip_sin_to_cos": true,
        "freq_shift": 0.0, "sample_size": 64,
    })
}

#[test]
fn stable_diffusion_1_is_read_from_its_names_and_shapes() {
    let (unet, vae, texts) = check_all(&sd1(), &[TextKind::Clip]);
    assert_has(&unet, &unet_of_both());
    assert_has(&unet, &json!({"attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": false}));
    assert_has(
        &vae,
        &json!({
            "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "in_channels": 3,
            "out_channels": 3, "norm_num_groups": 32, "scaling_factor": 0.18215, "sample_size": 512,
        }),
    );
    assert_has(
        &texts[0],
        &json!({
            "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
        }),
    );
}

#[test]
fn stable_diffusion_2_is_read_from_its_names_and_shapes() {
    let (unet, _, texts) = check_all(&sd2(), &[TextKind::OpenClip]);
    assert_has(&unet, &unet_of_both());
    assert_has(
        &unet,
        &json!({
            "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": true,
        }),
    );
    assert_has(
        &texts[0],
        &json!({
            "vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
            "num_attention_heads": 16, "max_position_embeddings": 77, "hidden_act": "gelu",
        }),
    );
}

#[test]
fn stable_diffusion_xl_is_read_from_its_names_and_shapes() {
    let (unet, vae, texts) = check_all(&xl(), &[TextKind::XlClip, TextKind::XlOpenClip]);
    assert_has(
        &unet,
        &json!({
            "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10], "sample_size": 128,
            "cross_attention_dim": 2048, "use_linear_projection": true, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
            "reverse_transformer_layers_per_block": null,
        }),
    );
    assert_has(&vae, &json!({"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": true}));
    assert_has(
        &texts[0],
        &json!({
            "architectures": ["CLIPTextModel"], "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "hidden_act": "quick_gelu",
        }),
    );
    assert_has(
        &texts[1],
        &json!({
            "architectures": ["CLIPTextModelWithProjection"], "vocab_size": 49408, "hidden_size": 1280,
            "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu",
            "max_position_embeddings": 77, "projection_dim": 1280, "eos_token_id": 2,
        }),
    );
}

/// As files of the U-Net alone have it, the sizes' width is known from the public models.
#[test]
fn a_lone_network_of_xl_is_known_by_the_width_of_what_it_is_told() {
    let lines: Lines = xl().into_iter().filter(|(name, _)| name.starts_with("unet/")).collect();
    let mut file = file(&lines);
    assert_eq!(shapes(&file).unet().unwrap().addition_time_embed_dim, Some(256));
    let other = Tensor::zeros((1280, 2048), DType::F32, &Device::Cpu).unwrap();
    file.insert(format!("{UNET}label_emb.0.0.weight"), other.into());
    let error = shapes(&file).unet().unwrap_err().to_string();
    assert!(error.contains("is told something of 2048 numbers"), "{error}");
}

/// Distilled relatives of Stable Diffusion XL leave layers out.
#[test]
fn transformers_that_differ_inside_a_level_are_named_and_those_that_differ_going_up_are_built() {
    let without = |left_out: &dyn Fn(&str) -> bool| {
        let mut file = file(&xl());
        file.retain(|name, _| !left_out(name));
        shapes(&file).unet()
    };
    let error = without(&|name| name.contains("input_blocks.7.1.transformer_blocks.9.")).unwrap_err().to_string();
    assert!(error.contains("unlike numbers of transformer layers ([9, 10])"), "{error}");
    let error = without(&|name| name.contains("middle_block.1.transformer_blocks.9.")).unwrap_err().to_string();
    assert!(error.contains("the middle of its U-Net has 9 transformer layers"), "{error}");
    let is_last_up = |name: &str| (0..3).any(|i| name.contains(&format!("output_blocks.{i}.1.transformer_blocks.9.")));
    let config = without(&is_last_up).unwrap();
    assert_has(&config, &json!({"reverse_transformer_layers_per_block": [9, 2, 1]}));
}

/// What the public files have: 24 layers, of which the context needs 23. Some converters write 23.
#[test]
fn the_last_layer_of_open_clip_is_left_out_only_if_it_is_there() {
    let lines = sd2();
    let mut file = file(&lines);
    let layers = |file: &Tensors| shapes(file).text(TextKind::OpenClip).unwrap().num_hidden_layers;
    assert_eq!(layers(&file), 23);
    let last: Vec<(String, Stored)> = file
        .iter()
        .filter(|(name, _)| name.contains(".resblocks.22."))
        .map(|(name, tensor)| (name.replace(".22.", ".23."), tensor.clone()))
        .collect();
    assert!(!last.is_empty());
    file.extend(last);
    assert_eq!(layers(&file), 23);
    let config = shapes(&file).text(TextKind::OpenClip).unwrap();
    check_read(&text_from_ldm(&file, TextKind::OpenClip, &config).unwrap(), &lines, "text_encoder");
}

#[test]
fn the_last_layer_of_open_clip_is_written_as_zeros() {
    let lines = sd2();
    let text = shapes(&file(&lines)).text(TextKind::OpenClip).unwrap();
    let one = Tensor::ones((), DType::F32, &Device::Cpu).unwrap();
    let ones = text_from_ldm(&file(&lines), TextKind::OpenClip, &text).unwrap();
    let ones =
        ones.into_iter().map(|(name, tensor)| (name, one.broadcast_as(tensor.shape()).unwrap().into())).collect();
    let written = text_to_ldm(&ones, TextKind::OpenClip, &text).unwrap();
    let mut compared = 0;
    for (name, tensor) in &written {
        let Some(rest) = name.strip_prefix("cond_stage_model.model.transformer.resblocks.23.") else { continue };
        let like = &written[&format!("cond_stage_model.model.transformer.resblocks.22.{rest}")];
        assert_eq!(tensor.shape(), like.shape(), "{name}");
        let sum = |tensor: &Stored| {
            tensor.load(&Device::Cpu).unwrap().flatten_all().unwrap().sum(0).unwrap().to_scalar::<f32>().unwrap()
        };
        if tensor.shape().len() == 1 {
            assert_eq!((sum(tensor), sum(like)), (0.0, like.n_values() as f32), "{name}");
        }
        compared += 1;
    }
    assert_eq!(compared, 12);
}

#[test]
fn clip_without_text_model_in_its_names_is_the_same() {
    let lines = sd1();
    let old: Tensors = file(&lines)
        .into_iter()
        .map(|(name, tensor)| (name.replace("transformer.text_model.", "transformer."), tensor))
        .collect();
    let text = shapes(&old).text(TextKind::Clip).unwrap();
    assert_eq!(text.num_hidden_layers, 12);
    check_read(&text_from_ldm(&old, TextKind::Clip, &text).unwrap(), &lines, "text_encoder");
}

#[test]
fn a_tensor_that_belongs_nowhere_is_named() {
    let mut file = file(&sd1());
    let unet = shapes(&file).unet().unwrap();
    file.insert(format!("{UNET}attic.weight"), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap().into());
    let error = unet_from_ldm(&file, &unet).unwrap_err().to_string();
    assert!(error.starts_with("tensor model.diffusion_model.attic.weight belongs to no"), "{error}");
}

#[test]
fn other_channels_and_other_networks_are_told() {
    let mut file = file(&sd1());
    for channels in [8, 9] {
        let conv = Tensor::zeros((320, channels, 3, 3), DType::F32, &Device::Cpu).unwrap();
        file.insert(format!("{UNET}input_blocks.0.0.weight"), conv.into());
        assert_eq!(shapes(&file).unet().unwrap().in_channels, channels);
    }
    file.retain(|name, _| !name.contains("output_blocks.7."));
    let error = shapes(&file).unet().unwrap_err().to_string();
    assert!(error.contains("laid out in another way"), "{error}");
}

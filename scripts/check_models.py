#!/usr/bin/env python3
"""jedi and diffusers read each other's model files: every family in every layout, on random weights.

    python3 -m venv venv && venv/bin/pip install torch==2.15.0 diffusers==0.36.0 transformers==4.57.6 accelerate pillow
    cargo build --release && venv/bin/python scripts/check_models.py            # small networks, a few minutes
    venv/bin/python scripts/check_models.py --full                              # Stable Diffusion 1.4's size: 15 GB of disk

*read*: a model that diffusers wrote (folder, shards, fp16 files, the VAE's old spelling, a single file under Stable
Diffusion's own names and without metadata), its U-Net, VAE and text encoder run by jedi and by PyTorch.
*written*: the same model written by `jedi convert` (folder, shards, bf16, single file, and back), loaded by diffusers'
`from_pretrained` and `from_single_file`, and run by PyTorch. Errors are shares of the largest output; what is stored in
half precision is compared with the same rounded weights. Exits with 1 if any is too large.
"""

import argparse
import copy
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from golden import layouts, ldm, networks, vocabulary
from golden.vae import old_spelling

TOLERANCE = 1e-4
PROMPT = "a photo of the dog in the garden, with sunglasses"
LEVELS = dict(down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])
SMALL_SD1 = dict(block_out_channels=[32, 64], attention_head_dim=8, cross_attention_dim=64, layers_per_block=1, **LEVELS)
SMALL_SD2 = SMALL_SD1 | dict(block_out_channels=[64, 128], attention_head_dim=[1, 2], use_linear_projection=True)
SMALL_XL = dict(
    block_out_channels=[64, 64, 128],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    attention_head_dim=[1, 1, 2],
    transformer_layers_per_block=[1, 2, 3],
    cross_attention_dim=64 + 128,
    layers_per_block=1,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=32 + 6 * 8,
)
SMALL_VAE = dict(
    block_out_channels=[32, 64],
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    layers_per_block=1,
)
SMALL_TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=1)
SMALL_TEXT_2 = dict(hidden_size=128, intermediate_size=160, num_hidden_layers=3, num_attention_heads=2, projection_dim=32)

# Name: U-Net, text encoders, channels, prediction.
SMALL = {
    "SD1": (SMALL_SD1, "clip", 4, "epsilon"),
    "SD1 inpainting": (SMALL_SD1, "clip", 9, "epsilon"),
    "InstructPix2Pix": (SMALL_SD1, "clip", 8, "epsilon"),
    "SD2": (SMALL_SD2, "open_clip", 4, "epsilon"),
    "SD2-v": (SMALL_SD2, "open_clip", 4, "v_prediction"),
    "SD2 inpainting": (SMALL_SD2, "open_clip", 9, "epsilon"),
    "SDXL": (SMALL_XL, "xl", 4, "epsilon"),
    "SDXL-v": (SMALL_XL, "xl", 4, "v_prediction"),
    "SDXL inpainting": (SMALL_XL, "xl", 9, "epsilon"),
}
PIPELINES = {4: StableDiffusionPipeline, 9: StableDiffusionInpaintPipeline, 8: StableDiffusionInstructPix2PixPipeline}
XL_PIPELINES = {4: StableDiffusionXLPipeline, 9: StableDiffusionXLInpaintPipeline}
OUTPUTS = ("eps", "latents", "decoded", "context", "text_embeds")


PYTORCH_GROUP_NORM = torch.nn.GroupNorm.forward


def exact_group_norm(self, x):
    """PyTorch's sums of a group's values are in f32: the VAE's latents are 1e-5 from f64 then at 512x512, 1e-4 at 1024x1024
    (check_vae.py)."""
    x, weight, bias = (value.double() for value in (x, self.weight, self.bias))
    return torch.nn.functional.group_norm(x, self.num_groups, weight, bias, self.eps).to(self.weight.dtype)


torch.nn.GroupNorm.forward = exact_group_norm


class Model:
    """Networks of random weights and what they give for given inputs."""

    def __init__(self, name, unet, vae, texts, kind, channels, prediction, latent):
        self.name, self.kind, self.channels, self.prediction = name, kind, channels, prediction
        self.latent = latent
        self.pipeline = (XL_PIPELINES if kind == "xl" else PIPELINES)[channels]
        sample_size = 96 if prediction == "v_prediction" else 64
        vae = vae | dict(norm_num_groups=32, sample_size=512)
        if kind == "xl":
            sample_size = 128
            vae |= dict(sample_size=1024, scaling_factor=0.13025)
        unet = unet | dict(in_channels=channels, out_channels=4, sample_size=sample_size, norm_num_groups=32)
        act = "gelu" if kind == "open_clip" else "quick_gelu"
        settings = dict(vocab_size=vocabulary.size(), attn_implementation="eager")
        self.unet = networks.randomised(UNet2DConditionModel(**unet), 11)
        self.vae = networks.randomised(AutoencoderKL(**vae), 12)
        self.texts = {
            "text_encoder": networks.randomised(CLIPTextModel(CLIPTextConfig(**settings, hidden_act=act, **texts[0])), 13)
        }
        if kind == "xl":
            # 2 for the token that ends a text, as the public config has it.
            config = CLIPTextConfig(**settings, hidden_act="gelu", eos_token_id=2, **texts[1])
            self.texts["text_encoder_2"] = networks.randomised(CLIPTextModelWithProjection(config), 14)
        if kind == "open_clip":
            # The spread by which models that predict v are told from the others.
            bias = self.unet.up_blocks[-1].attentions[-1].transformer_blocks[0].norm1.bias
            with torch.no_grad():
                bias.copy_(torch.linspace(-1, 1, len(bias)) * (0.3 if prediction == "v_prediction" else 0.03))

    def parts(self):
        return {"unet": self.unet, "vae": self.vae, **self.texts}

    def single_file(self):
        """Under Stable Diffusion's own names, with the tensors by which XL's files say what they predict."""
        file = {name: value.contiguous() for name, value in ldm.single_file(self.parts(), self.kind).items()}
        if self.kind == "xl" and self.prediction == "v_prediction":
            file["v_pred"] = torch.zeros(0)
        return file

    def scheduler(self):
        return DDIMScheduler.from_config(networks.scheduler().config, prediction_type=self.prediction)

    def inputs(self):
        random = torch.Generator().manual_seed(7)
        normal = lambda *shape: torch.randn(*shape, generator=random)
        h = self.latent
        inputs = {"noisy": normal(1, 4, h, h), "timesteps": torch.tensor([601])}
        inputs["context"] = normal(1, 77, self.unet.config.cross_attention_dim)
        if self.kind == "xl":
            config = self.unet.config
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["text_embeds"] = normal(1, pooled)
            inputs["time_ids"] = torch.tensor([[1024.0, 768.0, 0.0, 16.0, 1024.0, 1024.0]])
        if self.channels > 4:
            inputs["reference"] = normal(1, 4, h, h)
        if self.channels == 9:
            inputs["mask"] = torch.ones(1, 1, h, h)
        return inputs

    def picture(self):
        side = self.latent * self.vae_scale()
        values = torch.rand(side, side, 3, generator=torch.Generator().manual_seed(8)) * 255
        return Image.fromarray(values.to(torch.uint8).numpy(), "RGB")

    def pixels(self):
        """The picture as the VAE takes it."""
        side = self.latent * self.vae_scale()
        values = torch.frombuffer(bytearray(self.picture().tobytes()), dtype=torch.uint8)
        return values.reshape(1, side, side, 3).permute(0, 3, 1, 2).float() / 127.5 - 1

    def vae_scale(self):
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


@torch.no_grad()
def outputs(model, parts):
    """What PyTorch makes of the inputs."""
    inputs, unet, vae = model.inputs(), parts["unet"], parts["vae"]
    joined = [inputs["noisy"]] + [inputs[name] for name in ("mask", "reference") if name in inputs]
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    found = {}
    told = dict(encoder_hidden_states=inputs["context"], added_cond_kwargs=added or None)
    found["eps"] = unet(torch.cat(joined, 1), inputs["timesteps"], **told).sample
    latents = vae.encode(model.pixels()).latent_dist.mean
    found["latents"] = latents * vae.config.scaling_factor
    found["decoded"] = vae.decode(latents).sample
    if model.kind != "xl":
        found["context"] = parts["text_encoder"](model.tokens["tokens"]).last_hidden_state
        return found
    first = parts["text_encoder"](model.tokens["tokens"], output_hidden_states=True)
    second = parts["text_encoder_2"](model.tokens["tokens_2"], output_hidden_states=True)
    found["context"] = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    found["text_embeds"] = second.text_embeds
    return found


class Jedi:
    def __init__(self, binary, folder):
        self.binary, self.folder = binary, folder

    def run(self, *arguments):
        run = subprocess.run([self.binary, *map(str, arguments)], capture_output=True, text=True)
        if run.returncode != 0:
            sys.exit(f"jedi {' '.join(map(str, arguments))}: {run.stderr}")
        return run.stdout

    def outputs(self, model, path, *tokenizer):
        """What jedi makes of the same inputs, and the tokens of the prompt."""
        file, picture, out = (self.folder / name for name in ("in.safetensors", "in.png", "out.safetensors"))
        save_file(model.inputs(), file, {"set_size": "1"})
        model.picture().save(picture)
        self.run("inspect", "eps", "--model", path, "--inputs", file, "--outputs", out)
        found = {"eps": load_file(out)["eps"]}
        self.run("inspect", "vae", "--model", path, "--image", picture, "--outputs", out)
        found |= load_file(out)
        self.run("inspect", "text", "--model", path, *tokenizer, "--prompt", PROMPT, "--outputs", out)
        found |= load_file(out)
        return found

    def convert(self, path, out, *flags):
        remove(out)
        self.run("convert", "--model", path, "--out", out, *flags)
        return out


def remove(path):
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


class Report:
    def __init__(self):
        self.failed = False
        print(f"{'family':<16} {'way':<8} {'layout':<30} " + " ".join(f"{name:>9}" for name in OUTPUTS))

    def line(self, model, way, layout, found, expected):
        errors = {}
        for name, value in expected.items():
            assert found[name].shape == value.shape, (layout, name, found[name].shape, value.shape)
            errors[name] = ((found[name] - value).abs().max() / value.abs().max()).item()
        bad = [name for name, error in errors.items() if not error <= TOLERANCE]
        self.failed |= bool(bad)
        print(f"{model.name:<16} {way:<8} {layout:<30} " + " ".join(f"{e:9.1e}" for e in errors.values()), *(["TOO LARGE"] if bad else []), flush=True)


def write_folder(model, folder, **settings):
    for name, part in model.parts().items():
        part.save_pretrained(folder / name, **settings)
    model.scheduler().save_pretrained(folder / "scheduler")
    for name in ["tokenizer", "tokenizer_2"][: len(model.texts)]:
        vocabulary.write(folder / name)
        if model.kind == "open_clip" or name == "tokenizer_2":
            CLIPTokenizer.from_pretrained(folder / name, pad_token="!").save_pretrained(folder / name)
    absent = ["feature_extractor"] if model.kind == "xl" else ["feature_extractor", "safety_checker"]
    index = {"_class_name": model.pipeline.__name__, "_diffusers_version": diffusers.__version__}
    index |= {name: [None, None] for name in absent}
    if model.channels == 8 or model.kind == "xl" and model.channels == 4:
        index["image_encoder"] = [None, None]
    for name, library, kind in (
        ("unet", "diffusers", "UNet2DConditionModel"),
        ("vae", "diffusers", "AutoencoderKL"),
        ("scheduler", "diffusers", "DDIMScheduler"),
        ("text_encoder", "transformers", "CLIPTextModel"),
        ("tokenizer", "transformers", "CLIPTokenizer"),
        ("text_encoder_2", "transformers", "CLIPTextModelWithProjection"),
        ("tokenizer_2", "transformers", "CLIPTokenizer"),
    ):
        if (folder / name).exists():
            index[name] = [library, kind]
    if model.kind != "xl":
        index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def rounded(model, dtype):
    return {name: copy.deepcopy(part).to(dtype) for name, part in model.parts().items()}


def in_float32(parts):
    """As float32 networks of the rounded weights."""
    return {name: part.float() for name, part in parts.items()}


def loaded_folder(model, folder, dtype=None):
    settings = {} if model.kind == "xl" else dict(safety_checker=None)
    pipeline = model.pipeline.from_pretrained(folder, torch_dtype=dtype, **settings)
    check_tokens(model, pipeline)
    assert pipeline.scheduler.config.prediction_type == model.prediction
    return {name: getattr(pipeline, name) for name in model.parts()}


def loaded_file(model, file, folder):
    """By diffusers' own reader of single files; heads and the like it takes from the folder that diffusers wrote."""
    settings = dict(config=str(folder), local_files_only=True)
    parts = {"unet": UNet2DConditionModel.from_single_file(str(file), subfolder="unet", **settings)}
    parts["vae"] = AutoencoderKL.from_single_file(str(file), subfolder="vae", **settings)
    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if name.startswith(("cond_stage_model.", "conditioner."))]
        words = {name: opened.get_tensor(name) for name in names}
    for part, network in model.texts.items():
        text = type(network)(network.config)
        missing, extra = text.load_state_dict(ldm.text_by_diffusers(words, part, model.kind, text), strict=False)
        assert not extra and all("position_ids" in name for name in missing), (missing, extra)
        parts[part] = text.eval()
    return parts


def tokens_of(tokenizer):
    return tokenizer(PROMPT, padding="max_length", max_length=77, truncation=True).input_ids


def check_tokens(model, pipeline):
    for name, expected in model.tokens.items():
        tokenizer = getattr(pipeline, name.replace("tokens", "tokenizer"))
        assert tokenizer.model_max_length == 77, tokenizer.model_max_length
        assert tokens_of(tokenizer) == expected[0].tolist()


def check(model, jedi, report, room):
    plain = write_folder(model, room / "plain")
    model.tokens = {
        name: torch.tensor([tokens_of(CLIPTokenizer.from_pretrained(plain / name.replace("tokens", "tokenizer")))])
        for name in ["tokens", "tokens_2"][: len(model.texts)]
    }
    run = lambda parts: outputs(model, parts)
    expected = run(model.parts())

    def read(layout, path, against=expected, *flags):
        found = jedi.outputs(model, path, *flags)
        for name, tokens in model.tokens.items():
            assert torch.equal(found[name], tokens), (layout, found[name])
        report.line(model, "read", layout, found, against)

    read("folder", plain)
    shard = f"{max(1, model.total_bytes // 5000)}KB"
    read("folder, shards", write_folder(model, room / "shards", max_shard_size=shard))
    remove(room / "shards")
    in_half = run(in_float32(rounded(model, torch.float16)))
    half = write_folder(model, room / "half")
    for name, part in rounded(model, torch.float16).items():
        remove(half / name)
        part.save_pretrained(half / name, variant="fp16", max_shard_size=shard)
    read("folder, fp16 files, shards", half, in_half)
    remove(half)
    old = {old_spelling(name): value.contiguous() for name, value in model.vae.state_dict().items()}
    weights = plain / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(old, weights, {"format": "pt"})
    read("folder, old VAE names", plain)
    single = jedi.convert(plain, room / "single-old.safetensors")
    report.line(model, "written", "old VAE names → file", run(loaded_file(model, single, plain)), expected)
    remove(single)
    model.vae.save_pretrained(plain / "vae")
    file = room / "single.safetensors"
    save_file(model.single_file(), file)
    read("single file", file, expected, "--tokenizer", plain / "tokenizer")

    back = jedi.convert(file, room / "back", "--tokenizer", plain / "tokenizer")
    report.line(model, "written", "file → folder", run(loaded_folder(model, back)), expected)
    remove(file)
    back = jedi.convert(plain, room / "back", "--max-shard-size", shard)
    report.line(model, "written", "folder → shards", run(loaded_folder(model, back)), expected)
    remove(back)
    single = jedi.convert(plain, room / "single.safetensors")
    report.line(model, "written", "folder → file", run(loaded_file(model, single, plain)), expected)
    remove(single)
    single = jedi.convert(plain, room / "single.safetensors", "--dtype", "f16")
    report.line(model, "written", "folder → file, f16", run(loaded_file(model, single, plain)), in_half)
    remove(single)
    in_bf16 = run(in_float32(rounded(model, torch.bfloat16)))
    back = jedi.convert(plain, room / "back", "--dtype", "bf16")
    report.line(model, "written", "folder → folder, bf16", run(loaded_folder(model, back, torch.float32)), in_bf16)
    remove(back)
    if model.channels == 4:
        joint = jedi.convert(plain, room / "back", "--joint")
        unet = UNet2DConditionModel.from_pretrained(joint / "unet")
        assert unet.config.in_channels == 9
        inputs = model.inputs()
        rest = torch.randn(1, 5, model.latent, model.latent)
        added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
        told = dict(encoder_hidden_states=inputs["context"], added_cond_kwargs=added or None)
        with torch.no_grad():
            eps = unet(torch.cat([inputs["noisy"], rest], 1), inputs["timesteps"], **told)
        report.line(model, "written", "--joint", {"eps": eps.sample}, {"eps": expected["eps"]})
        remove(joint)
    remove(plain)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jedi", default=Path(__file__).parents[1] / "target" / "release" / "jedi", type=Path)
    parser.add_argument("--full", action="store_true", help="Stable Diffusion 1.4 at its full size")
    parser.add_argument("--only", help="one family: " + ", ".join(SMALL))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    report = Report()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as room:
        room = Path(room)
        jedi = Jedi(arguments.jedi, room)
        if arguments.full:
            models = [lambda: Model("SD1.4", layouts.SD1, layouts.VAE, [layouts.CLIP_L], "clip", 4, "epsilon", 64)]
        else:
            texts = [SMALL_TEXT, SMALL_TEXT_2]
            make = lambda name: lambda: Model(name, SMALL[name][0], SMALL_VAE, texts, *SMALL[name][1:], 8)
            models = [make(name) for name in SMALL if arguments.only in (None, name)]
        for make in models:
            model = make()
            model.total_bytes = 4 * sum(p.numel() for p in model.unet.parameters())
            check(model, jedi, report, room)
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()

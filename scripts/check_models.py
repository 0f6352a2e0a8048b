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

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from golden import layouts, ldm, networks, vocabulary
from golden.vae import old_spelling

TOLERANCE = 1e-4
PROMPT = "a photo of the dog in the garden, with sunglasses"
LEVELS = dict(down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])
SMALL_SD1 = dict(block_out_channels=[32, 64], attention_head_dim=8, cross_attention_dim=64, layers_per_block=1, **LEVELS)
SMALL_SD2 = SMALL_SD1 | dict(block_out_channels=[64, 128], attention_head_dim=[1, 2], use_linear_projection=True)
SMALL_VAE = dict(
    block_out_channels=[32, 64],
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    layers_per_block=1,
)
SMALL_TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=1)

# Name: U-Net, text encoder, channels, prediction.
SMALL = {
    "SD1": (SMALL_SD1, "clip", 4, "epsilon"),
    "SD1 inpainting": (SMALL_SD1, "clip", 9, "epsilon"),
    "InstructPix2Pix": (SMALL_SD1, "clip", 8, "epsilon"),
    "SD2": (SMALL_SD2, "open_clip", 4, "epsilon"),
    "SD2-v": (SMALL_SD2, "open_clip", 4, "v_prediction"),
    "SD2 inpainting": (SMALL_SD2, "open_clip", 9, "epsilon"),
}
PIPELINES = {4: StableDiffusionPipeline, 9: StableDiffusionInpaintPipeline, 8: StableDiffusionInstructPix2PixPipeline}


class Model:
    """Networks of random weights and what they give for given inputs."""

    def __init__(self, name, unet, vae, text, kind, channels, prediction, latent):
        self.name, self.kind, self.channels, self.prediction = name, kind, channels, prediction
        self.latent = latent
        sample_size = 96 if prediction == "v_prediction" else 64
        unet = unet | dict(in_channels=channels, out_channels=4, sample_size=sample_size, norm_num_groups=32)
        act = "gelu" if kind == "open_clip" else "quick_gelu"
        config = CLIPTextConfig(vocab_size=vocabulary.size(), hidden_act=act, attn_implementation="eager", **text)
        self.unet = networks.randomised(UNet2DConditionModel(**unet), 11)
        self.vae = networks.randomised(AutoencoderKL(**vae | dict(norm_num_groups=32, sample_size=512)), 12)
        self.text = networks.randomised(CLIPTextModel(config), 13)
        if kind == "open_clip":
            # The spread by which models that predict v are told from the others.
            bias = self.unet.up_blocks[-1].attentions[-1].transformer_blocks[0].norm1.bias
            with torch.no_grad():
                bias.copy_(torch.linspace(-1, 1, len(bias)) * (0.3 if prediction == "v_prediction" else 0.03))

    def parts(self):
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text}

    def scheduler(self):
        return DDIMScheduler.from_config(networks.scheduler().config, prediction_type=self.prediction)

    def inputs(self):
        random = torch.Generator().manual_seed(7)
        normal = lambda *shape: torch.randn(*shape, generator=random)
        h = self.latent
        inputs = {"noisy": normal(1, 4, h, h), "timesteps": torch.tensor([601])}
        inputs["context"] = normal(1, 77, self.unet.config.cross_attention_dim)
        if self.channels > 4:
            inputs["reference"] = normal(1, 4, h, h)
        if self.channels == 9:
            inputs["mask"] = torch.ones(1, 1, h, h)
        return inputs

    def picture(self):
        side = self.latent * self.vae_scale()
        values = torch.rand(side, side, 3, generator=torch.Generator().manual_seed(8)) * 255
        return Image.fromarray(values.to(torch.uint8).numpy(), "RGB")

    def vae_scale(self):
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


@torch.no_grad()
def outputs(model, unet, vae, text, tokens, dtype=torch.float32):
    """What PyTorch makes of the inputs; the weights may have been rounded before."""
    inputs = model.inputs()
    joined = [inputs["noisy"]] + [inputs[name] for name in ("mask", "reference") if name in inputs]
    cast = lambda tensor: tensor.to(dtype)
    found = {}
    eps = unet.to(dtype)(cast(torch.cat(joined, 1)), inputs["timesteps"], encoder_hidden_states=cast(inputs["context"]))
    found["eps"] = eps.sample
    pixels = torch.frombuffer(bytearray(model.picture().tobytes()), dtype=torch.uint8)
    side = model.latent * model.vae_scale()
    pixels = cast(pixels.reshape(1, side, side, 3).permute(0, 3, 1, 2).float() / 127.5 - 1)
    latents = vae.to(dtype).encode(pixels).latent_dist.mean
    found["latents"] = latents * vae.config.scaling_factor
    found["decoded"] = vae.decode(latents).sample
    found["context"] = text.to(dtype)(tokens).last_hidden_state
    return {name: value.float() for name, value in found.items()}


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
        print(f"{'family':<16} {'way':<8} {'layout':<30} " + " ".join(f"{n:>9}" for n in ("eps", "latents", "decoded", "context")))

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
    vocabulary.write(folder / "tokenizer")
    if model.kind == "open_clip":
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!")
        tokenizer.save_pretrained(folder / "tokenizer")
    index = {"_class_name": PIPELINES[model.channels].__name__, "safety_checker": [None, None], "feature_extractor": [None, None]}
    if model.channels == 8:
        index["image_encoder"] = [None, None]
    for name, library, kind in (
        ("unet", "diffusers", "UNet2DConditionModel"),
        ("vae", "diffusers", "AutoencoderKL"),
        ("scheduler", "diffusers", "DDIMScheduler"),
        ("text_encoder", "transformers", "CLIPTextModel"),
        ("tokenizer", "transformers", "CLIPTokenizer"),
    ):
        index[name] = [library, kind]
    index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def rounded(model, dtype):
    return [copy.deepcopy(part).to(dtype) for part in model.parts().values()]


def loaded_folder(model, folder, dtype=None):
    pipeline = PIPELINES[model.channels].from_pretrained(folder, torch_dtype=dtype, safety_checker=None)
    check_tokens(model, pipeline)
    assert pipeline.scheduler.config.prediction_type == model.prediction
    return pipeline.unet, pipeline.vae, pipeline.text_encoder


def loaded_file(model, file, folder):
    """By diffusers' own reader of single files; heads and the like it takes from the folder that diffusers wrote."""
    settings = dict(config=str(folder), local_files_only=True)
    unet = UNet2DConditionModel.from_single_file(str(file), subfolder="unet", **settings)
    vae = AutoencoderKL.from_single_file(str(file), subfolder="vae", **settings)
    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if name.startswith("cond_stage_model.")]
        words = {name: opened.get_tensor(name) for name in names}
    text = CLIPTextModel(model.text.config)
    if model.kind == "clip":
        converted = ldm.single.convert_ldm_clip_checkpoint(words)
    else:
        last = f"cond_stage_model.model.transformer.resblocks.{text.config.num_hidden_layers}."
        converted = ldm.single.convert_open_clip_checkpoint(text, {n: v for n, v in words.items() if not n.startswith(last)})
    missing, extra = text.load_state_dict(converted, strict=False)
    assert not extra and all("position_ids" in name for name in missing), (missing, extra)
    return unet, vae, text.eval()


def check_tokens(model, pipeline):
    settings = dict(padding="max_length", max_length=77, truncation=True)
    assert pipeline.tokenizer.model_max_length == 77, pipeline.tokenizer.model_max_length
    assert pipeline.tokenizer(PROMPT, **settings).input_ids == model.tokens[0].tolist()


def check(model, jedi, report, room):
    plain = write_folder(model, room / "plain")
    tokenizer = CLIPTokenizer.from_pretrained(plain / "tokenizer")
    ids = tokenizer(PROMPT, padding="max_length", max_length=77, truncation=True).input_ids
    model.tokens = torch.tensor([ids])
    run = lambda parts: outputs(model, *parts, model.tokens)
    expected = run(model.parts().values())

    def read(layout, path, against=expected, *flags):
        found = jedi.outputs(model, path, *flags)
        assert torch.equal(found["tokens"], model.tokens), (layout, found["tokens"])
        report.line(model, "read", layout, found, against)

    read("folder", plain)
    shard = f"{max(1, model.total_bytes // 5000)}KB"
    read("folder, shards", write_folder(model, room / "shards", max_shard_size=shard))
    remove(room / "shards")
    # Halves are compared as float32 networks of the rounded weights.
    in_half = run([part.float() for part in rounded(model, torch.float16)])
    half = write_folder(model, room / "half")
    for name, part in zip(model.parts(), rounded(model, torch.float16)):
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
    save_file({k: v.contiguous() for k, v in ldm.single_file(*model.parts().values(), model.kind).items()}, file)
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
    in_bf16 = run([part.float() for part in rounded(model, torch.bfloat16)])
    back = jedi.convert(plain, room / "back", "--dtype", "bf16")
    report.line(model, "written", "folder → folder, bf16", run(loaded_folder(model, back, torch.float32)), in_bf16)
    remove(back)
    if model.channels == 4:
        joint = jedi.convert(plain, room / "back", "--joint")
        unet = UNet2DConditionModel.from_pretrained(joint / "unet")
        assert unet.config.in_channels == 9
        inputs = model.inputs()
        rest = torch.randn(1, 5, model.latent, model.latent)
        with torch.no_grad():
            eps = unet(torch.cat([inputs["noisy"], rest], 1), inputs["timesteps"], encoder_hidden_states=inputs["context"])
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
            models = [lambda: Model("SD1.4", layouts.SD1, layouts.VAE, layouts.CLIP_L, "clip", 4, "epsilon", 64)]
        else:
            make = lambda name: lambda: Model(name, SMALL[name][0], SMALL_VAE, SMALL_TEXT, *SMALL[name][1:], 8)
            models = [make(name) for name in SMALL if arguments.only in (None, name)]
        for make in models:
            model = make()
            model.total_bytes = 4 * sum(p.numel() for p in model.unet.parameters())
            check(model, jedi, report, room)
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()

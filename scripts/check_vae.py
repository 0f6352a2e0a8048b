#!/usr/bin/env python3
"""How far the latents of the published VAE are from those in f64: PyTorch's in f32, PyTorch's with group norm in f64, jedi's.

    cargo build --release
    venv/bin/python scripts/check_vae.py            # a picture of 1024x1024: five minutes, 8 GB
    venv/bin/python scripts/check_vae.py 512

The environment of check_models.py; random weights, a picture of noise. Errors are shares of the largest latent.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.utils import logging

from check_models import PYTORCH_GROUP_NORM, SMALL_SD1, SMALL_TEXT, Jedi, Model, exact_group_norm, load_file, write_folder
from golden import layouts

BAND = 32
PYTORCH_CONVOLUTION = torch.nn.Conv2d.forward
PYTORCH_ATTENTION = F.scaled_dot_product_attention


def banded_convolution(self, x):
    """In f64 PyTorch unfolds the whole picture, ten GB of it: band by band instead."""
    if x.dtype != torch.float64:
        return PYTORCH_CONVOLUTION(self, x)
    (kernel, _), (stride, _), (pad, _) = self.kernel_size, self.stride, self.padding
    x = F.pad(x, [pad] * 4)
    rows = (x.shape[2] - kernel) // stride + 1
    bands = [x[:, :, i * stride : (min(rows, i + BAND) - 1) * stride + kernel] for i in range(0, rows, BAND)]
    return torch.cat([F.conv2d(band, self.weight, self.bias, self.stride) for band in bands], 2)


def banded_attention(q, k, v, **settings):
    if q.dtype != torch.float64:
        return PYTORCH_ATTENTION(q, k, v, **settings)
    scores = lambda q: torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
    return torch.cat([scores(part) @ v for part in q.split(1024, 2)], 2)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", nargs="?", type=int, default=1024)
    parser.add_argument("--jedi", default=Path(__file__).parents[1] / "target" / "release" / "jedi", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.nn.Conv2d.forward = banded_convolution
    F.scaled_dot_product_attention = banded_attention
    model = Model("SD", SMALL_SD1, layouts.VAE, [SMALL_TEXT], "clip", 4, "epsilon", arguments.side // 8)
    pixels = model.pixels()
    found = {}
    with tempfile.TemporaryDirectory() as room:
        room = Path(room)
        write_folder(model, room / "model")
        model.picture().save(room / "in.png")
        jedi, out = Jedi(arguments.jedi, room), room / "out.safetensors"
        jedi.run("inspect", "vae", "--model", room / "model", "--image", room / "in.png", "--outputs", out)
        found["jedi"] = load_file(out)["latents"] / model.vae.config.scaling_factor
    for name, norm in (("PyTorch", PYTORCH_GROUP_NORM), ("PyTorch, group norm in f64", exact_group_norm)):
        torch.nn.GroupNorm.forward = norm
        found[name] = model.vae.encode(pixels).latent_dist.mean
    exact = model.vae.double().encode(pixels.double()).latent_dist.mean
    for name, latents in found.items():
        print(f"{name:<28} {((latents - exact).abs().max() / exact.abs().max()).item():.1e}", flush=True)


if __name__ == "__main__":
    main()

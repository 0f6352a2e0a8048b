#!/usr/bin/env python3
"""Gives a U-Net a second transformer layer in each attention of its up blocks: the network of configs/toybox/architecture from
one that had a single layer there. A new layer begins as a copy of the one before it whose outputs are zero, so that the
deeper network computes what the shallow one did, and training goes on from there.

    scripts/deepen_unet.py MODEL OUT      both in the diffusers layout; needs Python with safetensors and torch
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FIRST, SECOND = ".transformer_blocks.0.", ".transformer_blocks.1."
# The last step of self-attention, cross-attention and feed-forward.
OUTPUTS = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")


def deepened(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    deeper = dict(weights)
    for name, tensor in weights.items():
        if not name.startswith("up_blocks.") or FIRST not in name:
            continue
        second = name.replace(FIRST, SECOND)
        if second in weights:
            sys.exit(f"{second}: is there already; give a U-Net with one layer in each attention")
        is_output = any(output in name for output in OUTPUTS)
        deeper[second] = torch.zeros_like(tensor) if is_output else tensor.clone()
    return deeper


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    model, out = map(Path, sys.argv[1:])
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("state"))
    config_file = out / "unet/config.json"
    config = json.loads(config_file.read_text())
    config["reverse_transformer_layers_per_block"] = [2] * len(config["up_block_types"])
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    weights_file = out / "unet/diffusion_pytorch_model.safetensors"
    save_file(deepened(load_file(weights_file)), weights_file)


if __name__ == "__main__":
    main()

"""Loads the adapters that `jedi train` wrote into diffusers, and holds the U-Net's output to that of the merged checkpoint.

    python scripts/check_lora.py --base MODEL --checkpoint runs/R/checkpoints/latest

MODEL is the folder that the run started from (`model.start_from`). Needs diffusers and peft. Exits 1 if an output differs by more
than 1e-4 of its largest value.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel


def output(unet):
    torch.manual_seed(0)
    config = unet.config
    noisy = torch.randn(2, config.in_channels, 16, 16)
    text = torch.randn(2, 7, config.cross_attention_dim)
    with torch.no_grad():
        return unet(noisy, torch.tensor([10, 700]), text).sample


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--checkpoint", required=True)
    args = parser.parse_args()
    checkpoint = Path(args.checkpoint)
    merged = output(UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet"))
    base = output(UNet2DConditionModel.from_pretrained(args.base, subfolder="unet"))
    largest, moved = merged.abs().max().item(), (merged - base).abs().max().item()
    print(f"the adapters move the output by {moved / largest:.2e} of its largest value")
    is_off = moved == 0
    for name in ["pytorch_lora_weights.safetensors", "kohya.safetensors"]:
        pipeline = StableDiffusionPipeline.from_pretrained(args.base, safety_checker=None, local_files_only=True)
        pipeline.load_lora_weights(checkpoint / "lora", weight_name=name)
        gap = (output(pipeline.unet) - merged).abs().max().item()
        print(f"{name}: largest difference {gap / largest:.2e}")
        is_off |= not gap <= 1e-4 * largest
    sys.exit(is_off)


if __name__ == "__main__":
    main()

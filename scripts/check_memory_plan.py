"""Holds the memory plan of `jedi train` to what the run then takes: the peak of its resident memory.

    python scripts/check_memory_plan.py [--jedi target/release/jedi] [--large]

Two toybox runs; with --large also a network of Stable Diffusion's kind with random weights (takes some GB and minutes; needs
diffusers, which writes its VAE). Exits 1 if a plan is off by more than 10 %.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOYBOX = ["--config", "configs/toybox/joint.toml", "--set", "model.vae=configs/toybox/model", "--set", "data.sets=64",
          "--set", "run.steps=4", "--set", "run.checkpoint_every=2"]


def planned_and_used(jedi, arguments):
    """Bytes that the plan tells, and the peak that the kernel counted for the process."""
    with tempfile.TemporaryDirectory() as room:
        command = [jedi, "train", "--device", "cpu", "--out", room + "/run", "--set", "run.preview_images=0", *arguments]
        log = open(room + "/log", "w+")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        text = log.read()
        if status != 0:
            sys.exit(f"{' '.join(command)} failed:\n{text}")
        print(next(line for line in text.splitlines() if line.startswith("memory plan")))
        planned = float(re.search(r"memory plan: ([0-9.]+) GB", text).group(1)) * 1e9
        return planned, usage.ru_maxrss * 1024


def large_architecture(folder):
    """Configs of a U-Net, text encoder and VAE like Stable Diffusion's at a third of its width, and a random VAE."""
    from diffusers import AutoencoderKL

    folder = Path(folder)
    for part in ["scheduler", "tokenizer"]:
        (folder / part).mkdir(parents=True)
        for file in Path("configs/toybox/architecture", part).iterdir():
            (folder / part / file.name).write_bytes(file.read_bytes())
    unet = {
        "in_channels": 9, "out_channels": 4, "sample_size": 32, "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 384, "norm_num_groups": 32,
    }
    text = {
        "vocab_size": 49408, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
        "num_attention_heads": 6, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    }
    for part, config in [("unet", unet), ("text_encoder", text)]:
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    AutoencoderKL(
        block_out_channels=[64, 128, 128, 128], down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, latent_channels=4, norm_num_groups=32, sample_size=256,
    ).save_pretrained(folder / "vae")


def large_config(folder):
    path = Path(folder) / "large.toml"
    path.write_text(f"""objective = "joint"
[model]
architecture = "{folder}"
vae = "{folder}"
[data]
source = "toybox"
sets = 8
size = 256
[joint]
set_sizes = [2]
[run]
steps = 2
images_per_step = 4
""")
    return ["--config", str(path)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--jedi", default="target/release/jedi")
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    cases = [("toybox, 24 images", TOYBOX), ("toybox, 96 images in parts of 48",
             TOYBOX + ["--set", "run.images_per_step=96", "--set", "run.micro_batch=48"])]
    is_off = False
    with tempfile.TemporaryDirectory() as folder:
        if args.large:
            large_architecture(folder)
            base = large_config(folder)
            cases += [
                ("like Stable Diffusion, 4 images of 256", base),
                ("the same, checkpointed", base + ["--set", "run.gradient_checkpointing=true"]),
                ("the same, adapters", base + ["--set", "lora.rank=8"]),
            ]
        for name, arguments in cases:
            planned, used = planned_and_used(args.jedi, arguments)
            off = planned / used - 1
            is_off |= abs(off) > 0.1
            print(f"{name}: planned {planned / 1e9:.3f} GB, used {used / 1e9:.3f} GB, {100 * off:+.1f} %")
    sys.exit(is_off)


if __name__ == "__main__":
    main()

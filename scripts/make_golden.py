#!/usr/bin/env python3
"""Writes the reference results in tests/golden/ that `cargo test --test parity` holds jedi to.

    python3 -m venv venv && venv/bin/pip install torch==2.15.0 diffusers==0.36.0 transformers==4.57.6 \
        tokenizers==0.22.2 safetensors==0.8.0 numpy==2.4.6 pillow==12.3.0 gguf==0.19.0
    venv/bin/python scripts/make_golden.py                    # everything, into tests/golden/
    venv/bin/python scripts/make_golden.py --only ops,unet    # some of it
    venv/bin/python scripts/make_golden.py --pipeline DIR     # a tiny random diffusers pipeline folder, nothing else

transformers stays below 5 to have its two tokenizers side by side (`ftfy` must not be installed: with it the one in
Python repairs text in its own ways).

Nothing is downloaded: all networks are tiny and random, their norms and biases perturbed, since layers that start as
zeros or ones hide mistakes. References are computed in float64 from float32 inputs and rounded once, so that what a
comparison shows is jedi's rounding alone; only the sinusoids of the timesteps stay float32, as diffusers computes them.
Each file's metadata holds its tolerances, its seed and the library versions.
"""

import argparse
from pathlib import Path

from golden import (
    captions,
    diffusion,
    families,
    grounding,
    language,
    layouts,
    networks,
    ops,
    samplers,
    text,
    unet,
    vae,
    vision,
)

CASES = {
    "ops": ops,
    "unet": unet,
    "vae": vae,
    "text": text,
    "diffusion": diffusion,
    "samplers": samplers,
    "layouts": layouts,
    "families": families,
    "grounding": grounding,
    "vision": vision,
    "captions": captions,
    "language": language,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests" / "golden")
    parser.add_argument("--only", default=",".join(CASES), help="comma-separated: " + ", ".join(CASES))
    parser.add_argument("--pipeline", type=Path, metavar="DIR", help="write only a pipeline folder, there")
    arguments = parser.parse_args()
    if arguments.pipeline:
        return networks.write_pipeline(arguments.pipeline)
    # Every case but `ops` runs on the networks of this folder, so their weights are committed once.
    networks.write_pipeline(arguments.out / "tiny-pipeline")
    for name in arguments.only.split(","):
        CASES[name].write(arguments.out)


if __name__ == "__main__":
    main()
